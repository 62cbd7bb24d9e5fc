"""How many slots each layer, or each head, may hold, and how that grows with the tokens seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.config import CompressionConfig
from kvcompress.errors import BudgetWarning
from kvcompress.kernels import sent
from kvcompress.parallel import HeadGroup
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.faults import policy_errors

_ROUNDING = 1e-6  # of a product of floats that means a whole number


@dataclass(frozen=True)
class Rule:
    """What a budget says of the slots of one row over all layers.

    Attributes:
        fraction: of the tokens seen; None where the total is fixed.
        fixed: slots over all layers, whatever was seen.
        layers: decoder layers.
        sinks: first tokens that every layer keeps.
        recents: last tokens that every layer keeps.
        whole: tokens up to which a row is kept whole, where the budget is a fraction.
    """

    fraction: float | None
    fixed: int
    layers: int
    sinks: int
    recents: int
    whole: int = 0

    @classmethod
    def of(cls, config: CompressionConfig, layers: int, slots_within_bytes: float = 0.0) -> Rule:
        """The rule of a configuration.

        Args:
            config: the policies and the budget.
            layers: decoder layers.
            slots_within_bytes: slots over all layers of one row that a budget in bytes has room for.
        """
        budget, (sinks, recents) = config.budget, protection(config)
        fixed = 0
        if budget.tokens is not None:
            fixed = budget.tokens * layers
        elif budget.bytes is not None:
            fixed = max(0, int(slots_within_bytes) - layers * to_come(config))
        return cls(budget.fraction, fixed, layers, sinks, recents, budget.whole)

    def totals(self, row_seen: Counts) -> Counts:
        """Slots over all layers for rows that have seen so many tokens."""
        if self.fraction is None:
            return np.full(len(row_seen), self.fixed, dtype=np.int64)
        shares = np.floor(self.fraction * row_seen * self.layers + _ROUNDING).astype(np.int64)
        totals: Counts = np.maximum(shares, self.whole * self.layers)
        return totals

    def least(self, row_seen: Counts) -> Counts:
        """Protected tokens per row: sinks and recents, as far as the row has them."""
        least: Counts = np.minimum(row_seen, self.sinks + self.recents)
        return least


@dataclass
class Allocation:
    """What the last allocation gave, and how it grows with the tokens seen.

    Attributes:
        budgets: slots per layer, row and set of heads, `[layers, batch, sets]`, on the host; one set where all heads of
            a layer have as many.
        spent: sum of `budgets` per row, of the heads of all processes.
        notes: figures that the allocator noted per row (for instance "threshold").
        sets: sets of heads over all processes: 1, or every key/value head of a layer.
    """

    budgets: np.ndarray
    spent: Counts
    notes: dict[str, Tensor] = field(default_factory=dict)
    sets: int = 1

    def limits(self, rule: Rule, row_seen: Counts) -> np.ndarray:
        """Slots that each layer, or head, may hold once rows have seen so many tokens, `[layers, batch, sets]`.

        Each has its share of what the budget gives for the tokens seen, and the protected tokens in any case.
        """
        totals, spent = (rule.totals(row_seen) * self.sets)[:, None], self.spent[:, None]
        even = totals // (rule.layers * self.sets)
        shares = np.where(spent > 0, self.budgets * totals // np.maximum(spent, 1), even)
        limits: np.ndarray = np.maximum(shares, rule.least(row_seen)[:, None])
        return limits

    def own(self, heads: HeadGroup) -> Allocation:
        """What this process's heads got."""
        return self if self.sets == 1 else replace(self, budgets=self.budgets[..., heads.part(self.sets)])

    def select_rows(self, index: Tensor, rows: Counts) -> None:
        """Reorders, repeats or drops rows."""
        self.budgets, self.spent = self.budgets[:, rows], self.spent[rows]
        self.notes = {name: values.index_select(0, index.to(values.device)) for name, values in self.notes.items()}


def allocate(
    config: CompressionConfig,
    rule: Rule,
    row_seen: Counts,
    held: np.ndarray,
    device: torch.device,
    importance: Tensor | None = None,
    context: AllocationContext | None = None,
) -> Allocation:
    """Splits each row's total over the layers; waits for the device once for the answer.

    Args:
        config: the policies.
        rule: what the budget says.
        row_seen: tokens of each row.
        held: slots that each layer holds per row, `[layers, batch, 1]`; for an allocator of heads, those of each head,
            `[layers, batch, kv_heads]`.
        device: where to compute.
        importance: `[layers, batch, tokens]`, or `[layers, batch, kv_heads, tokens]`; None for allocators that read
            none.
        context: what else they may read.
    """
    sets = held.shape[2]
    floor = np.minimum(rule.least(row_seen)[:, None], held)
    total = rule.totals(row_seen) * sets
    _warn_if_below_floor(rule, total, floor)
    shape = held.shape if config.allocator.by_head else held.shape[:2]
    if importance is None:
        importance = torch.zeros((), device=device, dtype=torch.float32).expand(*shape, int(held.max(initial=0)))
    context = context or AllocationContext()
    with policy_errors(config.allocator):
        answer = config.allocator.allocate(
            importance,
            sent(total, device),
            sent(floor.reshape(shape), device),
            sent(np.array(held).reshape(shape), device),
            context,
        )
        budgets, notes = answer.cpu().numpy().reshape(held.shape), dict(context.notes)
    return Allocation(budgets, budgets.sum((0, 2)), notes, sets)


def protection(config: CompressionConfig) -> tuple[int, int]:
    """Number of first and of last tokens that every layer keeps."""
    recents = max(config.budget.recent, config.scorer.protects if config.scorer is not None else 0)
    return config.budget.sink, recents


def to_come(config: CompressionConfig) -> int:
    """Slots that a layer has beyond its budget while it decodes: one for the token that comes, or a period's."""
    return 1 if config.evictor is None else config.evictor.cuts_every or 1


def _warn_if_below_floor(rule: Rule, total: Counts, floor: np.ndarray) -> None:
    protected, over = floor.sum((0, 2)), "layers" if floor.shape[2] == 1 else "layers and heads"
    if (total < protected).any():
        row = int((total < protected).argmax())
        warnings.warn(
            f"the budget of {total[row]} tokens over all {over} is below the {protected[row]} that its {rule.sinks} "
            f"sinks and {rule.recents} recents need (row {row}); the protected tokens are kept",
            BudgetWarning,
            stacklevel=2,
        )
