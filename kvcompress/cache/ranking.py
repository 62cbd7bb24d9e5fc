"""How the slots of layers rank, as policies see them."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.allocation import protection
from kvcompress.cache.sequence import Sequence
from kvcompress.cache.step import Prefill
from kvcompress.config import CompressionConfig
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import AllocationContext
from kvcompress.policies.faults import policy_errors

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer

Ranked: TypeAlias = tuple[Tensor, Tensor | None]  # token index and importance of a layer's slots, over all heads


def importance_of(
    scorer: Scorer,
    scores: Tensor,
    index: Tensor,
    sequence: Sequence,
    layer: int,
    full: bool = False,
    step: Prefill | None = None,
) -> Tensor:
    """Importance of every slot of a layer; NaN where a token came after the last step that scored, 0 in empty slots.

    Layers that hold the same tokens share what a step in progress found for one of them.
    """
    importance = scores
    if type(scorer).importance is not Scorer.importance:

        def queries() -> Tensor:
            return sequence.queries_on(index, last=scorer.over_forwards == "last", layer=layer)

        asked = queries() if step is None else step.once(f"queries {sequence.stage_of(layer)}", index, queries)
        with policy_errors(scorer, layer):
            importance = scorer.importance(scores, asked)
    if (sequence.scored.end < sequence.row_seen).any():
        importance = importance.masked_fill(sequence.unscored(index), torch.nan)
    return importance if full else importance.masked_fill(index < 0, 0.0)


def without_unknown(importance: Tensor) -> Tensor:
    """Importance in which slots without a score rank with the highest."""
    if not importance.shape[-1]:
        return importance  # of no slots none is the highest
    unknown = importance.isnan()
    highest = importance.masked_fill(unknown, -torch.inf).amax(-1, keepdim=True)
    return torch.where(unknown, highest.masked_fill(highest == -torch.inf, 0.0), importance)


@dataclass(frozen=True)
class Ranking:
    """The slots of some layers as policies see them, the rows of one layer after those of the other.

    Attributes:
        layers: how many layers.
        index: token index of each slot, `[layers * batch, sets, slots]`; layers that hold less than others have empty
            slots at their end.
        importance: importance of each slot over all heads, `[layers * batch, kv_heads, slots]`; None without a scorer.
        valid: which slots hold a token.
        protected: which slots must stay.
    """

    layers: int
    index: Tensor
    importance: Tensor | None
    valid: Tensor
    protected: Tensor

    def of_heads(self, heads: int) -> tuple[Tensor, AllocationContext]:
        """Importance in every head, `[layers, batch, kv_heads, slots]`, with what else allocators read of slots."""
        rows, _, slots = self.index.shape
        shape = (self.layers, rows // self.layers, heads, slots)
        valid, protected = (mask.expand(-1, heads, -1).view(shape) for mask in (self.valid, self.protected))
        importance = self.importance
        if importance is None:
            importance = torch.zeros((), dtype=torch.float32, device=self.index.device).expand(rows, heads, slots)
        return importance.reshape(shape), AllocationContext(valid=valid, protected=protected)

    def means(self) -> tuple[Tensor, AllocationContext]:
        """Head-mean importance of every layer, `[layers, batch, slots]`, with what else allocators read of slots."""
        shape = (self.layers, -1, self.index.shape[2])
        valid, protected = (mask[:, 0].view(shape) for mask in (self.valid, self.protected))
        if self.importance is None:
            mean = torch.zeros(valid.shape, dtype=torch.float32, device=self.index.device)
        else:
            importance = self.importance
            if self.index.shape[1] > 1:
                alike = (self.index == self.index[:, :1]).flatten(1).all(1)[:, None, None]  # as rows without others are
                importance = torch.where(alike, importance, _rank_by_rank(importance, self.index))
            mean = importance.mean(1).view(shape)
        return mean, AllocationContext(valid=valid, protected=protected)


def ranking_of(
    layers: List[CompressedLayer], config: CompressionConfig, step: Prefill, ranked: List[Ranked] | None = None
) -> Ranking:
    """What policies see of the slots of some layers, on the device of the last.

    Args:
        layers: the layers.
        config: says what is protected.
        step: the step in progress, which knows what layers share.
        ranked: what `ranked` of each says, if known.
    """
    sequence, ranked = layers[0].sequence, [layer.ranked(step) for layer in layers] if ranked is None else ranked
    indices, scores = [index for index, _ in ranked], [score for _, score in ranked]
    index, sets = indices[-1], max(other.shape[1] for other in indices)
    slots = max(1, *(other.shape[2] for other in indices))  # policies see an empty slot where layers hold none
    if not index.shape[2]:
        index = indices[-1] = padded(index, 1, -1)
    if len(layers) > 1:
        if all(other is index for other in indices):  # as it is until layers have lost different tokens
            index = index.repeat(len(layers), 1, 1)
        else:
            device = index.device
            index = torch.cat([padded(other.to(device), slots, -1).expand(-1, sets, -1) for other in indices])
    known = [padded(score.to(index.device), slots, 0.0) for score in scores if score is not None]
    return Ranking(
        layers=len(layers),
        index=index,
        importance=None if not known else known[0] if len(known) == 1 else torch.cat(known),
        valid=step.once("valid", index, lambda: index >= 0),
        protected=step.once("protected", index, lambda: sequence.protected(index, *protection(config))),
    )


def padded(tensor: Tensor, slots: int, fill: float) -> Tensor:
    """A tensor with so many slots in its last axis."""
    return tensor if tensor.shape[-1] == slots else F.pad(tensor, (0, slots - tensor.shape[-1]), value=fill)


def _rank_by_rank(score: Tensor, index: Tensor) -> Tensor:
    """Mean importance over heads that hold different tokens, where the best of each head count as one token, and so on.

    The mean of a rank stands where the first head has the token of that rank.
    """
    order = score.masked_fill(index < 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranked = score.gather(-1, order).mean(1, keepdim=True)
    return torch.zeros_like(ranked).scatter_(-1, order[:, :1], ranked)
