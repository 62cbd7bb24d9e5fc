"""Paired timing: every figure is a ratio of runs that take turns in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def in_turns(runs: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Runs each in turn, `rounds` times after a warm-up; garbage is collected between rounds, not within."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + rounds):
        gc.collect()
        for name, run in runs.items():
            seconds = run()
            if turn >= warm_up:
                times[name].append(seconds)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each time divided by the base's in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(seconds, times[base], strict=True))
        for name, seconds in times.items()
    }


@contextmanager
def short_collections() -> Iterator[None]:
    """Leaves what exists now out of garbage collections for a while, so that one between steps takes no time."""
    frozen_before = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


class Stopwatch:
    """Times between marks: CUDA events where the work runs on a GPU, so that no mark waits for it; else the clock."""

    def __init__(self, device: torch.device) -> None:
        """Starts without a mark."""
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Ends a lap and begins the next; the first mark only begins one."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between marks; waits for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
