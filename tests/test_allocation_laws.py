"""Allocation: budgets add up to the total exactly, within floors and capacities, on every input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import ALLOCATORS, CompressedCache, KVCompressError
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, PolicyError
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.problems import Problems
from kvcompress.policies.statistics import STATISTICS
from tests import oracles, strategies, tiny
from tests.operations import Operations
from tests.strategies import MASSES, AllocationInput, allocation_inputs, examples

every_allocator = pytest.mark.parametrize("allocator", strategies.allocators(), ids=strategies.label)
mass_readers = pytest.mark.parametrize(
    "allocator", [a for a in strategies.allocators() if a.reads_mass], ids=strategies.label
)
PREFIXES = [ALLOCATORS.create("prefix", protected=mode) for mode in ("floor", "on_top")]
EVEN_PREFIXES = [ALLOCATORS.create("prefix", protected=mode, even=0.4) for mode in ("floor", "on_top")]


def prefix_label(prefix: Allocator) -> str:
    return f"{prefix.protected}, {prefix.even} even"


every_prefix = pytest.mark.parametrize("prefix", [*PREFIXES, *EVEN_PREFIXES], ids=prefix_label)


def clamped(total: int, floor: Tensor, capacity: Tensor) -> int:
    return max(int(floor.sum()), min(int(total), int(capacity.sum())))


def rows_of(given: AllocationInput) -> list[tuple[list[list[float]], int, list[int], list[int]]]:
    return [
        (given.importance[:, row].tolist(), int(total), given.floor[:, row].tolist(), given.capacity[:, row].tolist())
        for row, total in enumerate(given.total)
    ]


# -- every allocator ---------------------------------------------------------------------------------------------------


class Copier(Allocator):
    """Starts from the floors, in whatever type they come."""

    name = "copier"

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = floor.clone()
        while (left := total - budget.sum(0)).any():
            budget.scatter_add_(0, (capacity - budget).argmax(0, keepdim=True), (left > 0).long()[None])
        return budget


@pytest.mark.parametrize("allocator", [*strategies.allocators(), Copier()], ids=strategies.label)
@examples(6)
@given(given=allocation_inputs(kinds=st.just("random")), dtype=st.sampled_from([torch.int32, torch.int16]))
def test_any_integer_type_counts_tokens(allocator: Allocator, given: AllocationInput, dtype: torch.dtype) -> None:
    """Totals, floors and capacities of a narrow integer type give the same int64 budgets."""
    total = given.total.clamp(max=1000)
    wide = given.by(allocator, total=total)
    narrow = given.by(allocator, total=total.to(dtype), floor=given.floor.to(dtype), capacity=given.capacity.to(dtype))
    assert narrow.dtype == torch.int64
    assert narrow.tolist() == wide.tolist()


def known(layers: int) -> dict[str, Tensor]:
    return {name: torch.full((layers, 2), 0.5) for name in STATISTICS}


def valid_input() -> dict[str, Any]:
    return {
        "context": AllocationContext(statistics=known(3)),
        "importance": torch.rand(3, 2, 5),
        "total": torch.tensor([6, 9]),
        "floor": torch.ones(3, 2, dtype=torch.long),
        "capacity": torch.full((3, 2), 5),
    }


def poisoned(value: float, layer: int) -> Tensor:
    importance = torch.rand(3, 2, 5)
    importance[layer, 1, 3] = value
    return importance


def at(layer: int, value: int) -> Tensor:
    counts = torch.full((3, 2), 5)
    counts[layer, 1] = value
    return counts


@every_allocator
@pytest.mark.parametrize(
    ("argument", "wrong", "says"),
    [
        *(
            pytest.param("importance", poisoned(torch.nan, layer), f"layer {layer}", id=f"nan-{layer}")
            for layer in (0, 2)
        ),
        pytest.param("importance", torch.rand(3, 5), "importance", id="importance-2d"),
        pytest.param("importance", torch.rand(2, 2, 5), "floor|capacity", id="importance-fewer-layers"),
        pytest.param("importance", torch.rand(3, 1, 5), "total|floor|capacity", id="importance-fewer-rows"),
        pytest.param("importance", torch.rand(3, 2, 4), "layer 0", id="capacity-over-tokens-everywhere"),
        pytest.param("total", torch.tensor([6.0, 9.0]), "total", id="total-float"),
        pytest.param("total", torch.tensor(6), "total", id="total-scalar"),
        pytest.param("total", torch.tensor([6, 9, 9]), "total", id="total-more-rows"),
        pytest.param("floor", torch.ones(3, 2), "floor", id="floor-float"),
        pytest.param("floor", torch.ones(2, 2, dtype=torch.long), "floor", id="floor-fewer-layers"),
        pytest.param("floor", at(1, 6), "layer 1", id="floor-over-capacity"),
        pytest.param("floor", at(2, -1), "layer 2", id="floor-negative"),
        pytest.param("capacity", at(2, 6), "layer 2", id="capacity-over-tokens"),
        pytest.param("capacity", at(1, 0), "layer 1", id="capacity-under-floor"),
        pytest.param("capacity", torch.full((3, 2), 5.0), "capacity", id="capacity-float"),
        pytest.param("capacity", torch.full((3,), 5), "capacity", id="capacity-1d"),
    ],
)
def test_invalid_input_is_refused_by_name(allocator: Allocator, argument: str, wrong: Tensor, says: str) -> None:
    """What breaks the contract raises PolicyError naming the argument, or the layer where there is one."""
    assert allocator.allocate(**valid_input()).sum(0).tolist() == [6, 9]
    with pytest.raises(PolicyError, match=says) as caught:
        allocator.allocate(**{**valid_input(), argument: wrong})
    assert allocator.name in str(caught.value)


@mass_readers
@pytest.mark.parametrize("value", [-1.0, -1e-30, torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_no_mass_is_refused(allocator: Allocator, value: float, layer: int) -> None:
    """An allocator of mass refuses negative and infinite importance, naming the layer."""
    with pytest.raises(PolicyError, match=f"layer {layer}"):
        allocator.allocate(**{**valid_input(), "importance": poisoned(value, layer)})


@every_allocator
def test_an_allocation_reads_the_device_once(allocator: Allocator) -> None:
    """All checks together, those of allocators within it included; none where the caller reads them."""
    given = valid_input()
    with Operations() as operations:
        budget = allocator.allocate(**given)
    assert operations.syncs == 1
    given["context"] = replace(given["context"], problems=Problems())
    with Operations() as operations:
        assert torch.equal(allocator.allocate(**given), budget)
    assert operations.syncs == 0
    given["context"].problems.refuse()


@every_allocator
def test_how_much_an_allocation_does_does_not_depend_on_sizes(allocator: Allocator) -> None:
    """As many operations for 32 layers and 300 tokens as for 3 and 5."""
    numbers = []
    for layers, tokens in ((3, 5), (32, 300)):
        own, counts = strategies.for_layers(allocator, layers), torch.full((layers, 2), tokens)
        context = AllocationContext(statistics=known(layers))
        with Operations() as operations:
            own.allocate(torch.rand(layers, 2, tokens), counts.sum(0) // 2, counts * 0, counts, context)
        numbers.append(operations.number)
    assert numbers[0] == numbers[1]


# -- the prefix allocator ----------------------------------------------------------------------------------------------


def beside(prefix: Allocator, total: int, floor: list[int], capacity: list[int]) -> tuple[list[int], list[int]]:
    """Slots that each layer has in any case, and how many of them it keeps beside its prefix."""
    least, begin = oracles.prefix_bounds(total, floor, capacity, prefix.protected, prefix.even)
    return least, [slots - ranks for slots, ranks in zip(least, begin, strict=True)]


dyadic = allocation_inputs(kinds=st.just("dyadic"), max_tokens=24)


@every_prefix
@given(given=dyadic)
def test_prefix_keeps_the_ranks_with_least_mass_before_them(prefix: Allocator, given: AllocationInput) -> None:
    """With exact shares, budgets are those of brute force over all ranks, ties by layer, then rank."""
    budget = prefix.allocate(given.importance, given.total, given.floor, given.capacity)
    for row, (masses, total, floor, capacity) in enumerate(rows_of(given)):
        wanted = oracles.prefix_budgets(masses, total, floor, capacity, prefix.protected, prefix.even)
        assert budget[:, row].tolist() == wanted


@every_prefix
@given(given=allocation_inputs(kinds=st.sampled_from(sorted(MASSES))))
def test_prefix_keeps_no_rank_above_one_it_drops(prefix: Allocator, given: AllocationInput) -> None:
    """On any masses, the mass before a kept rank never exceeds, but for rounding, that before a dropped one."""
    budget = prefix.allocate(given.importance, given.total, given.floor, given.capacity)
    for row, (masses, total, floor, capacity) in enumerate(rows_of(given)):
        before = [oracles.mass_before(layer, most) for layer, most in zip(masses, capacity, strict=True)]
        kept = budget[:, row].tolist()
        layers, (least, on_top) = range(len(masses)), beside(prefix, total, floor, capacity)
        last_kept = max((before[i][kept[i] - on_top[i] - 1] for i in layers if kept[i] > least[i]), default=0)
        first_dropped = min((before[i][kept[i] - on_top[i]] for i in layers if kept[i] < capacity[i]), default=2)
        assert last_kept <= first_dropped + 1e-12


@every_prefix
@given(given=allocation_inputs(kinds=st.just("dyadic"), max_layers=3, max_batch=2, max_tokens=5))
def test_prefix_is_max_min_optimal(prefix: Allocator, given: AllocationInput) -> None:
    """No feasible allocation has a larger minimum, over the layers, of retained mass."""
    budget = prefix.allocate(given.importance, given.total, given.floor, given.capacity)
    for row, (masses, total, floor, capacity) in enumerate(rows_of(given)):
        least, on_top = beside(prefix, total, floor, capacity)
        reached = oracles.smallest_retained(masses, budget[:, row].tolist(), on_top, capacity)
        best = max(
            oracles.smallest_retained(masses, other, on_top, capacity)
            for other in oracles.feasible(total, least, capacity)
        )
        assert reached == best


@every_prefix
@given(given=allocation_inputs(), more=st.integers(1, 20))
def test_prefix_budgets_grow_with_the_total(prefix: Allocator, given: AllocationInput, more: int) -> None:
    """A larger total takes no slot from any layer."""
    total = given.total.clamp(max=1000)
    smaller = prefix.allocate(given.importance, total, given.floor, given.capacity)
    larger = prefix.allocate(given.importance, total + more, given.floor, given.capacity)
    assert (larger >= smaller).all()


@every_prefix
@given(given=dyadic, seed=strategies.seeds)
def test_prefix_ignores_the_order_of_tokens(prefix: Allocator, given: AllocationInput, seed: int) -> None:
    """Permuting the tokens of a layer changes no budget."""
    shuffled = torch.rand(given.importance.shape, generator=strategies.generator(seed)).argsort(-1)
    permuted = given.importance.gather(-1, shuffled)
    budgets = [prefix.allocate(m, given.total, given.floor, given.capacity) for m in (given.importance, permuted)]
    assert budgets[0].tolist() == budgets[1].tolist()


@pytest.mark.parametrize("prefix", PREFIXES, ids=prefix_label)
@given(given=allocation_inputs(kinds=st.just("random"), min_tokens=2), seed=strategies.seeds)
def test_prefix_permutes_with_the_layers(prefix: Allocator, given: AllocationInput, seed: int) -> None:
    """Without ties, permuting layers permutes their budgets."""
    layers = given.importance.shape[0]
    # Rank 0 ties in all layers, since no mass is before it; a floor of one, or a total for all of them, decides that.
    capacity = given.capacity.clamp(min=1)
    floor = torch.minimum(given.floor.clamp(min=1), capacity)
    total = torch.maximum(given.total, (floor + (capacity > floor)).sum(0))
    order = torch.randperm(layers, generator=strategies.generator(seed))
    budget = prefix.allocate(given.importance, total, floor, capacity)
    permuted = prefix.allocate(given.importance[order], total, floor[order], capacity[order])
    assert permuted.tolist() == budget[order].tolist()


@every_prefix
@given(given=dyadic, scale=st.integers(-20, 20))
def test_prefix_reads_shares_not_sizes(prefix: Allocator, given: AllocationInput, scale: int) -> None:
    """Scaling the masses of one layer changes no budget."""
    scaled = given.importance.clone()
    scaled[0] *= 2.0**scale
    budgets = [prefix.allocate(m, given.total, given.floor, given.capacity) for m in (given.importance, scaled)]
    assert budgets[0].tolist() == budgets[1].tolist()


@every_prefix
@given(given=dyadic)
def test_prefix_notes_the_threshold_that_splits_kept_from_dropped(prefix: Allocator, given: AllocationInput) -> None:
    """Beyond floors, no kept rank has more mass before it than the threshold, and no dropped rank has less."""
    context = AllocationContext()
    budget = prefix.allocate(given.importance, given.total, given.floor, given.capacity, context)
    threshold = context.notes["threshold"]
    assert threshold.shape == given.total.shape
    assert ((threshold >= 0) & (threshold <= 1)).all()
    for row, (masses, total, floor, capacity) in enumerate(rows_of(given)):
        if total <= sum(floor) or total > sum(capacity):
            continue  # floors or capacities decide alone
        least, on_top = beside(prefix, total, floor, capacity)
        for layer, (mass, most) in enumerate(zip(masses, capacity, strict=True)):
            before, kept = oracles.mass_before(mass, most), int(budget[layer, row])
            p, ranks = float(threshold[row]) + 1e-12, kept - on_top[layer]
            assert kept == least[layer] or before[ranks - 1] <= p
            assert kept == most or before[ranks] >= p - 2e-12


@given(given=allocation_inputs())
def test_prefix_gives_all_of_it_evenly_as_uniform_does(given: AllocationInput) -> None:
    """With `even` at its most, no mass has a say."""
    budgets = [
        given.by(ALLOCATORS.create(*named, **more)) for *named, more in (("prefix", {"even": 1.0}), ("uniform", {}))
    ]
    assert budgets[0].tolist() == budgets[1].tolist()


# -- the uniform allocator ---------------------------------------------------------------------------------------------


@given(given=allocation_inputs(kinds=st.just("equal"), max_tokens=12))
def test_uniform_gives_slots_one_at_a_time_to_the_smallest_layer(given: AllocationInput) -> None:
    """Beyond floors, each slot goes to the layer that has fewest so far, the first of them where they tie."""
    uniform = ALLOCATORS.create("uniform")
    budget = uniform.allocate(given.importance, given.total, given.floor, given.capacity)
    for row, (_, total, floor, capacity) in enumerate(rows_of(given)):
        assert budget[:, row].tolist() == oracles.uniform_budgets(total, floor, capacity)


# -- an allocator of one's own -----------------------------------------------------------------------------------------


class Liar(Allocator):
    """Gives what the contract allows, and one of the answers that it does not."""

    name = "liar"
    lie: str = "none"

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = ALLOCATORS.create("uniform").allocate(importance, total, floor, capacity, context)
        if self.lie in ("more", "less"):
            budget[0] += 1 if self.lie == "more" else -1
        if self.lie == "moved":  # the total stays right
            budget[0], budget[1] = budget[0] + budget[1], 0
        answers = {
            "float": budget.float(),
            "int32": budget.int(),
            "flat": budget.flatten(),
            "transposed": budget.T.contiguous(),
            "row": budget[:, :1].expand(-1, 3),
            "list": budget.tolist(),
            "nothing": None,
        }
        return answers.get(self.lie, budget)


LIES = {
    "more": "liar",
    "less": "liar",
    "moved": "layer",
    "float": "int64",
    "int32": "int64",
    "flat": "int64",
    "transposed": "int64",
    "row": "int64",
    "list": "int64",
    "nothing": "int64",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_is_refused_when_called_directly(lie: str) -> None:
    """A custom allocator that returns a wrong total, type or shape is caught by name, whoever calls it."""
    given = valid_input()
    assert Liar().allocate(**given).sum(0).tolist() == [6, 9]
    with pytest.raises(PolicyError, match=LIES[lie]):
        Liar(lie=lie).allocate(**given)


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_is_refused_within_a_cache(lie: str) -> None:
    """The same answers stop the forward of a cache, and leave the cache unusable until it is reset."""
    model, given = tiny.model("llama"), tiny.inputs("llama", 12, seed=1)
    config = CompressionConfig(budget=0.5, scorer="attention", allocator=Liar(lie=lie))
    cache = CompressedCache(model, config)
    with torch.no_grad(), pytest.raises(PolicyError, match=LIES[lie]):
        model(**given, **tiny.with_cache(cache))
    with torch.no_grad(), pytest.raises(CacheStateError, match="reset"):
        model(**given, **tiny.with_cache(cache))
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad(), pytest.raises(KVCompressError, match=LIES[lie]):
        model(**given, **tiny.with_cache(cache))


def test_an_honest_allocator_of_ones_own_works_within_a_cache() -> None:
    """The counterpart of the two tests above."""
    model, given = tiny.model("llama"), tiny.inputs("llama", 12, seed=1)
    cache = CompressedCache(model, CompressionConfig(budget=0.5, scorer="attention", allocator=Liar()))
    with torch.no_grad():
        model(**given, **tiny.with_cache(cache))
    assert cache.report().layer_lengths == [[6]] * 3
