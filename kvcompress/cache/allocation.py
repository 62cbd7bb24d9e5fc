"""How many slots each layer of each row may hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence as List
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.config.budget import Budget
from kvcompress.errors import BudgetWarning
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.faults import policy_errors


@dataclass
class Allocation:
    """What the last allocation gave, and how it grows with the tokens seen.

    Attributes:
        budgets: slots per layer and row.
        spent: sum of `budgets` per row.
        notes: figures that the allocator noted per row (for instance "threshold").
        image_budgets: how many of the slots are for image tokens, where the allocator splits them.
    """

    budgets: list[list[int]]
    spent: list[int]
    notes: dict[str, Tensor] = field(default_factory=dict)
    image_budgets: list[list[int]] | None = None

    @property
    def rows_alike(self) -> bool:
        """Whether every row has the same budgets."""
        return all(count == layer[0] for layer in self.budgets for count in layer)

    def select_rows(self, index: Tensor) -> None:
        """Reorders, repeats or drops rows; waits for the device only where rows differ."""
        if len(index) != len(self.spent) or not self.rows_alike:
            rows = index.tolist()
            self.budgets = [[layer[row] for row in rows] for layer in self.budgets]
            self.image_budgets = self.image_budgets and [[layer[row] for row in rows] for layer in self.image_budgets]
            self.spent = [self.spent[row] for row in rows]
        self.notes = {name: values.index_select(0, index.to(values.device)) for name, values in self.notes.items()}


def allocate(
    config: CompressionConfig,
    sequence: Sequence,
    stores: List[DenseStore],
    held: List[List[int]],
    importance: Tensor | None,
    context: AllocationContext | None,
) -> Allocation:
    """Splits each row's total over the layers.

    Args:
        config: the policies.
        sequence: the tokens seen.
        stores: the layers' buffers, for their sizes in bytes and device.
        held: slots that each layer holds per row, `[layers][batch]`.
        importance: `[layers, batch, tokens]`; None for allocators that read none.
        context: what else they may read.
    """
    device = stores[0].device if importance is None else importance.device
    layers, batch = len(held), len(held[0])
    capacity = torch.tensor(held, device=device)
    floor = torch.minimum(torch.tensor([floors(config, sequence)] * layers, device=device), capacity)
    wanted = [row_total(config.budget, seen, stores, batch) for seen in sequence.row_seen]
    total = torch.tensor(wanted, device=device)
    _warn_if_below_floor(config, total, floor)
    if importance is None:
        importance = torch.zeros((), device=device).expand(layers, batch, int(capacity.max()))
    context = context or AllocationContext()
    with policy_errors(config.allocator):
        budgets: list[list[int]] = config.allocator.allocate(importance, total, floor, capacity, context).tolist()
    spent = [sum(layer[row] for layer in budgets) for row in range(batch)]
    notes = dict(context.notes)
    images = notes.pop("image_budget", None)
    return Allocation(budgets, spent, notes, None if images is None else images.tolist())


def floors(config: CompressionConfig, sequence: Sequence) -> list[int]:
    """Protected tokens per row: sinks and recents, as far as the row has them."""
    sinks, recents = protection(config)
    return [min(seen, sinks + recents) for seen in sequence.row_seen]


def protection(config: CompressionConfig) -> tuple[int, int]:
    """Number of first and of last tokens that every layer keeps."""
    recents = max(config.budget.recent, config.scorer.protects if config.scorer is not None else 0)
    return config.budget.sink, recents


def row_total(budget: Budget, row_seen: int, stores: List[DenseStore], batch: int) -> int:
    """Slots that all layers of a row may hold together once it has seen so many tokens."""
    layers = len(stores)
    if budget.fraction is not None:
        return math.floor(budget.fraction * row_seen * layers + 1e-6)
    if budget.tokens is not None:
        return budget.tokens * layers
    shares = layers * batch * stores[0].heads.size  # processes that share the heads share the bytes
    known = [store for store in stores if store.keys is not None]
    slots = sum(store.slots_within((budget.bytes or 0) / shares) for store in known) * layers / len(known)
    return max(0, int(slots) - layers)  # each layer has room for one slot more while it decodes


def _warn_if_below_floor(config: CompressionConfig, total: Tensor, floor: Tensor) -> None:
    protected, (sinks, recents) = floor.sum(0), protection(config)
    if (total < protected).any():
        row = int((total < protected).nonzero()[0])
        warnings.warn(
            f"the budget of {int(total[row])} slots over all layers is below the {int(protected[row])} that its "
            f"{sinks} sinks and {recents} recents need (row {row}); the protected tokens are kept",
            BudgetWarning,
            stacklevel=2,
        )
