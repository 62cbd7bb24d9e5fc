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
        problems = context.problems or Problems()
        check_allocation_input(problems, label, self.reads_mass, importance, total, floor, capacity)
        total, floor, capacity = total.long(), floor.long(), capacity.long()  # the type of the answer
        target = torch.minimum(torch.maximum(total, floor.sum(0)), capacity.sum(0))
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


def check_allocation_input(
    problems: Problems,
    label: str,
    reads_mass: bool,
    importance: Tensor,
    total: Tensor,
    floor: Tensor,
    capacity: Tensor,
) -> None:
    """Notes where the numbers given to `Allocator.allocate` break its contract.

    Raises:
        PolicyError: if a shape or dtype does.
    """
    if importance.ndim != 3:
        shape = tuple(importance.shape)
        raise PolicyError(f"allocator {label}: importance must be [layers, batch, tokens], got the shape {shape}")
    layers, batch, tokens = importance.shape
    for argument, tensor, shape in (
        ("total", total, (batch,)),
        ("floor", floor, (layers, batch)),
        ("capacity", capacity, (layers, batch)),
    ):
        if tuple(tensor.shape) != shape or tensor.is_floating_point():
            raise PolicyError(
                f"allocator {label}: {argument} must be integers of the shape {shape}, "
                f"got {tensor.dtype} of {tuple(tensor.shape)}"
            )
    bad = (floor < 0) | (floor > capacity) | (capacity > tokens)
    wrong = ~((importance >= 0) & (importance < torch.inf)) if reads_mass else importance.isnan()

    def bounds() -> str:
        layer, row = bad.nonzero()[0].tolist()
        return (
            f"allocator {label}: layer {layer}, row {row}: needs 0 <= floor <= capacity <= {tokens} tokens, "
            f"got floor {int(floor[layer, row])} and capacity {int(capacity[layer, row])}"
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
    outside, sums = (budget < floor) | (budget > capacity), budget.sum(0)
    wrong = sums != target

    def bounds() -> str:
        layer, row = outside.nonzero()[0].tolist()
        return (
            f"allocator {label}: layer {layer}, row {row}: gave {int(budget[layer, row])} tokens, allowed are "
            f"{int(floor[layer, row])} to {int(capacity[layer, row])}"
        )

    def totals() -> str:
        row = int(wrong.nonzero()[0])
        return (
            f"allocator {label}: row {row}: the layers add up to {int(sums[row])} tokens, "
            f"must be exactly {int(target[row])}"
        )

    problems.note(bounds, outside.any())
    problems.note(totals, wrong.any())
