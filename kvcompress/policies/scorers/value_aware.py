"""Attention weighed by what a value adds to the output of its layer."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.projection import projected_norm, slot_norm
from kvcompress.policies.registry import SCORERS
from kvcompress.policies.scorers.attention import Attention


@SCORERS.register("value_aware")
class ValueAware(Attention):
    """Attention times a norm of the slot's value, as a rule after the output projection of each head.

    Source: CriticalKV (arXiv 2502.03805), whose bound on the change of a layer's output is made of both: its second
    stage is `norm="projected_l1"` with `epsilon=1e-4`, `queries="window:32"` and `reduce="mean"`. LAVa (arXiv
    2509.09754) multiplies by the largest L1 norm of the head's values instead, which weighs heads, not tokens.

    *Deviates:* the default norm is L2 after the projection, which no paper takes, for its cost. CriticalKV spends half
    of each head's budget on attention alone, before this product ranks the rest; here it ranks all. LAVa pools
    attention along positions and takes the highest of a group of heads. Attention and norm are averaged over the heads
    of a group each, then multiplied. Where the projection's weight is missing or not stored as plain numbers, the
    value's own norm serves.

    Args:
        queries: which queries count: "all", "stride:n", "window:n" or "post_vision", as in `attention`.
        window: short for `queries="window:n"`.
        reduce: "sum" over the queries, or "mean" over those that saw the token.
        image_weight: factor on the scores of image tokens.
        text_weight: factor on the scores of all other tokens.
        seed: seed of the offset of "stride:n".
        norm: "projected_l2" or "projected_l1", of the value after its head's part of the output projection; "own_l2",
            of the value itself; "largest_l1", the largest of all values of the head (before the window where
            `queries` is one), the same for all slots.
        epsilon: added to the probability that each counted query gives to the slot.
    """

    norm: Literal["projected_l2", "projected_l1", "own_l2", "largest_l1"] = "projected_l2"
    epsilon: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def _mass(self, layer: LayerContext) -> Importance:
        """Attention as in `attention`, times the norm; costs tokens x value_dim^2 more, or x hidden for L1."""
        mass = super()._mass(layer)
        if self.epsilon:
            averaged = self.reduce == "mean" and self.queries == "post_vision"
            mass = mass + self.epsilon * (1 if averaged else self._saw(layer))
        return mass * layer.at_tokens(self._norm(layer))

    def _saw(self, layer: LayerContext) -> Tensor:
        """Queries, of those that count, that saw each slot's token."""
        tokens, counted, (kind, _, count) = layer.keys.shape[2], layer.row_queries, self.queries.partition(":")
        if kind == "window":
            counted = counted.clamp(max=int(count))
        elif kind == "post_vision":
            counted = torch.minimum(counted, layer.query.shape[2] - self._first_after_image(layer))
        return torch.minimum(torch.arange(tokens, 0, -1, device=counted.device), counted[:, None, None])

    def _norm(self, layer: LayerContext) -> Importance:
        if self.norm == "own_l2":
            return slot_norm(layer.values, 2)
        if self.norm == "largest_l1":
            kind, _, count = self.queries.partition(":")
            lengths, tokens = layer.at_tokens(slot_norm(layer.values, 1)), layer.keys.shape[2]
            before = tokens - min(int(count), layer.query.shape[2]) if kind == "window" else tokens
            largest = lengths.amax(-1, keepdim=True)
            if before and layer.valid is None:
                largest = lengths[..., :before].amax(-1, keepdim=True)
            elif before and layer.valid is not None:  # a row that is all window has nothing before it
                some = layer.valid[..., :before].any(-1, keepdim=True)
                largest = torch.where(some, lengths[..., :before].amax(-1, keepdim=True), largest)
            return largest.expand(lengths.shape)
        asks = f"scorer {self.name}: layer {layer.layer}: {{}}, or choose norm='own_l2' or another scorer"
        return projected_norm(layer.values, layer.weights, 1 if self.norm == "projected_l1" else 2, asks)
