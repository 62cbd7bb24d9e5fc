"""Interrupts at any line of kvcompress, and the law that they never leave a cache that lies.

`python -m tests.interrupts --every 7` stops every action of every scenario at every seventh line that runs inside the
package, and says where the law does not hold. The suite takes a small sample.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import kvcompress
from kvcompress import Budget, CompressedCache
from kvcompress.cache.report import CacheReport
from kvcompress.errors import CacheStateError
from tests import tiny

_PACKAGE = str(Path(kvcompress.__file__).parent)
Action = Callable[[CompressedCache], Any]


class Lines:
    """Counts the lines that run inside the package, and raises at one of them."""

    def __init__(self, at: int | None = None, error: Callable[[], BaseException] = KeyboardInterrupt) -> None:
        """Raises once, at line number `at` (from 0), or never."""
        self.at, self.error = at, error
        self.count = 0
        self.place = ""

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.at is not None and self.count > self.at and not self.place:
                self.place = f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno}"
                raise self.error()
        return self._line


# -- scenarios ---------------------------------------------------------------------------------------------------------


def step(tokens: int, seed: int, batch: int = 2) -> Action:
    """A forward of random tokens, which gives its logits."""

    def run(cache: CompressedCache) -> Tensor:
        with torch.no_grad():
            ids = tiny.token_ids(batch, tokens, seed)
            return tiny.model("llama")(ids, **tiny.with_cache(cache)).logits

    return run


def repeat(cache: CompressedCache) -> None:
    """Scores by reconstruction, in parts of 8 tokens."""

    def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [2 + ord(letter) % 90 for letter in text[:6]]}

    cache.score_by_reconstruction(letters, {"input_ids": tiny.token_ids(2, 20, 1)}, chunk=8)


@dataclass(frozen=True)
class Scenario:
    """An action on a cache that has seen something, and how to go on after it.

    Attributes:
        name: what it is.
        config: arguments of the cache.
        before: what the cache went through.
        action: what is interrupted.
        batch: rows after the action.
    """

    name: str
    config: dict[str, Any]
    before: tuple[Action, ...]
    action: Action
    batch: int = 2

    def start(self) -> CompressedCache:
        """The cache right before the action."""
        cache = CompressedCache(tiny.model("llama"), **self.config)
        for run in self.before:
            run(cache)
        return cache


def scenarios() -> Iterator[Scenario]:
    """Every public operation on caches of different stages."""
    small = Budget(tokens=16, sink=2, recent=3)
    configs: dict[str, dict[str, Any]] = {
        "prefix": {"config": "prefixkv", "budget": small},
        "heads": {"config": "h2o", "budget": small},
        "ages": {"config": "streaming", "budget": small},
        "bytes": {"config": "snapkv", "budget": Budget(bytes="10KiB", sink=2, recent=3)},
        "merged": {"config": "prefixkv", "budget": small, "merger": "threshold"},
        "quantized": {"config": "full", "quantizer": {"name": "quanto4", "group": 4, "residual": 5}},
    }
    prompt, turn, decode = step(20, 1), step(5, 2), step(1, 3)
    steps = {
        "prompt": ((), prompt, 2),
        "turn": ((prompt, decode), turn, 2),
        "decode": ((prompt, decode), decode, 2),
        "reorder": ((prompt, decode), lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        "repeat": ((prompt, decode), lambda cache: cache.batch_repeat_interleave(2), 4),
        "select": ((prompt, decode), lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
        "reset": ((prompt, decode), lambda cache: cache.reset(), 2),
    }
    record = CompressedCache.activate_past_recording
    waiting = {
        "crop": ((prompt, record, turn), lambda cache: cache.crop(-2), 2),
        "crop decoded": ((prompt, record, decode), lambda cache: cache.crop(-1), 2),
        "compress": ((prompt, record, turn), CompressedCache.compress, 2),
        "compress decoded": ((prompt, record, decode), CompressedCache.compress, 2),
        "turn after recording": ((prompt, record, turn), turn, 2),
    }
    for name, fields in configs.items():
        for kind, (before, action, batch) in (steps | waiting).items():
            yield Scenario(f"{name}: {kind}", fields, before, action, batch)
    yield Scenario("repeated: reconstruction", {"config": "kvzip", "budget": small}, (), repeat)


# -- the law -----------------------------------------------------------------------------------------------------------


def goes_on(cache: CompressedCache, batch: int) -> list[Any]:
    """What a cache gives from here on: logits and reports of a few more forwards."""
    found: list[Any] = []
    for tokens in (1, 4):
        found += [step(tokens, 9 + tokens, batch)(cache), cache.report()]
    return found


def alike(found: list[Any], wanted: list[Any]) -> bool:
    """Whether two caches went on in the same way."""
    pairs = list(zip(found, wanted, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def is_broken(cache: CompressedCache, batch: int) -> bool:
    """Whether every use of a cache is refused until it is reset."""
    uses: tuple[Action, ...] = (
        step(1, 0, batch),
        step(3, 0, batch),
        CompressedCache.compress,
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.arange(batch)),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_select_indices(torch.arange(batch)),
    )
    refused = 0
    for use in uses:
        try:
            use(cache)
        except CacheStateError as error:
            refused += "reset()" in str(error)
    return refused == len(uses)


@dataclass
class Outcomes:
    """What a scenario does where nothing interrupts it."""

    scenario: Scenario
    start: CompressedCache
    before: CacheReport
    after: CacheReport
    lines: int
    goes_on_after: list[Any]
    fresh: list[Any]

    @classmethod
    def of(cls, scenario: Scenario) -> Outcomes:
        """Runs a scenario once."""
        start = scenario.start()
        cache = copy.deepcopy(start)
        with Lines() as lines:
            scenario.action(cache)
        after = cache.report()
        fresh = CompressedCache(tiny.model("llama"), **scenario.config)
        on = goes_on(cache, scenario.batch)
        return cls(scenario, start, start.report(), after, lines.count, on, goes_on(fresh, 2))

    def fault(self, at: int, error: Callable[[], BaseException] = KeyboardInterrupt) -> str | None:
        """What is wrong after an interrupt at one line; None if the cache is whole, or broken until it is reset.

        It is whole where it goes on as if nothing had interrupted the action, or does so once the action is repeated.
        """
        scenario, cache = self.scenario, copy.deepcopy(self.start)
        lines = Lines(at, error)
        try:
            with lines:
                scenario.action(cache)
        except type(error()):
            pass
        if not lines.place:
            return None
        label = f"{scenario.name}, line {at} of {self.lines} ({lines.place})"
        rows = cache.batch_size if cache.batch_size > 0 else 2
        try:
            broken = is_broken(copy.deepcopy(cache), rows)
            if broken:
                cache.reset()
                if not alike(goes_on(cache, 2), self.fresh):
                    return f"{label}: reset() does not give a new cache"
                return None
            as_before = cache.report() == self.before
            if not as_before and alike(goes_on(copy.deepcopy(cache), scenario.batch), self.goes_on_after):
                return None
            scenario.action(cache)  # also where what had waited is done, and what was asked for is not
            if not alike(goes_on(cache, scenario.batch), self.goes_on_after):
                seems = "as before" if as_before else "as neither before nor after"
                return f"{label}: it seems {seems}, and goes on in another way"
        except Exception as wrong:
            return f"{label}: {type(wrong).__name__}: {wrong}"
        return None


def main() -> None:
    """Sweeps every scenario and prints what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=7, help="interrupt at every such line")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # small budgets are told of
    tried = failed = 0
    for scenario in scenarios():
        if options.only in scenario.name:
            outcomes = Outcomes.of(scenario)
            faults = [outcomes.fault(at) for at in range(0, outcomes.lines, options.every)]
            tried, wrong = tried + len(faults), [fault for fault in faults if fault]
            failed += len(wrong)
            print(f"{scenario.name}: {outcomes.lines} lines, {len(faults)} interrupts, {len(wrong)} wrong", flush=True)
            for fault in wrong:
                print(f"  {fault}", flush=True)
    print(f"{tried} interrupts, {failed} wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
