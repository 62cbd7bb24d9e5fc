"""Expected Attention: what queries that are yet to come will look at."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("expected_attention")
class ExpectedAttention(Scorer):
    """Attention that Gaussian queries at the next positions are expected to give a slot, times its value's norm.

    Source: Expected Attention (arXiv 2510.00636).

    Queries before rotation are taken as Gaussian with the mean and covariance of this forward's, and the rotation as
    its mean over the next `future` positions. A key k then gets exp(mean k s + k' covariance k s^2 / 2), where s is
    the factor on the logits, as a share of the same of all keys; the heads of a group are averaged.

    *Deviates:* the paper's constant added to the shares is 0 unless `epsilon` is set, its sinks are left to the budget,
    and statistics are of the queries themselves, not of hidden states. Where the model rotates nothing, or its
    frequencies are unknown, queries are taken as they are.

    Args:
        future: number of next positions (tokens) that the rotation is averaged over.
        epsilon: added to every share before it is multiplied by the value's norm.
    """

    mass: ClassVar[bool] = True

    future: int = Field(default=512, ge=1)
    epsilon: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def score(self, layer: LayerContext) -> Importance:
        """Reads no attention probabilities; costs tokens x head_dim^2, in float32."""
        (batch, heads, count, width), kv_heads = layer.query.shape, layer.keys.shape[1]
        query = self._moved(layer).view(batch, kv_heads, heads // kv_heads, count, width)
        mean = query.mean(3)
        query -= mean.unsqueeze(3)
        half_covariance = query.transpose(3, 4) @ query * (layer.scaling**2 / 2 / count)
        keys, share = layer.keys.float(), torch.zeros((), dtype=torch.float32, device=query.device)
        for head in range(query.shape[2]):
            form = (keys @ half_covariance[:, :, head]).add_(mean[:, :, head, None] * layer.scaling)
            share = share + torch.linalg.vecdot(form, keys).softmax(-1)
        norm: Tensor = torch.linalg.vector_norm(layer.values, dim=-1, dtype=torch.float32)
        return (share / query.shape[2] + self.epsilon) * norm

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
