"""What slots that stay take up of those that go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.selection import importance_of
from kvcompress.cache.slots import SlotTable
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.faults import policy_errors

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer


def merge_evicted(layer: CompressedLayer, kept: Tensor, budget: Counts, importance: Tensor | None) -> None:
    """Merges the slots of a layer that a selection gives up, in new buffers.

    Args:
        layer: the layer.
        kept: slots that stay, `[batch, sets, slots]`.
        budget: how many stay in each row and set.
        importance: importance of every slot, or of more; None without a scorer.
    """
    assert layer.index is not None
    most = int(budget.max()), int((layer.held - budget).max())
    importance = None if importance is None else importance[..., : kept.shape[2]].to(kept.device)
    result = _merged(layer, kept, (layer.index >= 0) & ~kept, importance, most, decoding=False)
    layer.store.replace(result.keys, result.values)


def merge_freed(layer: CompressedLayer, table: SlotTable, in_place: bool) -> None:
    """Merges what a decode step freed in a layer into the slots that stay."""
    number, width, packed = layer.number, int(table.extent[layer.number].max()), layer.store.packed
    if not table.hole[number].any():
        return
    own, index = layer.index, table.index[number, :, :, :width]
    assert own is not None
    freed = torch.arange(width, device=index.device) == table.free[number].unsqueeze(-1)
    layer.index, layer.slots = torch.cat([own[..., :packed].expand(-1, index.shape[1], -1), index], 2), width
    freed = F.pad(freed, (packed, 0)) & (layer.index >= 0)
    importance, slots = layer.scores, packed + width
    if layer.config.scorer is not None and importance is not None:
        padded = F.pad(importance, (0, max(0, slots - importance.shape[2])))[..., :slots]
        importance = importance_of(layer.config.scorer, padded, layer.index, layer.sequence, number)
    kept = (layer.index >= 0) & ~freed
    result = _merged(layer, kept, freed, importance, (slots, 1), decoding=True)
    if in_place:
        layer.store.overwrite(result.keys, result.values)
    else:
        layer.store.replace(result.keys, result.values)
    layer.index = own


def _merged(
    layer: CompressedLayer,
    kept: Tensor,
    evicted: Tensor,
    importance: Tensor | None,
    most: tuple[int, int],
    decoding: bool,
) -> Merged:
    """What the merger makes of the kept slots and those that go, whose keys and values are still there."""
    merger, index = layer.config.merger, layer.index
    assert merger is not None and index is not None
    keys, values = layer.every_slot()
    every_head = (keys.shape[0], keys.shape[1], -1)
    images, kept = layer.sequence.images_at(index), kept.expand(every_head)
    if layer.store.packed:  # what is quantized takes up nothing any more
        kept = kept.clone()
        kept[..., : layer.store.packed] = False
    context = MergeContext(
        layer=layer.number,
        keys=keys,
        values=values,
        kept=kept,
        evicted=evicted.expand(every_head),
        index=index.long().expand(every_head),
        importance=importance,
        is_image=None if images is None else images.expand(every_head),
        most_kept=most[0],
        most_evicted=most[1],
        decoding=decoding,
        state=layer.merger_state,
        first_head=layer.heads.first(keys.shape[1]),
    )
    result = _answer(merger, context)
    layer.merger_state = result.state
    return result


def _answer(merger: Merger, context: MergeContext) -> Merged:
    """What a merger says of a layer.

    Raises:
        PolicyError: if keys or values come back in another shape or dtype.
    """
    with policy_errors(merger, context.layer):
        result = merger.merge(context)
        pairs = (("keys", context.keys, result.keys), ("values", context.values, result.values))
    for name, before, after in pairs:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise PolicyError(
                f"merger {merger.name}: layer {context.layer}: must return {name} as {before.dtype} "
                f"{tuple(before.shape)}, got {after.dtype} {tuple(after.shape)}"
            )
    return result
