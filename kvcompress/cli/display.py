"""Figures of generations side by side, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from kvcompress.evaluation import Generation
from kvcompress.markup import size

_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "123456789"  # where the terminal has no bars


def figures(columns: Mapping[str, Generation], *, answers: bool, encoding: str) -> Table:
    """A table with a column for each generation.

    Args:
        columns: generations by the head of their column.
        answers: whether the first row shows what was generated.
        encoding: of the stream it is meant for.
    """
    table = Table(box=box.SIMPLE_HEAD, show_header=len(columns) > 1, pad_edge=False, show_lines=False)
    table.add_column("")
    for head in columns:
        table.add_column(Text(head), overflow="fold")
    results = list(columns.values())
    if answers:
        table.add_row("answer", *(Text(result.text.strip()) for result in results), end_section=True)
    for label, cells in (
        ("tokens seen", [_tokens(result) for result in results]),
        ("image tokens", [_image_tokens(result) for result in results]),
        ("kept per layer", [_kept(result, encoding) for result in results]),
        ("retention", [f"{result.report.retention:.1%}" for result in results]),
        ("key/value cache", [_bytes_held(result) for result in results]),
        ("index", [size(result.report.index_bytes) for result in results]),
        ("threshold p", [_threshold(result) for result in results]),
        ("time to first token", [f"{result.seconds_to_first_token:.2f} s" for result in results]),
        ("decoding", [_speed(result) for result in results]),
    ):
        if any(cells):
            table.add_row(label, *map(Text, cells))
    return table


def layer_bars(lengths: Sequence[int], encoding: str) -> str:
    """One character a layer, the higher the more of its tokens it keeps compared with the largest layer."""
    levels = _BARS if encoding.lower().startswith("utf") else _DIGITS
    most = max(lengths, default=0)
    return "".join(levels[(length * len(levels) - 1) // most if length else 0] for length in lengths)


def agreement(first: Generation, second: Generation) -> tuple[bool, int]:
    """Whether two answers are the same tokens, and how many tokens they share from the start on."""
    same = first.token_ids == second.token_ids
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    shared = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    return same, min(len(first.token_ids), len(second.token_ids)) if shared is None else shared


def _tokens(result: Generation) -> str:
    return f"{result.report.tokens_seen:,} (prompt {result.prompt_tokens:,}, answer {len(result.token_ids):,})"


def _image_tokens(result: Generation) -> str:
    """How many go into the layers, where a reducer acted: "144 in 3 layers, 72 in 2, ..."."""
    counts = [rows[0] for rows in result.report.image_tokens]
    if len(set(counts)) < 2 and 0 not in result.report.went_into:
        return ""
    runs = [(count, len(list(layers))) for count, layers in groupby(counts)]
    first, *rest = (f"{count:,} in {layers}" for count, layers in runs)
    return f"{', '.join([f'{first} layers', *rest])} ({result.report.vision_retention:.1%})"


def _kept(result: Generation, encoding: str) -> str:
    lengths = [rows[0] for rows in result.report.layer_lengths]
    low, high, mean = min(lengths), max(lengths), sum(lengths) / len(lengths)
    if low == high:
        return f"{low:,} in each of {len(lengths)} layers"
    return f"min {low:,}, mean {mean:,.1f}, max {high:,}\n{layer_bars(lengths, encoding)}"


def _bytes_held(result: Generation) -> str:
    report = result.report
    share = f" ({report.kv_bytes / report.full_kv_bytes:.1%})" if report.full_kv_bytes else ""
    return f"{size(report.kv_bytes)} of {size(report.full_kv_bytes)}{share}"


def _threshold(result: Generation) -> str:
    return "" if result.report.threshold is None else f"{result.report.threshold[0]:.4f}"


def _speed(result: Generation) -> str:
    return "" if result.tokens_per_second is None else f"{result.tokens_per_second:.1f} tokens/s"
