"""Which slots of a layer stay, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.allocation import Allocation, protection
from kvcompress.cache.counts import stacked
from kvcompress.cache.merging import merge_evicted
from kvcompress.cache.ranking import Ranking, padded, ranking_of
from kvcompress.cache.step import TOGETHER, Prefill
from kvcompress.errors import PolicyError
from kvcompress.kernels import sent
from kvcompress.policies.base import Evictor
from kvcompress.policies.context import SelectionContext
from kvcompress.policies.faults import policy_errors

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer


def compress(
    layers: List[CompressedLayer], step: Prefill, allocation: Allocation, ranking: Ranking | None = None
) -> None:
    """Selects the slots that stay in some layers, merges the others into them, and gives those back.

    Args:
        layers: layers that are to be compressed at once.
        step: the step in progress.
        allocation: the budgets.
        ranking: what `ranking_of` says of these layers, if known.

    Raises:
        PolicyError: if the evictor's answer has the wrong shape or dtype; what else is wrong with it is noted.
    """
    numbers, heads = [layer.number for layer in layers], layers[0].heads
    budgets = allocation.own(heads).budgets[numbers]
    changed, batch = (budgets != stacked([layer.held for layer in layers])).any((1, 2)), budgets.shape[1]
    if allocation.sets > 1:  # each process looks at heads of its own, but all of them have to ask the others
        changed = heads.mean(torch.as_tensor(changed, dtype=torch.float64)).numpy() > 0
    if changed.any():
        ranking = ranking or ranking_of(layers, layers[0].config, step)
        whole = _selected(layers, step, allocation, ranking)
        mask = heads.own(whole)
        rooms = [int((budget + step.room[layer.number]).max()) for budget, layer in zip(budgets, layers, strict=True)]
        order = order_of(mask, ranking.index, max(rooms), ordered=True)
        if layers[0].config.merger is not None:
            importance = None if ranking.importance is None else heads.own(ranking.importance)
            merge_evicted(layers, changed.nonzero()[0].tolist(), mask, budgets, importance)
    for at, layer in enumerate(layers):
        room, rows = step.room[layer.number], slice(at * batch, (at + 1) * batch)
        if changed[at]:
            assert layer.index is not None
            layer.heads_part = layer.heads_part or whole.shape[1] > 1
            layer.uneven = allocation.sets > 1
            kept = mask[rows, :, : layer.index.shape[2]].to(layer.index.device)
            layer.take(kept, order[rows, :, : rooms[at]].to(kept.device), budgets[at], room)
        else:
            layer.close_ranks(room)
        layer.pack()


def compress_soon(layer: CompressedLayer, step: Prefill) -> None:
    """Compresses layers that ran, once they hold much together: of short ones, a few operations serve many."""
    if step.waiting and not _alike(step.waiting[0], layer):
        compress_waiting(step)
    step.waiting.append(layer)
    if sum(one.store.nbytes for one in (*step.waiting, layer)) > TOGETHER:  # with another one like it
        compress_waiting(step)


def compress_waiting(step: Prefill) -> None:
    """Compresses the layers that `compress_soon` let wait."""
    assert step.local is not None
    layers, step.waiting = step.waiting, []
    if layers:
        compress(layers, step, step.local())


def _alike(one: CompressedLayer, other: CompressedLayer) -> bool:
    """Whether two layers can be ranked in one tensor."""
    return (one.device, one.kv_heads) == (other.device, other.kv_heads)


def _value_norms(layers: List[CompressedLayer], ranking: Ranking) -> Tensor:
    """Norms of the values after each layer's output projection, over all heads, laid out as the ranking."""
    slots, device = ranking.index.shape[2], ranking.index.device
    norms = torch.cat([padded(layer.value_norms(), slots, 0.0).to(device) for layer in layers])
    return layers[0].heads.gather(norms)


def _selected(layers: List[CompressedLayer], step: Prefill, allocation: Allocation, ranking: Ranking) -> Tensor:
    """Which slots stay, `[layers * batch, sets, slots]`, over all heads; what may be wrong with the answer is noted.

    Raises:
        PolicyError: if the answer has the wrong shape or dtype.
    """
    numbers, evictor = [layer.number for layer in layers], layers[0].config.evictor
    assert evictor is not None
    sets = allocation.sets
    context = SelectionContext(
        budget=sent(allocation.budgets[numbers].reshape(-1), ranking.index.device),
        valid=_by_head(ranking.valid, sets),
        protected=_by_head(ranking.protected, sets),
        index=_by_head(ranking.index, sets),
        importance=None if ranking.importance is None else _by_head(ranking.importance, sets),
        problems=step.problems,
        value_norms=_by_head(_value_norms(layers, ranking), sets) if evictor.reads_value_norms else None,
    )
    allowed = (1, context.valid.shape[1], 0 if context.importance is None else context.importance.shape[1])
    rows, _, slots = context.valid.shape
    number = numbers[0] if len(numbers) == 1 else None
    with policy_errors(evictor, number):
        mask = evictor.select(context)
        fits = mask.dtype == torch.bool and mask.ndim == 3
    if not fits or mask.shape[1] not in allowed or mask.shape[::2] != (rows, slots):
        label = f"evictor {evictor.name}" if number is None else f"evictor {evictor.name}: layer {number}"
        raise PolicyError(
            f"{label}: select must return bool [{rows}, 1 or kv_heads, {slots}], got {mask.dtype} {tuple(mask.shape)}"
        )
    wrong = mask.sum(-1) != context.budget[:, None]
    if any((layer.held != slots).any() for layer in layers):
        wrong = wrong | (mask > context.valid).any(-1)
    step.problems.note(lambda: _selection_message(evictor, numbers, mask, context), wrong.any())
    return mask if sets == 1 else mask.view(-1, sets, slots)


def _by_head(tensor: Tensor, sets: int) -> Tensor:
    """Heads that hold as many slots as they like as rows of their own, `[rows * sets, 1, slots]`."""
    return tensor if sets == 1 else tensor.expand(-1, sets, -1).reshape(-1, 1, tensor.shape[2])


def _selection_message(evictor: Evictor, layers: List[int], mask: Tensor, context: SelectionContext) -> str:
    """What is wrong with an evictor's answer, once it is known that something is."""
    counts, budgets = mask.sum(-1).view(len(layers), -1, mask.shape[1]), context.budget.view(len(layers), -1)
    empty = (mask & ~context.valid).flatten(1).any(1).view(len(layers), -1)
    at = int(((counts != budgets[..., None]).any(-1) | empty).any(1).long().argmax())
    return (
        f"evictor {evictor.name}: layer {layers[at]}: select must mark as many slots as the budget "
        f"({budgets[at].tolist()} per row), none of them empty; got {counts[at].tolist()}"
    )


def pin(layers: List[CompressedLayer]) -> None:
    """Decides which tokens decode steps never evict by age: sinks, those to come too, and what an evictor pins."""
    evictor = layers[0].config.evictor
    if evictor is None or evictor.frees != "oldest":
        return
    sequence, (sinks, recents) = layers[0].sequence, protection(layers[0].config)
    first = sequence.first_given([layer.number for layer in layers], sinks)
    kept = stacked([layer.held for layer in layers])
    first = first[..., None] + 0 * kept
    with policy_errors(evictor):
        pinned = evictor.pinned(torch.as_tensor(kept.reshape(-1)), torch.as_tensor(first.reshape(-1)), recents).numpy()
    to_come = np.maximum(0, sinks - sequence.row_seen)[:, None]
    for layer, own in zip(layers, np.maximum(pinned.reshape(first.shape), first) + to_come, strict=True):
        layer.pinned = own


def order_of(mask: Tensor, index: Tensor, kept: int, ordered: bool) -> Tensor:
    """Slots that stay, in the order of their tokens; where a row has fewer than `kept`, any slot in their place.

    Args:
        mask: slots that stay, `[batch, sets, slots]`.
        index: token index of every slot, of as many sets or one.
        kept: slots that stay in the row that keeps most, or more: any slots come after them.
        ordered: whether slots lie in the order of their tokens, so that no sort is needed.
    """
    if not ordered:
        latest = torch.iinfo(index.dtype).max
        return torch.where(mask, index, latest).argsort(dim=-1)[..., :kept]
    place = mask.cumsum(-1).mul_(mask).clamp_(max=kept)  # from 1 on; too many marked is told later
    slots = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    order = torch.zeros((*mask.shape[:2], kept + 1), dtype=torch.int64, device=mask.device)
    return order.scatter_(-1, place, slots)[..., 1:]
