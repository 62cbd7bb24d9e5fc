"""Accumulated attention: how much probability the queries gave to each slot."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.policies.base import OverForwards, Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("attention")
class Attention(Scorer):
    """Attention probability that a slot received, averaged over each group of heads.

    Source: PrefixKV (arXiv 2412.03409, section 3) sums over all prompt queries; H2O (arXiv 2306.14048) likewise;
    VL-Cache (arXiv 2410.23317, post-vision attention) over those after the image.

    *Deviates:* scores are per key/value head, and the evictor decides whether a layer ranks their mean. `stride` and
    `window` are cheaper than the papers' sum over all queries.

    Args:
        queries: which queries count. "all"; "stride:n", every n-th counted back from a seeded random one of a row's
            last n, scaled to estimate the same sum; "window:n", the last n of a forward (n = 32 if left out);
            "post_vision", those after a row's last image token of this forward, so all of them where it brings no
            image, and its last one where nothing follows the image. The scores of the last two replace earlier ones
            instead of adding to them.
        window: short for `queries="window:n"`.
        reduce: "sum" as in the papers, which favours early tokens since more queries see them, or "mean" over the
            queries that saw the token.
        image_weight: factor on the scores of image tokens.
        text_weight: factor on the scores of all other tokens.
        seed: seed of the offset of "stride:n".
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    queries: str = Field(default="all", pattern=r"^(all|post_vision|(stride|window):[1-9][0-9]{0,8})$")
    reduce: Literal["sum", "mean"] = "sum"
    image_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    text_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _spell_out_window(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        if "window" in fields:
            window = fields.pop("window")
            if fields.get("queries", "window") not in ("window", f"window:{window}"):
                raise ValueError(f"window={window} and queries={fields['queries']!r} contradict each other; give one")
            fields["queries"] = f"window:{window}"
        if fields.get("queries") == "window":
            fields["queries"] = "window:32"
        return fields

    @property
    def over_forwards(self) -> OverForwards:
        """Scores of the last queries replace earlier ones, sums go on."""
        return "last" if self.queries.startswith(("window", "post_vision")) else "sum"

    @property
    def reads_modality(self) -> bool:
        """With factors that differ, and where the queries after the image count."""
        return self.image_weight != self.text_weight or self.queries == "post_vision"

    def score(self, layer: LayerContext) -> Importance:
        """Sums the attention mass over the chosen queries, in float32, and weighs it by modality."""
        mass = self._mass(layer)
        if self.image_weight == self.text_weight == 1:
            return mass
        if layer.is_image is None:
            return mass * self.text_weight
        return torch.where(layer.is_image, mass * self.image_weight, mass * self.text_weight)

    def importance(self, score: Importance, queries: Int[Tensor, "batch sets tokens"]) -> Importance:
        """Divides by the number of counted queries that saw the token if `reduce` is "mean"."""
        kind, _, count = self.queries.partition(":")
        if self.reduce == "sum" or kind == "post_vision":
            return score
        return score / (queries.clamp(max=int(count)) if kind == "window" else queries)

    def _mass(self, layer: LayerContext) -> Importance:
        """Attention mass of the chosen queries."""
        kind, _, count = self.queries.partition(":")
        if kind == "stride":
            return self._strided(layer, int(count))
        if kind == "post_vision":
            return self._after_image(layer)
        return layer.attention_mass(max(0, layer.query.shape[2] - int(count)) if kind == "window" else 0)

    def _strided(self, layer: LayerContext, stride: int) -> Importance:
        """Counts back from the last query, so that rows of any length count the same ones; at least one of each."""
        queries = layer.query.shape[2]
        step, draw = min(stride, queries), random.Random(f"{self.seed} {layer.layer} {stride}").getrandbits(32)
        if layer.valid is None:
            return layer.attention_mass((queries - 1 - draw % step) % step, step) * step
        steps = layer.row_queries.clamp(1, stride)
        return layer.attention_mass((queries - 1 - draw % steps) % step, step) * steps[:, None, None]

    def _after_image(self, layer: LayerContext) -> Importance:
        """Counts from the first query after a row's last image token of this forward on."""
        queries, tokens, device = layer.query.shape[2], layer.keys.shape[2], layer.query.device
        first = self._first_after_image(layer)
        mass = layer.attention_mass(first)
        if self.reduce == "sum":
            return mass
        counted = torch.minimum(layer.row_queries, queries - first).clamp(min=1)
        return mass / torch.minimum(torch.arange(tokens, 0, -1, device=device), counted[:, None, None])

    def _first_after_image(self, layer: LayerContext) -> Int[Tensor, " batch"]:
        """The first query of each row after its last image token; the last one where none is after."""
        (batch, _, queries, _), device = layer.query.shape, layer.query.device
        if layer.is_image is None:
            return torch.zeros(batch, dtype=torch.int64, device=device)
        order = torch.arange(1, queries + 1, device=device)
        after = (layer.is_image[:, 0, -queries:] * order).amax(-1)  # this forward's tokens are the last in any set
        return after.clamp(max=queries - 1)
