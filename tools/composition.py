"""Writes docs/composition.md from the code: `python tools/composition.py`."""

from pathlib import Path

from kvcompress.composition import as_markdown

Path(__file__).parent.parent.joinpath("docs", "composition.md").write_text(as_markdown(), encoding="utf-8")
