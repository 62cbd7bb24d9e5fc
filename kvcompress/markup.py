"""HTML for notebooks: tables whose cells are text, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_BAR = "display:inline-block;height:0.8em;background:#4c78a8"
_ROOM = "display:inline-block;width:16em;background:#8883"


def table(title: str, rows: Mapping[str, str]) -> str:
    """A table of names and texts, both shown as they are, whatever they hold."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def bars(title: str, shares: Sequence[float], texts: Sequence[str]) -> str:
    """A bar for each layer, from 0 to 1, with a text beside it."""
    cells = "".join(
        f'<tr><th>{layer}</th><td style="text-align:left"><span style="{_ROOM}">'
        f'<span style="{_BAR};width:{min(max(share, 0.0), 1.0):.2%}"></span></span> {escape(text)}</td></tr>'
        for layer, (share, text) in enumerate(zip(shares, texts, strict=True))
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def size(count: int) -> str:
    """Bytes in words."""
    amount, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"
