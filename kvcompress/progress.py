"""A progress bar on stderr, or in a notebook, for those who ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[..., None]  # done, and what is at work now if that changes


@contextmanager
def progress_bar(shown: bool, label: str, total: int) -> Iterator[Tell]:
    """Shows how far something is while the block runs, with the time left; its last state stays.

    Args:
        shown: whether there is a bar at all; the yielded function does nothing if not.
        label: what is done.
        total: how much of it there is.

    Yields:
        What is told how much is done, and with `label=` what is at work.
    """
    if not shown:
        yield lambda done, label="": None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns, console=Console(stderr=True), refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
    )
    with bar as progress:
        task = progress.add_task(escape(label), total=total)

        def tell(done: int, label: str = label) -> None:
            progress.update(task, completed=done, description=escape(label))

        yield tell
