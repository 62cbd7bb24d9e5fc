"""Expected Attention: what queries that are yet to come will look at."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.projection import slot_norm
from kvcompress.policies.registry import SCORERS

_LEAST = torch.finfo(torch.float32).min  # a logit that gets nothing


@SCORERS.register("expected_attention")
class ExpectedAttention(Scorer):
    """Attention that Gaussian queries at the next positions are expected to give a slot, times its value's norm.

    Source: Expected Attention (arXiv 2510.00636); its released code (kvpress) for the sinks.

    Queries before rotation are taken as Gaussian with the mean and covariance of this forward's, and the rotation as
    its mean over the next `future` positions. A key k then gets exp(mean k s + k' covariance k s^2 / 2), where s is
    the factor on the logits, as a share of the same of all keys; the heads of a group are averaged. A row's first
    tokens, the sinks, have no part in the statistics and the shares, and score as much as the highest of their head.

    *Deviates:* the paper's constant added to the shares is 0 unless `epsilon` is set, as in the released code.
    Statistics are of the queries themselves; the released code takes them from hidden states, without the bias of the
    query projection. Where a forward brings nothing but sinks, or nothing else is held, they count like all tokens.
    Where the model rotates nothing, or its frequencies are unknown, queries are taken as they are; where it caps its
    logits or adds attention sinks, shares are taken without.

    Args:
        future: number of next positions (tokens) that the rotation is averaged over.
        sink: number of a row's first tokens that are sinks; 0 for none.
        epsilon: added to every share before it is multiplied by the value's norm.
    """

    mass: ClassVar[bool] = True
    one_axis: ClassVar[bool] = True

    future: int = Field(default=512, ge=1)
    sink: int = Field(default=4, ge=0)
    epsilon: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def score(self, layer: LayerContext) -> Importance:
        """Reads no attention probabilities; costs tokens x head_dim^2, in float32."""
        (batch, heads, count, width), kv_heads = layer.query.shape, layer.keys.shape[1]
        query = self._moved(layer).view(batch, kv_heads, heads // kv_heads, count, width)
        asks = _unless_none(layer.index[:, :1, -count:] >= self.sink, layer.index[:, :1, -count:] >= 0)
        asks = asks[:, :, None, :, None].float()
        number = asks.sum(3).clamp(min=1)
        mean = (query.transpose(3, 4) @ asks).squeeze(-1) / number
        query -= mean.unsqueeze(3)
        query *= asks
        half_covariance = query.transpose(3, 4) @ query * (layer.scaling**2 / 2) / number.unsqueeze(-1)
        counts = _unless_none(layer.index >= self.sink, layer.index >= 0)
        keys, share = layer.keys.float(), torch.zeros((), device=query.device, dtype=torch.float32)
        for head in range(query.shape[2]):
            form = (keys @ half_covariance[:, :, head]).add_(mean[:, :, head, None] * layer.scaling)
            share = share + torch.where(counts, torch.linalg.vecdot(form, keys), _LEAST).softmax(-1)
        norm = slot_norm(layer.values)
        score = ((share / query.shape[2] + self.epsilon) * norm).masked_fill(~counts, 0.0)
        return layer.at_tokens(torch.where(counts, score, score.amax(-1, keepdim=True)))

    def _moved(self, layer: LayerContext) -> Float[Tensor, "batch heads queries head_dim"]:
        """Each query of this forward as if it stood, on average, at the next positions; a copy in float32.

        To turn a query back by its position, and on by the mean over the next ones, is to multiply each pair of its
        dimensions, as a complex number, by one factor that depends on the distance alone.
        """
        query, frequencies = layer.query.float(), layer.weights.inverse_frequencies
        if frequencies is None:
            return query.clone() if query is layer.query else query
        frequencies, half = frequencies.to(query.device, torch.float32), frequencies.shape[0]
        steps = torch.arange(1, self.future + 1, device=query.device)
        ahead = torch.exp(1j * steps[:, None] * frequencies).mean(0)
        own = layer.index[:, :1, -query.shape[2] :]
        behind = (own[..., -1:] - own).unsqueeze(-1) * frequencies
        factor = torch.polar(torch.ones_like(behind), behind) * ahead
        first, second, rest = query.tensor_split((half, 2 * half), dim=-1)
        return torch.cat(
            [first * factor.real - second * factor.imag, first * factor.imag + second * factor.real, rest], dim=-1
        )


def _unless_none(
    marked: Bool[Tensor, "*rows tokens"], valid: Bool[Tensor, "*rows tokens"]
) -> Bool[Tensor, "*rows tokens"]:
    """The tokens that are marked, or all of them in rows where none is."""
    return marked | (valid & ~marked.any(-1, keepdim=True))
