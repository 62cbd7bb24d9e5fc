"""Checks that every allocator meets, and the words in which a broken one is reported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import PolicyError
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.problems import Problems


def checked_allocation(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps `Allocator.allocate` so that its input and its answer are checked wherever it is called from.

    What only the device knows is read once, at the end: by the outermost of nested allocators, or, where the context
    brings a place for problems, by whoever made it.
    """

    @functools.wraps(allocate)
    def checked(
        self: Any,
        importance: Tensor,
        total: Tensor,
        floor: Tensor,
        capacity: Tensor,
        context: AllocationContext | None = None,
    ) -> Tensor:
        label = self.name or type(self).__name__
        context = context or AllocationContext()
        if self.by_head and importance.ndim == 3:
            return _of_one_head(self, importance, total, floor, capacity, context)
        problems = context.problems or Problems()
        check_allocation_input(problems, self, importance, total, floor, capacity)
        total, floor, capacity = total.long(), floor.long(), capacity.long()  # the type of the answer
        target = torch.minimum(torch.maximum(total, of_row(floor)), of_row(capacity))
        try:
            budget = allocate(self, importance, target, floor, capacity, replace(context, problems=problems))
        except Exception:
            problems.refuse()  # what it was given may be the reason
            raise
        check_allocation(problems, label, budget, target, floor, capacity)
        if context.problems is None:
            problems.refuse()
        return budget

    return checked


def _of_one_head(
    allocator: Any, importance: Tensor, total: Tensor, floor: Tensor, capacity: Tensor, context: AllocationContext
) -> Tensor:
    """What an allocator of heads gives layers of one head each, asked in the shapes of layers."""
    if any(counts.ndim != 2 for counts in (floor, capacity)):
        raise PolicyError(
            f"allocator {allocator.name or type(allocator).__name__}: importance [layers, batch, tokens] goes with "
            "floor and capacity [layers, batch]; for heads, all have kv_heads after batch"
        )
    valid, protected = (None if one is None else one.unsqueeze(2) for one in (context.valid, context.protected))
    context = replace(context, valid=valid, protected=protected)
    of_heads = (importance.unsqueeze(2), total, floor.unsqueeze(2), capacity.unsqueeze(2))
    budget: Tensor = allocator.allocate(*of_heads, context).squeeze(2)
    return budget


def of_row(counts: Tensor) -> Tensor:
    """Sums over layers, and over heads where there are any: `[layers, batch]` or `[layers, batch, kv_heads]`."""
    return counts.sum(0) if counts.ndim == 2 else counts.sum((0, 2))


def check_allocation_input(
    problems: Problems,
    allocator: Any,
    importance: Tensor,
    total: Tensor,
    floor: Tensor,
    capacity: Tensor,
) -> None:
    """Notes where the numbers given to `Allocator.allocate` break its contract.

    Raises:
        PolicyError: if a shape or dtype does.
    """
    label, reads_mass, by_head = allocator.name or type(allocator).__name__, allocator.reads_mass, allocator.by_head
    if importance.ndim != (4 if by_head else 3):
        shape, axes = tuple(importance.shape), "layers, batch, kv_heads, tokens" if by_head else "layers, batch, tokens"
        raise PolicyError(f"allocator {label}: importance must be [{axes}], got the shape {shape}")
    sizes, tokens = tuple(importance.shape[:-1]), importance.shape[-1]
    for argument, tensor, shape in (
        ("total", total, sizes[1:2]),
        ("floor", floor, sizes),
        ("capacity", capacity, sizes),
    ):
        if tuple(tensor.shape) != shape or tensor.is_floating_point():
            raise PolicyError(
                f"allocator {label}: {argument} must be integers of the shape {shape}, "
                f"got {tensor.dtype} of {tuple(tensor.shape)}"
            )
    bad = (floor < 0) | (floor > capacity) | (capacity > tokens)
    wrong = ~((importance >= 0) & (importance < torch.inf)) if reads_mass else importance.isnan()

    def bounds() -> str:
        at = tuple(bad.nonzero()[0].tolist())
        return (
            f"allocator {label}: {_place(at)}: needs 0 <= floor <= capacity <= {tokens} tokens, "
            f"got floor {int(floor[at])} and capacity {int(capacity[at])}"
        )

    def numbers() -> str:
        layer = int(wrong.flatten(1).any(1).nonzero()[0])
        allowed = "finite and not negative, since this allocator reads mass" if reads_mass else "numbers"
        return f"allocator {label}: layer {layer}: importance must be {allowed}; check the scorer"

    problems.note(bounds, bad.any())
    problems.note(numbers, wrong.any())


def check_allocation(
    problems: Problems, label: str, budget: Any, target: Tensor, floor: Tensor, capacity: Tensor
) -> None:
    """Notes where the numbers of an allocator's answer break the contract.

    Raises:
        PolicyError: if its shape or dtype does.
    """
    if not isinstance(budget, Tensor) or budget.dtype != torch.int64 or budget.shape != floor.shape:
        came = f"{budget.dtype} of {tuple(budget.shape)}" if isinstance(budget, Tensor) else repr(budget)
        raise PolicyError(f"allocator {label}: must return int64 of the shape {tuple(floor.shape)}, got {came}")
    outside, sums = (budget < floor) | (budget > capacity), of_row(budget)
    wrong = sums != target

    def bounds() -> str:
        at = tuple(outside.nonzero()[0].tolist())
        return (
            f"allocator {label}: {_place(at)}: gave {int(budget[at])} tokens, allowed are {int(floor[at])} to "
            f"{int(capacity[at])}"
        )

    def totals() -> str:
        row = int(wrong.nonzero()[0])
        return (
            f"allocator {label}: row {row}: the {'layers' if floor.ndim == 2 else 'heads'} add up to "
            f"{int(sums[row])} tokens, must be exactly {int(target[row])}"
        )

    problems.note(bounds, outside.any())
    problems.note(totals, wrong.any())


def _place(at: tuple[int, ...]) -> str:
    """Which layer and row, and which head where heads are sized."""
    return f"layer {at[0]}, row {at[1]}" + (f", head {at[2]}" if len(at) > 2 else "")
