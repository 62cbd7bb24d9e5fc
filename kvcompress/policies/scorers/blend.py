"""Several scorers at once."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS, ScorerField

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@SCORERS.register("blend")
class Blend(Scorer):
    """Weighted sum of the scores of other scorers, each brought to one scale within its layer and head.

    Source: none, a building block.

    A part counts as it stands after this forward alone: what it would add up over forwards starts anew.

    Args:
        scorers: at least one scorer, each a name, a dict with `name` or an object.
        weights: factor of each scorer, not all zero; None for 1 each.
        normalise: "rank", the share of slots that score as much or less; or "mass", the share of the sum, where scores
            that are no mass first go, standardised, through a softmax.
    """

    mass: ClassVar[bool] = True

    scorers: list[ScorerField] = Field(min_length=1)
    weights: list[_Weight] | None = None
    normalise: Literal["rank", "mass"] = "rank"

    @model_validator(mode="after")
    def _a_weight_each(self) -> Blend:
        if self.weights is not None and len(self.weights) != len(self.scorers):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.scorers)} scorers; give one each, or none")
        if self.weights is not None and not any(self.weights):
            raise ValueError("weights: all zero, so no scorer counts; give at least one above 0")
        return self

    @property
    def reads_attention(self) -> bool:  # type: ignore[override]
        """As soon as one part does."""
        return any(scorer.reads_attention for scorer in self.scorers)

    @property
    def reads_modality(self) -> bool:
        """If one of its parts does."""
        return any(scorer.reads_modality for scorer in self.scorers)

    @property
    def protects(self) -> int:
        """The most that any part protects."""
        return max(scorer.protects for scorer in self.scorers)

    def score(self, layer: LayerContext) -> Importance:
        """Adds up the parts in float32."""
        (queries, tokens), device = (layer.query.shape[2], layer.keys.shape[2]), layer.keys.device
        saw = torch.arange(tokens, 0, -1, device=device).clamp(max=queries).expand(layer.index.shape)
        total = torch.zeros(layer.keys.shape[:3], device=device)
        for scorer, weight in zip(self.scorers, self.weights or [1.0] * len(self.scorers), strict=True):
            score = scorer.importance(scorer.score(layer), saw).float()
            if self.normalise == "rank":
                total += weight * _ranks(score)
            else:
                total += weight * _shares(score if scorer.mass else _softmax(score))
        return total


def _ranks(score: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens"]:
    """Share of slots that score as much or less, in (0, 1]; equal scores rank alike."""
    ranked = score.sort(dim=-1).values
    return torch.searchsorted(ranked, score.contiguous(), right=True) / score.shape[-1]


def _shares(score: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens"]:
    """Shares of the sum; equal ones where there is none."""
    total = score.sum(-1, keepdim=True)
    return torch.where(total > 0, score / total.clamp(min=torch.finfo(score.dtype).tiny), 1 / score.shape[-1])


def _softmax(score: Float[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens"]:
    """Softmax of the standardised scores, so that their unit does not matter."""
    # Equal scores differ by rounding alone, which is not to be blown up.
    rounding = 1e-4 * score.abs().amax(-1, keepdim=True) + torch.finfo(score.dtype).tiny
    return ((score - score.mean(-1, keepdim=True)) / (score.std(-1, correction=0, keepdim=True) + rounding)).softmax(-1)
