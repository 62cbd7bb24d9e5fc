"""Compactor: keys that no other keys can stand for, and what attention within the text itself looks at."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, Keys, LayerContext
from kvcompress.policies.registry import SCORERS

_RIDGE = 1e-2  # of the released code, added to the diagonal
_LEAST_DEVIATION = 1e-6
_CHUNKS = 16  # attended at once


@SCORERS.register("leverage")
class Leverage(Scorer):
    """Statistical leverage of a slot's key among the keys of its head, plus attention in chunks that ignores order.

    Source: Compactor (arXiv 2507.08143; its code in kvpress for the constants). Needs no question: it compresses a
    document before it is known what will be asked.

    With X the keys of a head before rotation, less their mean, a key x has the leverage x' (X'X + 0.01)^-1 x. The
    attention is a softmax over the keys of a query's chunk, those after it included, of the logits without their
    factor; what a key gets is summed over queries, averaged over the group, multiplied by the norm of its value, and
    averaged with its two neighbours. Both are standardised over the heads and tokens of the layer, and added.

    *Deviates:* leverage is exact, where the paper sketches keys in fewer dimensions. Chunks are counted back from the
    last token. All tokens count, where the code leaves the first 8 and the last 4 out, which it always keeps: give
    them as the budget's sinks and recents. The code blends by the compression ratio unless told otherwise. Tokens of
    earlier forwards, whose queries are gone, have average attention. Where the model rotates nothing, or its
    frequencies are unknown, keys are taken as they are.

    Args:
        blend: factor on the leverage.
        chunk: tokens that attend to each other.
    """

    one_axis: ClassVar[bool] = True

    blend: float = Field(default=0.35, ge=0, allow_inf_nan=False)
    chunk: int = Field(default=256, ge=1)

    def score(self, layer: LayerContext) -> Importance:
        """Needs no attention of the layer; costs tokens x (head_dim^2 + chunk x head_dim), the first in float64."""
        queries = layer.query.shape[2]
        new = slice(layer.keys.shape[2] - queries, None)
        valid = None if layer.valid is None else layer.valid[:, :1, new]  # of all heads
        attention = self._attention(layer, new) * torch.linalg.vector_norm(layer.values[:, :, new].float(), dim=-1)
        if valid is not None:
            attention = attention * valid
        attention = F.pad(
            _standardised(F.avg_pool1d(attention, 3, 1, 1), valid, layer), (layer.keys.shape[2] - queries, 0)
        )
        leverage = _standardised(_leverage(_before_rotation(layer), layer.valid), layer.valid, layer)
        return layer.at_tokens((self.blend * leverage + attention).float())

    def _attention(self, layer: LayerContext, new: slice) -> Float[Tensor, "batch kv_heads queries"]:
        """Attention that each token of this forward gets within its chunk, mean over its group of heads."""
        (batch, heads, count, dim), kv_heads = layer.query.shape, layer.keys.shape[1]
        size = min(self.chunk, count)
        pad = (0, 0, -count % size, 0)  # before the first, so that chunks end with the last
        query = F.pad(layer.query, pad).view(batch, kv_heads, heads // kv_heads, -1, size, dim)
        keys = F.pad(layer.keys[:, :, new], pad).view(batch, kv_heads, -1, size, dim)
        held = layer.query.new_ones(1, 1, count, dtype=torch.bool) if layer.valid is None else layer.valid[:, :1, new]
        held = F.pad(held, pad[2:]).view(held.shape[0], 1, -1, size)
        parts = []
        for first in range(0, keys.shape[2], _CHUNKS):
            block = slice(first, first + _CHUNKS)
            transposed, own = keys[:, :, block].float().transpose(-2, -1), held[:, :, block]
            got = torch.zeros(*transposed.shape[:3], size, device=keys.device, dtype=torch.float32)
            for head in range(query.shape[2]):
                logits = query[:, :, head, block].float() @ transposed
                logits = logits.masked_fill(~own.unsqueeze(-2), torch.finfo(torch.float32).min)
                got += (logits.softmax(-1) * own.unsqueeze(-1)).sum(-2)
            parts.append(got)
        return torch.cat(parts, 2).flatten(2)[..., -count:] / query.shape[2]


def _before_rotation(layer: LayerContext) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """Keys turned back by their positions, in float64."""
    keys, frequencies = layer.keys.double(), layer.weights.inverse_frequencies
    if frequencies is None:
        return keys
    half = frequencies.shape[0]
    angles = layer.index.clamp(min=0).unsqueeze(-1) * frequencies.to(keys.device, torch.float64)
    first, second, rest = keys.tensor_split((half, 2 * half), dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)


def _leverage(keys: Keys, valid: Tensor | None) -> Importance:
    """X' (X'X + ridge)^-1 x of each key, less the mean."""
    if valid is None:
        centred = keys - keys.mean(2, keepdim=True)
    else:
        held = valid.unsqueeze(-1)
        count = held.sum(2, keepdim=True).clamp(min=1)
        centred = (keys - (keys * held).sum(2, keepdim=True) / count) * held
    gram = centred.transpose(2, 3) @ centred
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    root = torch.linalg.cholesky_ex(gram).L  # which asks the device nothing
    turned: Tensor = torch.linalg.solve_triangular(root, centred.transpose(2, 3), upper=False)
    return turned.square().sum(2)


def _standardised(score: Importance, valid: Tensor | None, layer: LayerContext) -> Importance:
    """With the mean 0 and the deviation 1 over all heads of the layer and the slots of a row that hold a token."""
    score = score.double()
    held = torch.ones_like(score[:, :1]) if valid is None else valid.double()
    count = layer.heads.mean(held.sum(-1, keepdim=True).mean(1, keepdim=True)).clamp(min=1)

    def mean(of: Tensor) -> Tensor:
        return layer.heads.mean((of * held).sum(-1, keepdim=True).mean(1, keepdim=True)) / count

    centred = score - mean(score)
    return centred / mean(centred.square()).sqrt().clamp(min=_LEAST_DEVIATION)
