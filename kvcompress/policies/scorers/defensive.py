"""DefensiveKV: what any of the last queries looks at, rather than what they look at on average."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.projection import projected_norm
from kvcompress.policies.registry import SCORERS
from kvcompress.policies.scorers.snapkv import SnapKV

_LEAST = torch.finfo(torch.float32).tiny


@SCORERS.register("defensive")
class Defensive(SnapKV):
    """The most attention that any of the last queries gives, at least the mean over tokens; their tokens are kept.

    Source: DefensiveKV (arXiv 2510.13334; its released code for the constants, the pooling and the norms).

    The attention that a query of a head gives to the tokens before the window is pooled along positions and brought to
    its former sum. A token's score is the highest over the queries and the heads of a group, but no lower than the mean
    of these over the tokens before the window; then it is multiplied by the L1 norm of its value after the output
    projection (mean over the group) as a share of the same over all heads of the layer. With an allocator that looks at
    one layer at a time this is the paper's plain form; with one that compares layers, its layer-wise form.

    *Deviates:* the code first keeps the tokens that hold 90 % of the window's attention (but for the window's own
    share); here all are ranked by the score, and the evictor `critical` has a first stage of its own. After an
    eviction, neighbours are the tokens that are left. Every later turn votes anew, and its scores replace earlier ones.

    Args:
        window: number of last queries (tokens) that vote, and of last tokens that are protected.
        kernel: width of the pooling in slots, odd; 1 for none.
        pool: "avg", where slots beyond the end count as zero, or "max".
        projected: whether the norm of the value counts; without it, nothing is read of the model's weights.
    """

    projected: bool = True

    def score(self, layer: LayerContext) -> Importance:
        """Costs window x heads x tokens numbers in float32."""
        probability = layer.attention_probabilities(self.window)
        before, order = layer.keys.shape[2] - self.window, layer.in_order()
        (batch, *_, tokens), kv_heads = probability.shape, layer.keys.shape[1]
        probability = probability.view(batch, kv_heads, -1, tokens)  # the queries of each group
        if before > 0:
            order = None if order is None else order.expand(-1, kv_heads, -1)
            score = self._guarded(probability, layer, order, before)
        else:
            score = probability.amax(2)
        return score * self._share(layer) if self.projected else score

    def _guarded(
        self,
        probability: Float[Tensor, "batch kv_heads queries tokens"],
        layer: LayerContext,
        order: Tensor | None,
        before: int,
    ) -> Importance:
        """Pools, takes the highest, and raises what is below the mean; slots of the window have their own highest."""
        valid = torch.ones(1, 1, 1, device=probability.device, dtype=torch.bool) if layer.valid is None else layer.valid
        if order is not None:
            probability = probability.gather(-1, order.unsqueeze(2).expand(probability.shape))
            valid = valid.expand(order.shape).gather(-1, order)
        valid = valid[..., :before]
        earlier = probability[..., :before]
        pooled = self._pooled(earlier.flatten(1, 2), before).view(earlier.shape) * valid.unsqueeze(2)
        pooled *= earlier.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=_LEAST)
        highest = pooled.amax(2)
        count = valid.expand(highest.shape).sum(-1, keepdim=True).clamp(min=1)
        highest = torch.maximum(highest, highest.sum(-1, keepdim=True) / count)
        score = torch.cat([highest, probability[..., before:].amax(2)], dim=-1)
        return score if order is None else torch.empty_like(score).scatter_(-1, order, score)

    def _share(self, layer: LayerContext) -> Importance:
        """Norm of each slot's value after the projection, as a share of the same over all heads."""
        asks = f"scorer {self.name}: layer {layer.layer}: {{}}, or choose projected=False or another scorer"
        norm = projected_norm(layer.values, layer.weights, 1, asks)
        heads = norm.shape[1] * layer.heads.size
        of_heads = norm.mean(1, keepdim=True)
        if layer.heads_part:  # slots are not the same token in all heads, so a row's mean has to do
            held = layer.held.expand(-1, norm.shape[1], -1).clamp(min=1)
            of_heads = (layer.at_tokens(norm).sum(-1, keepdim=True) / held).mean(1, keepdim=True)
        share = norm / (layer.heads.mean(of_heads) * heads).clamp(min=_LEAST)
        return layer.at_tokens(share)
