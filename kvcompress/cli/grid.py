"""Tables of evaluated grids: live while they are measured, and at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcompress.evaluation.results import Row
from kvcompress.evaluation.runner import Progress
from kvcompress.markup import size

_BESIDE = 8  # lines of a terminal that are not rows: heads, rules, progress
WIDE = 140  # columns of a terminal from which on an interval stands beside its value


class GridDisplay:
    """A table on stderr that grows while a grid is measured, with the time left; silent where nobody watches."""

    def __init__(self, *, shown: bool = True) -> None:
        """Shows nothing unless `shown`, as in all but the first of several processes."""
        self._console = Console(file=sys.stderr)
        self._shown = shown and self._console.is_terminal
        self._live = Live(console=self._console, transient=True, refresh_per_second=4)
        self._rows: list[Row] = []
        self._start = 0.0

    def __enter__(self) -> GridDisplay:
        self._start = time.monotonic()
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Shows what is new."""
        if progress.row is not None:
            self._rows.append(progress.row)
        if self._shown:
            line = progress_line(progress, time.monotonic() - self._start)
            wide = self._console.width >= WIDE
            last = self._rows[-max(1, (self._console.height - _BESIDE) // (1 if wide else 2)) :]
            self._live.update(Group(results_table(last, wide=wide), line) if last else line)


def progress_line(progress: Progress, seconds: float) -> Text:
    """Which cell is at work, how many samples are done, and how long the rest will take.

    Args:
        progress: how far the grid is.
        seconds: since the run began.
    """
    known = time_left(seconds, progress.measured, progress.total - progress.done)
    number = [cell.name for cell in progress.cells].index(progress.cell.name) + 1
    place = f"{progress.cell.name} ({number} of {len(progress.cells)})"
    return Text(f"{place}: {progress.done:,} of {progress.total:,} samples{known}")


def time_left(seconds: float, done: int, left: int) -> str:
    """How long the rest will take if it goes on like this; empty where nobody can tell, or nothing is left."""
    return f", about {duration(left * seconds / done)} left" if done and left else ""


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def results_table(rows: Sequence[Row], *, wide: bool = True) -> RenderableType:
    """A line for each cell: tokens kept, metrics with their intervals, retention, bytes, times and peak memory.

    Args:
        rows: of one run; at least one.
        wide: whether all of it stands in one table, intervals beside their values. If not, what caches say and what
            they cost are tables of their own, and intervals stand below.
    """
    first = rows[0]
    title = f"{first['model']} ({first['dtype']}), {first['data']}, {first['samples']} samples"
    title += f", question {first.get('question', 'seen')}"
    if any(row["skipped"] for row in rows):
        title += f", {max(row['skipped'] for row in rows)} skipped"
    said = {"kept": [_kept(row) for row in rows]}
    for name in first["metrics"]:
        said[name] = [_interval(row["metrics"][name], " " if wide else "\n") for row in rows]
    cost = {
        "retention": [f"{row['retention']:.3f}" for row in rows],
        "held": [size(round(row["kv_bytes"])) for row in rows],
        "first token": [f"{row['seconds_to_first_token']:.3f} s" for row in rows],
        "tokens/s": ["" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}" for row in rows],
        "peak": ["" if row["peak_bytes"] is None else size(row["peak_bytes"]) for row in rows],
    }
    return _table(rows, title, said | cost) if wide else Group(_table(rows, title, said), _table(rows, None, cost))


def _table(rows: Sequence[Row], title: str | None, cells: dict[str, list[str]]) -> Table:
    """Caches and budgets, and beside them columns by name."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("cache", overflow="fold", min_width=max(len(row["policy"]) for row in rows))
    for name in ("budget", *cells):
        table.add_column(name, justify="right", overflow="fold", min_width=0 if name == "kept" else len(name))
    for row, *own in zip(rows, *cells.values(), strict=True):
        table.add_row(Text(row["policy"]), _budget(row), *own)
    return table


def _interval(metric: dict[str, Any], between: str) -> str:
    value, low, high = (
        f"{metric[name]:.3f}" if abs(metric[name]) < 100 else f"{metric[name]:.4g}"
        for name in ("value", "ci_low", "ci_high")
    )
    return f"{value}{between}({low}-{high})"


def _kept(row: Row) -> str:
    """Tokens per layer that were held, of those seen, means over samples; empty where a row does not tell."""
    if row.get("held_tokens") is None or row.get("seen_tokens") is None:
        return ""
    return f"{row['held_tokens']:,.0f} of {row['seen_tokens']:,.0f}"


def _budget(row: Row) -> str:
    if row["budget_unit"] == "bytes":
        return size(row["budget"])
    return f"{row['budget']:g}" if row["budget_unit"] == "fraction" else f"{row['budget']} tokens"
