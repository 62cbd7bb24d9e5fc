"""Attention weighed by what a value adds to the output of its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS
from kvcompress.policies.scorers.attention import Attention


@SCORERS.register("value_aware")
class ValueAware(Attention):
    """Attention times the L2 norm of the slot's value after the output projection of each head.

    Source: CriticalKV (arXiv 2502.03805), whose bound on the change of a layer's output is made of both; LAVa
    (arXiv 2509.09754), likewise with the value's own norm.

    *Deviates:* CriticalKV takes the L1 norm and spends part of the budget on attention alone. Attention and norm are
    averaged over the heads of a group each, then multiplied. Where the projection's weight is missing or not stored as
    plain numbers, the value's own norm serves.

    Args:
        queries: which queries count: "all", "stride:n", "window:n" or "post_vision", as in `attention`.
        window: short for `queries="window:n"`.
        reduce: "sum" over the queries, or "mean" over those that saw the token.
        image_weight: factor on the scores of image tokens.
        text_weight: factor on the scores of all other tokens.
        seed: seed of the offset of "stride:n".
    """

    def score(self, layer: LayerContext) -> Importance:
        """Attention as in `attention`, times the mean norm; costs tokens x value_dim^2 more, in float32."""
        return super().score(layer) * _projected_norm(layer)


def _projected_norm(layer: LayerContext) -> Importance:
    """|W v| of each value, from the Gram matrix W'W of each head's part of the projection, mean over each group."""
    values, output, heads = layer.values.float(), layer.weights.output, layer.query.shape[1]
    kv_heads, width = values.shape[1], values.shape[3]
    if output is None or output.is_meta or not output.is_floating_point() or output.shape[1] != heads * width:
        own: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return own
    parts = output.to(values.device, torch.float32).view(-1, heads, width).transpose(0, 1)
    grams = (parts.transpose(1, 2) @ parts).view(kv_heads, heads // kv_heads, width, width)
    norm = torch.zeros(values.shape[:3], dtype=torch.float32, device=values.device)
    for head in range(grams.shape[1]):
        square = torch.linalg.vecdot(values @ grams[:, head], values)
        norm += square.clamp(min=0).sqrt()
    return norm / grams.shape[1]
