"""Checks that every allocator meets, and the words in which a broken one is reported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import PolicyError


def checked_allocation(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps `Allocator.allocate` so that its input and its answer are checked wherever it is called from."""

    @functools.wraps(allocate)
    def checked(
        self: Any,
        importance: Tensor,
        total: Tensor,
        floor: Tensor,
        capacity: Tensor,
        context: Any = None,
    ) -> Tensor:
        label = self.name or type(self).__name__
        check_allocation_input(label, self.reads_mass, importance, total, floor, capacity)
        target = torch.minimum(torch.maximum(total, floor.sum(0)), capacity.sum(0))
        budget = allocate(self, importance, target, floor, capacity, context)
        check_allocation(label, budget, target, floor, capacity)
        return budget

    return checked


def check_allocation_input(
    label: str, reads_mass: bool, importance: Tensor, total: Tensor, floor: Tensor, capacity: Tensor
) -> None:
    """Raises PolicyError unless the arguments of `Allocator.allocate` keep its contract."""
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
    if bad.any():
        layer, row = bad.nonzero()[0].tolist()
        raise PolicyError(
            f"allocator {label}: layer {layer}, row {row}: needs 0 <= floor <= capacity <= {tokens} tokens, "
            f"got floor {int(floor[layer, row])} and capacity {int(capacity[layer, row])}"
        )
    wrong = importance.isnan() if not reads_mass else ~((importance >= 0) & importance.isfinite())
    if tokens and wrong.any():
        layer = int(wrong.flatten(1).any(1).nonzero()[0])
        allowed = "finite and not negative, since this allocator reads mass" if reads_mass else "numbers"
        raise PolicyError(f"allocator {label}: layer {layer}: importance must be {allowed}; check the scorer")


def check_allocation(label: str, budget: Any, target: Tensor, floor: Tensor, capacity: Tensor) -> None:
    """Raises PolicyError unless an allocator's answer keeps the contract."""
    if not isinstance(budget, Tensor) or budget.dtype != torch.int64 or budget.shape != floor.shape:
        came = f"{budget.dtype} of {tuple(budget.shape)}" if isinstance(budget, Tensor) else repr(budget)
        raise PolicyError(f"allocator {label}: must return int64 of the shape {tuple(floor.shape)}, got {came}")
    outside = (budget < floor) | (budget > capacity)
    if outside.any():
        layer, row = outside.nonzero()[0].tolist()
        raise PolicyError(
            f"allocator {label}: layer {layer}, row {row}: gave {int(budget[layer, row])} tokens, allowed are "
            f"{int(floor[layer, row])} to {int(capacity[layer, row])}"
        )
    wrong = budget.sum(0) != target
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise PolicyError(
            f"allocator {label}: row {row}: the layers add up to {int(budget[:, row].sum())} tokens, "
            f"must be exactly {int(target[row])}"
        )
