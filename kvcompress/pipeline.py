"""The data flow: score -> allocate -> select -> keep, a line a stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.budget import Budget
from kvcompress.config import CompressionConfig
from kvcompress.errors import BudgetWarning, PolicyError
from kvcompress.sequence import Sequence
from kvcompress.shapes import AllocationContext, MergeContext, SelectionContext
from kvcompress.stages import Scorer
from kvcompress.storage import DenseStore


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


Ranked: TypeAlias = tuple[Tensor, Tensor | None]  # columns and importance of a layer's slots, over all heads


def compress(
    stores: List[DenseStore], config: CompressionConfig, sequence: Sequence, statistics: List[dict[str, Tensor]]
) -> Allocation:
    """Brings every layer down to its budget once all of them are scored.

    Args:
        stores: the layers' buffers, scored.
        config: the policies.
        sequence: the tokens seen, this forward included.
        statistics: what the allocator needs of each layer beyond importance, by name, `[batch]`.

    Returns:
        The allocation, which also rules how far layers may grow while decoding.

    Raises:
        PolicyError: if a policy breaks its contract; the message names policy and layer.
    """
    ranked = [every_head(layer, store, config, sequence) for layer, store in enumerate(stores)]
    importance, context = gather_importance(stores, config, sequence, statistics, ranked)
    allocation = allocate(config, sequence, stores, [store.counts for store in stores], importance, context)
    for layer, store in enumerate(stores):
        shrink(layer, store, config, sequence, allocation, ranked[layer])
    return allocation


def gather_importance(
    stores: List[DenseStore],
    config: CompressionConfig,
    sequence: Sequence,
    statistics: List[dict[str, Tensor]],
    ranked: List[Ranked],
) -> tuple[Tensor, AllocationContext]:
    """Head-mean importance of every layer on one device, padded to the longest layer, with what belongs to it."""
    slots, device = max(store.length for store in stores), stores[-1].device
    rows = []
    for store, (held, score) in zip(stores, ranked, strict=True):
        if score is None:
            score = torch.zeros(store.batch, 1, store.length, device=store.device)
        elif held.shape[1] > 1:
            score = _rank_by_rank(score, held, sequence.images_at(held))
        rows.append(F.pad(score.mean(1), (0, slots - store.length)).to(device))
    columns = [F.pad(held[:, :1], (0, slots - held.shape[2]), value=-1).to(device) for held, _ in ranked]
    images = [sequence.images_at(column) for column in columns]
    protected = [sequence.protected(column, *protection(config)) for column in columns]
    context = AllocationContext(
        valid=torch.cat(columns, 1).transpose(0, 1) >= 0,
        is_image=None if sequence.is_image is None else torch.cat(images, 1).transpose(0, 1),  # type: ignore[arg-type]
        statistics={
            name: torch.stack([known[name].to(device) for known in statistics]) for name in config.allocator.needs
        },
        protected=torch.cat(protected, 1).transpose(0, 1),
    )
    return torch.stack(rows), context


def _rank_by_rank(score: Tensor, columns: Tensor, images: Tensor | None) -> Tensor:
    """Mean importance over heads that hold different tokens, where the best of each head count as one token, and so on.

    Image tokens are ranked apart from text. The mean of a rank stands where the first head has the token of that rank.
    """
    kind = (columns < 0).long() * 2 - (0 if images is None else images.long())
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))
    ranked = score.gather(-1, order).mean(1, keepdim=True)
    return torch.zeros_like(ranked).scatter_(-1, order[:, :1], ranked)


def every_head(layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence) -> Ranked:
    """Columns and importance of a layer's slots over all of its heads, those that other processes hold included."""
    importance = importance_of(layer, store, config, sequence)
    return every_column(store), None if importance is None else store.heads.gather(importance)


def every_column(store: DenseStore) -> Tensor:
    """Columns of a layer's slots over all of its heads; one set where they hold the same tokens."""
    return store.heads.gather(store.columns()) if store.heads_part else store.columns()


def importance_of(layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence) -> Tensor | None:
    """Importance of every slot of a layer; slots without a score rank with the highest, empty ones are zero."""
    columns, scores = store.columns(), store.used_scores()
    if config.scorer is None or scores is None or not store.length:
        return None
    importance = scored_importance(layer, scores, columns, config.scorer, sequence)
    if importance.isinf().any():
        raise PolicyError(f"scorer {config.scorer.name}: layer {layer}: importance must be finite, got an infinity")
    highest = importance.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return torch.where(importance.isnan(), highest, importance).masked_fill(columns < 0, 0.0)


def scored_importance(layer: int, scores: Tensor, columns: Tensor, scorer: Scorer, sequence: Sequence) -> Tensor:
    """Importance of every slot of a layer, NaN where it has no score."""
    return scorer.importance(scores, sequence.queries_on(columns, last=not scorer.accumulates, layer=layer))


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


def shrink(
    layer: int,
    store: DenseStore,
    config: CompressionConfig,
    sequence: Sequence,
    allocation: Allocation,
    ranked: Ranked | None = None,
) -> None:
    """Selects the slots of one layer that stay, and gives the rest back.

    Every process decides for all heads of the layer, and keeps what that says of its own.
    """
    budget = allocation.budgets[layer]
    if config.evictor is None or budget == store.counts:
        return
    columns, importance = ranked or every_head(layer, store, config, sequence)
    images = allocation.image_budgets
    context = SelectionContext(
        budget=torch.tensor(budget, device=columns.device),
        valid=columns >= 0,
        protected=sequence.protected(columns, *protection(config)),
        columns=columns,
        importance=importance,
        is_image=sequence.images_at(columns),
        image_budget=None if images is None else torch.tensor(images[layer], device=columns.device),
    )
    mask = config.evictor.select(context)
    _check_selection(f"evictor {config.evictor.name}: layer {layer}", mask, context)
    store.heads_part = store.heads_part or mask.shape[1] > 1
    mask, columns = store.heads.own(mask), store.columns()
    if config.merger is not None:
        most = max(budget), max(held - kept for held, kept in zip(store.counts, budget, strict=True))
        importance = None if importance is None else store.heads.own(importance)
        dropped = Dropped(columns, mask, (columns >= 0) & ~mask, importance, *most)
        merge(layer, store, config, sequence, dropped, decoding=False)
    store.keep(mask, budget, room=0 if config.evictor.frees == "nothing" else 1)


@dataclass
class Dropped:
    """The slots of a layer that are about to go, all of them as they were before.

    Attributes:
        columns: column of each slot's token, -1 where the slot is empty.
        kept: slots that stay.
        evicted: slots that go.
        importance: importance of each slot, NaN where it has no score.
        most_kept: at least the number of slots that stay in any row.
        most_evicted: at least the number of slots that go in any row.
    """

    columns: Tensor
    kept: Tensor
    evicted: Tensor
    importance: Tensor | None
    most_kept: int
    most_evicted: int


def merge(
    layer: int, store: DenseStore, config: CompressionConfig, sequence: Sequence, dropped: Dropped, decoding: bool
) -> None:
    """Lets the kept slots of a layer take up the evicted ones, whose keys and values are still there."""
    assert config.merger is not None
    keys, values = store.slots()
    every_head = (keys.shape[0], keys.shape[1], -1)
    index = sequence.index_of(dropped.columns).long().masked_fill(dropped.columns < 0, -1)
    images = sequence.images_at(dropped.columns)
    kept = dropped.kept.expand(every_head)
    if store.packed:  # what is quantized takes up nothing any more
        kept = kept.clone()
        kept[..., : store.packed] = False
    context = MergeContext(
        layer=layer,
        keys=keys,
        values=values,
        kept=kept,
        evicted=dropped.evicted.expand(every_head),
        index=index.expand(every_head),
        importance=dropped.importance,
        is_image=None if images is None else images.expand(every_head),
        most_kept=dropped.most_kept,
        most_evicted=dropped.most_evicted,
        decoding=decoding,
        state=store.merger_state,
        first_head=store.heads.first(keys.shape[1]),
    )
    merged = config.merger.merge(context)
    label = f"merger {config.merger.name}: layer {layer}"
    for name, given, came in (("keys", keys, merged.keys), ("values", values, merged.values)):
        if came.shape != given.shape or came.dtype != given.dtype:
            raise PolicyError(
                f"{label}: must return {name} as {given.dtype} {tuple(given.shape)}, got {came.dtype} "
                f"{tuple(came.shape)}"
            )
    store.replace(merged.keys, merged.values)
    store.merger_state = merged.state


def _check_selection(label: str, mask: Tensor, context: SelectionContext) -> None:
    sets = (1, context.valid.shape[1], 0 if context.importance is None else context.importance.shape[1])
    batch, _, slots = context.valid.shape
    if mask.dtype != torch.bool or mask.ndim != 3 or mask.shape[1] not in sets or mask.shape[::2] != (batch, slots):
        raise PolicyError(
            f"{label}: select must return bool [{batch}, 1 or kv_heads, {slots}], got {mask.dtype} {tuple(mask.shape)}"
        )
    wrong_count = mask.sum(-1) != context.budget[:, None]
    if wrong_count.any() or (mask & ~context.valid).any():
        raise PolicyError(
            f"{label}: select must mark as many slots as the budget ({context.budget.tolist()} per row), none of them "
            f"empty; got {mask.sum(-1).tolist()}"
        )


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
