"""What slots that stay take up of those that go."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.ranking import importance_of
from kvcompress.cache.slots import SlotTable
from kvcompress.cache.step import TOGETHER
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.faults import layers_told, policy_errors

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer


def merge_evicted(
    layers: List[CompressedLayer], chosen: List[int], kept: Tensor, budgets: Counts, importance: Tensor | None
) -> None:
    """Merges the slots that a selection gives up, in new buffers; layers that are alike and short are merged at once.

    Args:
        layers: the layers that were looked at.
        chosen: numbers of those that give up slots, among them.
        kept: slots that stay, `[layers * batch, sets, slots]`, the rows of one layer after those of the other.
        budgets: how many stay, `[layers, batch, sets]`.
        importance: importance of every slot, laid out as `kept`, in every head; None without a scorer.
    """
    batch = budgets.shape[1]
    for run in _runs(layers, chosen, budgets):
        own, rows = layers[run.start : run.stop], slice(run.start * batch, run.stop * batch)
        index = _index_of(own)
        slots = index.shape[2]
        stay = kept[rows, :, :slots].to(index.device)
        score = None if importance is None else importance[rows, :, :slots].to(index.device)
        most = int(budgets[run.start].max()), int((own[0].held - budgets[run.start]).max())
        result = _merged(own, index, stay, (index >= 0) & ~stay, score, most, decoding=False)
        for at, layer in enumerate(own):
            part = slice(at * batch, (at + 1) * batch)
            layer.store.replace(result.keys[part], result.values[part])


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
    result = _merged([layer], layer.index, kept, freed, importance, (slots, 1), decoding=True)
    if in_place:
        layer.store.overwrite(result.keys, result.values)
    else:
        layer.store.replace(result.keys, result.values)
    layer.index = own


def _runs(layers: List[CompressedLayer], chosen: List[int], budgets: Counts) -> Iterator[range]:
    """Layers that follow each other, hold as much and keep as much, and together no more than fits."""

    def like(numbered: tuple[int, int]) -> tuple[object, ...]:
        number, at = numbered
        layer, budget = layers[at], budgets[at]
        counts = layer.slots, layer.store.packed, int(budget.max()), int((layer.held - budget).max())
        return (at - number, layer.device, layer.kv_heads, layer.merger_state is None, *counts)

    for _, group in groupby(enumerate(chosen), like):
        run = [at for _, at in group]
        most = max(1, TOGETHER // max(1, layers[run[0]].store.nbytes))
        for first in range(0, len(run), most):
            part = run[first : first + most]
            yield range(part[0], part[-1] + 1)


def _index_of(layers: List[CompressedLayer]) -> Tensor:
    """Token index of each slot of some layers that hold as many, the rows of one layer after those of the other."""
    indices = [layer.index for layer in layers if layer.index is not None]
    if all(index is indices[0] for index in indices):  # as they are until layers have lost different tokens
        every_row = indices[0].expand(len(layers[0].held), -1, -1)
        return every_row if len(layers) == 1 else every_row.repeat(len(layers), 1, 1)
    sets = max(index.shape[1] for index in indices)
    return torch.cat([index.expand(-1, sets, -1) for index in indices])


def _merged(
    layers: List[CompressedLayer],
    index: Tensor,
    kept: Tensor,
    evicted: Tensor,
    importance: Tensor | None,
    most: tuple[int, int],
    decoding: bool,
) -> Merged:
    """What the merger makes of the kept slots and those that go, whose keys and values are still there."""
    first, every_slot = layers[0], zip(*(layer.every_slot() for layer in layers), strict=True)
    merger = first.config.merger
    assert merger is not None
    keys, values = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in every_slot)
    every_head = (keys.shape[0], keys.shape[1], -1)
    images, kept = first.sequence.images_at(index), kept.expand(every_head)
    if first.store.packed:  # what is quantized takes up nothing any more
        kept = kept.clone()
        kept[..., : first.store.packed] = False
    states = [layer.merger_state for layer in layers if layer.merger_state is not None]  # of all, or of none
    context = MergeContext(
        layers=tuple(layer.number for layer in layers),
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
        state=torch.cat(states) if states else None,
        first_head=first.heads.first(keys.shape[1]),
    )
    result = _answer(merger, context)
    if result.state is None or len(layers) == 1:
        parts = [result.state] * len(layers)
    else:
        parts = [part.clone() for part in result.state.chunk(len(layers))]
    for layer, part in zip(layers, parts, strict=True):
        layer.merger_state = part
    return result


def _answer(merger: Merger, context: MergeContext) -> Merged:
    """What a merger says of layers.

    Raises:
        PolicyError: if keys or values come back in another shape or dtype, or a state that is not of the rows.
    """
    with policy_errors(merger, context.layers):
        result = merger.merge(context)
        pairs = (("keys", context.keys, result.keys), ("values", context.values, result.values))
    for name, before, after in pairs:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise PolicyError(
                f"merger {merger.name}: {layers_told(context.layers)}: must return {name} as {before.dtype} "
                f"{tuple(before.shape)}, got {after.dtype} {tuple(after.shape)}"
            )
    rows, state = len(context.keys), result.state
    if state is not None and state.shape[:1] != (rows,):
        raise PolicyError(
            f"merger {merger.name}: {layers_told(context.layers)}: must return a state whose first axis is of the "
            f"{rows} rows that it was shown, got {tuple(state.shape)}"
        )
    return result
