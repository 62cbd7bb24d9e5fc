"""Every public operation is all or nothing, and an eviction that failed is made up for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvcompress import EVICTORS, MERGERS, SCORERS, Budget, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.cache import rows
from kvcompress.errors import CacheStateError, PolicyError
from kvcompress.policies.base import Merger, Scorer
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.evictors.topk import TopK
from tests import tiny
from tests.interrupts import Action, alike, goes_on, step
from tests.reference import held

SMALL = Budget(tokens=8, sink=1, recent=1)


class Failing(RuntimeError):
    """What a policy of somebody else's may raise."""


class Trap:
    """Raises once, at a call of a policy to come."""

    calls: ClassVar[int | None] = None

    @classmethod
    def set(cls, calls: int) -> None:
        """Raises at call number `calls` from now on (from 0)."""
        cls.calls = calls

    @classmethod
    def step(cls) -> None:
        if cls.calls is not None:
            cls.calls -= 1
            if cls.calls < 0:
                cls.calls = None
                raise Failing("raises once")


class TrappedTopK(TopK):
    """Fails where it selects, or names a victim."""

    def select(self, layer: Any) -> Tensor:
        Trap.step()
        return super().select(layer)

    def victim(self, layer: Any) -> Tensor:
        Trap.step()
        return super().victim(layer)


class TrappedScorer(Scorer):
    """Fails where scores become importance."""

    mass: ClassVar[bool] = True

    def score(self, layer: Any) -> Tensor:
        return layer.keys.float().square().sum(-1)

    def importance(self, score: Tensor, queries: Tensor) -> Tensor:
        Trap.step()
        return score


class TrappedMerger(Merger):
    """Fails where it merges."""

    @property
    def merges_decoding(self) -> bool:
        return True

    def merge(self, layer: MergeContext) -> Merged:
        Trap.step()
        kept = layer.kept.unsqueeze(-1)
        return Merged(torch.where(kept, layer.keys * 1.01, layer.keys), layer.values, layer.state)


@pytest.fixture(autouse=True)
def trapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry, policy in ((EVICTORS, TrappedTopK), (SCORERS, TrappedScorer), (MERGERS, TrappedMerger)):
        monkeypatch.setattr(registry, "_policies", dict(registry._policies))
        registry.register("trapped")(policy)
    yield
    Trap.calls = None


CONFIGS: dict[str, dict[str, Any]] = {
    "evictor": {"scorer": "attention", "evictor": {"name": "trapped", "decode": "oldest"}},
    "heads": {"scorer": "attention", "evictor": {"name": "trapped", "granularity": "head", "decode": "lowest_score"}},
    "scorer": {"scorer": "trapped", "allocator": "prefix"},
    "merger": {"scorer": "attention", "merger": "trapped"},
}


def record(cache: CompressedCache) -> None:
    cache.activate_past_recording()


WAITING: dict[str, tuple[tuple[Action, ...], Action]] = {
    "crop the prompt": ((record, step(15, 1)), lambda cache: cache.crop(-2)),
    "crop": ((step(6, 1), record, step(9, 2)), lambda cache: cache.crop(-2)),
    "crop nothing": ((step(6, 1), record, step(9, 2)), lambda cache: cache.crop(0)),
    "crop after decoding": ((step(20, 1), record, step(1, 2)), lambda cache: cache.crop(0)),
    "compress": ((step(6, 1), record, step(9, 2)), CompressedCache.compress),
    "compress after decoding": ((step(20, 1), record, step(1, 2)), CompressedCache.compress),
}


def kept(cache: CompressedCache) -> list[Any]:
    """Everything of a cache that can be seen."""
    stored = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [cache.report(), held(cache), *stored]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_operation_whose_policy_fails_changes_nothing_and_can_be_tried_again(config: dict[str, Any]) -> None:
    """Wherever in the operation it fails: in the first layer or a later one."""
    failures = 0
    for name, (before, action) in WAITING.items():
        start = CompressedCache(tiny.model("llama"), budget=SMALL, config=config)
        for run in before:
            run(start)
        twin = copy.deepcopy(start)
        action(twin)
        then, on = kept(twin), goes_on(twin, 2)
        for calls in (0, 2):
            cache = copy.deepcopy(start)
            earlier = kept(cache)
            Trap.set(calls)
            try:
                action(cache)
            except PolicyError:
                failures += 1
                assert alike(kept(cache), earlier), f"{name}: changed something"
                action(cache)
            Trap.calls = None
            assert alike(kept(cache), then), f"{name}: ends elsewhere"
            assert alike(goes_on(cache, 2), on), f"{name}: goes on in another way"
    assert failures >= 4


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_forward_whose_waiting_eviction_fails_changes_nothing_or_breaks_the_cache(stage: str) -> None:
    cache = CompressedCache(tiny.model("llama"), budget=SMALL, config=CONFIGS[stage])
    for run in (step(6, 1), record, step(9, 2)):
        run(cache)
    twin = copy.deepcopy(cache)
    step(1, 3)(twin)
    earlier = cache.report()
    Trap.set(0 if stage == "evictor" else 1)  # an evictor is asked once, for all layers
    with pytest.raises(PolicyError):
        step(1, 3)(cache)
    try:
        step(1, 3)(cache)
    except CacheStateError as error:
        assert "reset()" in str(error)
    else:
        assert earlier.tokens_seen + 1 == cache.report().tokens_seen
        assert alike(goes_on(cache, 2), goes_on(twin, 2))


def test_a_budget_holds_after_an_error_that_happened_once() -> None:
    cache = CompressedCache(tiny.model("llama"), budget=SMALL, config=CONFIGS["scorer"])
    record(cache)
    step(15, 1)(cache)
    Trap.set(0)
    with pytest.raises(PolicyError):
        cache.crop(-1)
    for number in range(20):
        try:
            step(1, number)(cache)
        except CacheStateError:
            return
    assert max(length for layer in cache.report().layer_lengths for length in layer) <= 8


# -- rows --------------------------------------------------------------------------------------------------------------

WRONG_ROWS: dict[str, Callable[[CompressedCache], Any]] = {
    "select a negative row": lambda cache: cache.batch_select_indices(torch.tensor([0, -1])),
    "select a row beyond": lambda cache: cache.batch_select_indices(torch.tensor([0, 3])),
    "select no row": lambda cache: cache.batch_select_indices(torch.tensor([], dtype=torch.long)),
    "select by a mask of nothing": lambda cache: cache.batch_select_indices(torch.zeros(3, dtype=torch.bool)),
    "select by fractions": lambda cache: cache.batch_select_indices(torch.tensor([0.0, 1.0])),
    "select by a matrix": lambda cache: cache.batch_select_indices(torch.tensor([[0, 1]])),
    "reorder with a negative row": lambda cache: cache.reorder_cache(torch.tensor([1, -1, 0])),
    "reorder with a row beyond": lambda cache: cache.reorder_cache(torch.tensor([0, 1, 3])),
    "reorder to nothing": lambda cache: cache.reorder_cache(torch.tensor([], dtype=torch.long)),
    "repeat never": lambda cache: cache.batch_repeat_interleave(0),
    "repeat less than never": lambda cache: cache.batch_repeat_interleave(-1),
    "a list": lambda cache: rows.select(cache._state, "reorder_cache", [1, 0, 2]),
}
NO_NUMBERS = (-2.0, "2", True, None, [1], torch.tensor(-2.0), torch.tensor([-1, -2]))


@pytest.mark.parametrize("budget", [0.5, "9KiB"])
def test_rows_that_do_not_exist_are_refused_and_nothing_changes(budget: Any) -> None:
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=budget)
    for run in (step(20, 1, batch=3), step(1, 2, batch=3)):
        run(cache)
    before, on = kept(cache), goes_on(copy.deepcopy(cache), 3)
    for name, action in WRONG_ROWS.items():
        with pytest.raises(KVCompressError, match="row"):
            action(cache)
        assert alike(kept(cache), before), name
    assert alike(goes_on(cache, 3), on)


def test_what_is_no_whole_number_is_refused_and_nothing_changes() -> None:
    cache = CompressedCache(tiny.model("llama"), "full")
    step(20, 1)(cache)
    before = kept(cache)
    for number in NO_NUMBERS:
        with pytest.raises(KVCompressError, match="crop: takes a whole number"):
            rows.whole("crop", number)
    for action in (cache.crop, cache.batch_repeat_interleave):
        for number in (True, torch.tensor(-2.0), torch.tensor([-1, -2])):
            with pytest.raises(KVCompressError, match=f"{action.__name__}: takes a whole number"):
                action(number)
    assert alike(kept(cache), before)


@pytest.mark.parametrize("preset", ["full", "prefixkv", "h2o", "streaming", "kivi4"])
def test_a_number_may_be_a_tensor(preset: str) -> None:
    """As what counts positions gives it, once transformers has worked out the difference."""
    caches = [CompressedCache(tiny.model("llama"), preset) for _ in range(2)]
    for cache, number in zip(caches, (torch.tensor(-2), -2), strict=True):
        record(cache)
        step(20, 1, 1)(cache)
        cache.crop(number)
        cache.batch_repeat_interleave(torch.tensor(2) if isinstance(number, Tensor) else 2)
    one, other = ([*goes_on(cache, 2), *kept(cache)] for cache in caches)
    assert alike(one, other) and caches[0].get_seq_length() == 18 + 5


def test_looking_at_what_is_ranked_changes_nothing() -> None:
    """Also while the past is recorded: what may be undone has not had its say for good."""
    caches = [CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5) for _ in range(2)]
    for cache in caches:
        step(30, 1)(cache)
        record(cache)
        step(6, 2)(cache)
    before = kept(caches[0])
    first, again = (list(chain.from_iterable(caches[0].ranked())) for _ in range(2))
    caches[0].allocation_at(CompressionConfig.preset("uniform"))
    assert alike(first, again) and alike(kept(caches[0]), before)
    for cache in caches:
        cache.crop(-2)
    assert alike(kept(caches[0]), kept(caches[1]))


@torch.no_grad()
def test_rows_may_be_selected_by_numbers_or_by_a_mask() -> None:
    caches = [CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5) for _ in range(3)]
    indices = (torch.tensor([0, 2]), torch.tensor([True, False, True]), torch.tensor([0, 2], dtype=torch.int32))
    for cache, index in zip(caches, indices, strict=True):
        step(20, 1, batch=3)(cache)
        cache.batch_select_indices(index)
    first, *others = [goes_on(cache, 2) for cache in caches]
    assert all(alike(first, other) for other in others)


def test_an_empty_cache_has_no_rows_to_change() -> None:
    """Beam search and assisted decoding ask for it before anything was seen."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.crop(0)
    cache.compress()
    cache.reset()
    assert cache.report().tokens_seen == 0


ONE_LAYER: dict[str, Callable[[Any], Any]] = {
    "reset": lambda layer: layer.reset(),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "crop": lambda layer: layer.crop(-1),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])),
}


@pytest.mark.parametrize("action", ONE_LAYER.values(), ids=ONE_LAYER)
def test_one_layer_alone_cannot_be_changed(action: Callable[[Any], Any]) -> None:
    """The layers of a cache share what was seen; transformers' own caches let a layer be changed."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    step(20, 1)(cache)
    before, on = kept(cache), goes_on(copy.deepcopy(cache), 2)
    with pytest.raises(KVCompressError, match="cache"):
        action(cache.layers[0])
    assert alike(kept(cache), before) and alike(goes_on(cache, 2), on)


# -- rows under a budget in bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        pytest.param(8, 7, lambda cache: cache.batch_select_indices(torch.arange(7)), id="fewer"),
        pytest.param(2, 4, lambda cache: cache.batch_repeat_interleave(2), id="more"),
    ],
)
@pytest.mark.parametrize("preset", ["streaming", "snapkv"])
def test_protected_tokens_stay_when_rows_change_after_decoding(
    preset: str, before: int, after: int, change: Action
) -> None:
    """Under a budget in bytes, rows that come or go change every row's share; age goes on as it was."""
    sinks, recents = 4, 32 if preset == "snapkv" else 3
    cache = CompressedCache(tiny.model("llama"), preset, budget=Budget(bytes="128KiB", sink=4, recent=3))
    step(180, 1, before)(cache)
    for number in range(9):
        step(1, number, before)(cache)
    change(cache)
    for number in range(36):
        step(1, number, after)(cache)
        if number % 4 == 3:
            seen = cache.get_seq_length()
            protected = {*range(sinks), *range(seen - recents, seen)}
            for positions in (positions for layer in held(cache) for row in layer for positions in row):
                assert protected <= set(positions)
                assert preset != "streaming" or positions[sinks:] == list(range(seen - len(positions) + sinks, seen))
    assert cache.report().kv_bytes <= 128 * 1024


FEW: dict[str, Action] = {
    "more rows": lambda cache: cache.batch_repeat_interleave(2),
    "fewer rows": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "other rows": lambda cache: cache.reorder_cache(torch.tensor([2, 0])),
    "ranked": lambda cache: cache.ranked(),
    "sizes": lambda cache: cache.allocation_at(CompressionConfig.preset("prefixkv")),
}


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("budget", [{"bytes": 1500}, {"fraction": 0.01}], ids=str)
def test_layers_that_hold_nothing_are_looked_at_and_changed_as_any(budget: dict[str, Any], granularity: str) -> None:
    config = {"scorer": "attention", "evictor": {"name": "topk", "granularity": granularity}}
    for name, action in FEW.items():
        cache = CompressedCache(tiny.model("llama"), budget=Budget(**budget, sink=0, recent=0), config=config)
        step(30, 1, 3)(cache)
        step(1, 2, 3)(cache)
        action(cache)
        assert torch.isfinite(goes_on(cache, cache.batch_size)[2]).all(), name


def test_a_policy_that_fails_while_bytes_are_shared_anew_breaks_the_cache() -> None:
    """Rows have moved in place by then: the cache says that it is broken, and how to go on."""
    cache = CompressedCache(tiny.model("llama"), budget="9KiB", config=CONFIGS["evictor"])
    step(40, 1, 2)(cache)
    Trap.set(0)
    with pytest.raises(PolicyError, match="trapped"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(CacheStateError, match=r"reset\(\)"):
        step(1, 2, 4)(cache)
    cache.reset()
    step(20, 1, 2)(cache)
    assert cache.report().tokens_seen == 20
