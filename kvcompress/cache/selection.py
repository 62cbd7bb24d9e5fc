"""Which slots of a layer stay, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache.allocation import Allocation, protection
from kvcompress.cache.importance import Ranked, every_head
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.config import CompressionConfig
from kvcompress.errors import PolicyError
from kvcompress.policies.context import MergeContext, SelectionContext
from kvcompress.policies.faults import policy_errors


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
    with policy_errors(config.evictor, layer):
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
    label = f"merger {config.merger.name}: layer {layer}"
    with policy_errors(config.merger, layer):
        merged = config.merger.merge(context)
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
