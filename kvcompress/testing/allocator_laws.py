"""Laws of allocators, of layers `[layers, batch]` and of heads `[layers, batch, kv_heads]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.base import Allocator
from kvcompress.policies.problems import Problems
from kvcompress.policies.statistics import STATISTICS
from kvcompress.testing.allocation import AllocationInput, allocation_inputs, for_layers
from kvcompress.testing.laws import Law, law, require, require_unchanged, tensors_of

_FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float64])


def _allocator_law(
    draws: st.SearchStrategy[Any] | None = None,
    binds: Callable[[Any], bool] = lambda allocator: True,
    share: float = 1.0,
) -> Callable[[Callable[[Any, Any], None]], Law]:
    examples = allocation_inputs() if draws is None else draws
    return law("allocator", draws=lambda allocator: examples, binds=binds, share=share)


def over_layers(counts: Tensor) -> Tensor:
    """Sum of what each row has in all layers (and heads), `[batch]`."""
    return counts.movedim(1, 0).flatten(1).sum(1)


def clamped(total: Tensor, floor: Tensor, capacity: Tensor) -> Tensor:
    """What the budgets of each row must add up to."""
    return torch.minimum(torch.maximum(total, over_layers(floor)), over_layers(capacity))


def _unchecked(allocator: Allocator, given: AllocationInput) -> tuple[AllocationInput, Any]:
    """What it is given, and the answer as it is, without the checks around `allocate`: each law speaks for itself."""
    if allocator.by_head:
        given = given.with_heads()
    own = for_layers(allocator, given.floor.shape[0])
    method = type(own).allocate
    target = clamped(given.total, given.floor, given.capacity)
    context = replace(given.context(), problems=Problems())
    raw = getattr(method, "__wrapped__", method)
    return given, raw(own, given.importance, target, given.floor, given.capacity, context)


@_allocator_law(share=1 / 4)
def answers_int64(allocator: Allocator, given: AllocationInput) -> None:
    """The answer is an int64 tensor in the shape of the floors, on their device."""
    given, budget = _unchecked(allocator, given)
    require(isinstance(budget, Tensor), lambda: f"returned {type(budget).__name__}")
    require(
        budget.dtype == torch.int64 and budget.shape == given.floor.shape and budget.device == given.floor.device,
        lambda: f"returned {budget.dtype} of {tuple(budget.shape)} on {budget.device}; floors are {given.floor.shape}",
    )


@_allocator_law()
def stays_within_bounds(allocator: Allocator, given: AllocationInput) -> None:
    """Every layer gets no less than its floor and no more than its capacity."""
    given, budget = _unchecked(allocator, given)
    require(
        (budget >= given.floor) & (budget <= given.capacity),
        lambda: f"gave {budget.tolist()} for floors {given.floor.tolist()} and capacities {given.capacity.tolist()}",
    )


@_allocator_law()
def meets_the_total_exactly(allocator: Allocator, given: AllocationInput) -> None:
    """The layers of a row add up to clamp(total, sum of floors, sum of capacities), exactly."""
    (_, budget), target = _unchecked(allocator, given), clamped(given.total, given.floor, given.capacity)
    require(
        over_layers(budget) == target,
        lambda: f"gave {over_layers(budget).tolist()} tokens to the rows, which must be {target.tolist()}",
    )
    checked = given.by(allocator)  # the totals as they came, which a caller's checks clamp
    require(over_layers(checked) == target, lambda: f"gave {checked.tolist()} for the totals {given.total.tolist()}")


@_allocator_law(
    draws=st.tuples(allocation_inputs(kinds=st.sampled_from(["random", "ties", "zeros"])), _FLOATS), share=1 / 4
)
def takes_any_float(allocator: Allocator, drawn: tuple[AllocationInput, torch.dtype]) -> None:
    """Importance may come in half, single or double precision: the total is met as exactly."""
    given, dtype = drawn
    budget = given.by(allocator, importance=given.importance.to(dtype))
    require(over_layers(budget) == clamped(given.total, given.floor, given.capacity), "missed the total")


@_allocator_law()
def treats_rows_by_themselves(allocator: Allocator, given: AllocationInput) -> None:
    """A row of a batch gets what it gets alone, whatever the other rows are."""
    together = given.by(allocator)
    for row in range(given.total.shape[0]):
        only = slice(row, row + 1)
        alone = given.rows(only).by(allocator)
        require(
            torch.equal(together[:, only], alone),
            f"gave row {row} {together[:, only].tolist()} in the batch and {alone.tolist()} alone",
        )


@_allocator_law(share=1 / 4)
def leaves_its_input_alone(allocator: Allocator, given: AllocationInput) -> None:
    """An allocator writes to none of its arguments."""
    before = tensors_of(given)
    given.by(allocator)
    require_unchanged(before, given)


@_allocator_law()
def answers_alike(allocator: Allocator, given: AllocationInput) -> None:
    """The same input gives the same budgets, however often it is asked and whatever was drawn in between."""
    first = given.by(allocator)
    torch.rand(3)
    require(torch.equal(given.by(allocator), first), "gave other budgets when it was asked again")


@_allocator_law(draws=st.tuples(allocation_inputs(kinds=st.sampled_from(["random", "ties"])), st.integers(0, 99)))
def reads_no_empty_slots(allocator: Allocator, drawn: tuple[AllocationInput, int]) -> None:
    """Whatever stands in slots that hold no token, budgets are as if it were zero: minus infinity too, for what is
    no mass.
    """
    given, seed = drawn
    valid = torch.arange(given.importance.shape[2]) < given.capacity.unsqueeze(-1)
    noise = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) * 1e3
    fills = [noise] if allocator.reads_mass else [noise, torch.full_like(noise, -torch.inf)]
    clean = given.by(allocator, importance=given.importance.masked_fill(~valid, 0.0), valid=valid)
    for fill in fills:
        dirty = given.by(allocator, importance=torch.where(valid, given.importance, fill), valid=valid)
        require(torch.equal(dirty, clean), f"gave {dirty.tolist()}, not {clean.tolist()}")


@_allocator_law(draws=st.tuples(st.integers(1, 6), st.integers(1, 3)), share=1 / 4)
def gives_nothing_where_there_is_nothing(allocator: Allocator, sizes: tuple[int, int]) -> None:
    """A cache without tokens has empty budgets, whatever the total."""
    none, known = torch.zeros(sizes, dtype=torch.long), {name: torch.full(sizes, 0.5) for name in STATISTICS}
    total = torch.arange(sizes[1]) * 7
    budget = AllocationInput(torch.zeros(*sizes, 0), total, none, none, known).by(allocator)
    require(budget.dtype == torch.int64 and torch.equal(budget, none), f"gave {budget.tolist()}")


@_allocator_law(binds=lambda allocator: not allocator.reads_importance, share=1 / 4)
def reads_importance_only_where_it_says_so(allocator: Allocator, given: AllocationInput) -> None:
    """An allocator that does not declare `reads_importance` gives the same budgets for whatever importance."""
    first, second = given.by(allocator), given.by(allocator, importance=torch.zeros_like(given.importance))
    require(torch.equal(first, second), f"gave {first.tolist()}, and {second.tolist()} for importance of zeros")
