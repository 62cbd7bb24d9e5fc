"""Accumulated attention: how much probability the queries gave to each slot."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.policies.base import Scorer
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
        queries: which queries count. "all"; "stride:n", every n-th from a seeded random offset, scaled to estimate the
            same sum; "window:n", the last n of a forward (n = 32 if left out); "post_vision", those after a row's last
            image token of this forward, so all of them where it brings no image, and its last one where nothing follows
            the image. The scores of the last two replace earlier ones instead of adding to them.
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
    def accumulates(self) -> bool:
        """Scores of the last queries replace earlier ones, sums go on."""
        return not self.queries.startswith(("window", "post_vision"))

    @property
    def reads_modality(self) -> bool:
        """With factors that differ, and where the queries after the image count."""
        return self.image_weight != self.text_weight or self.queries == "post_vision"

    def score(self, layer: LayerContext) -> Importance:
        """Sums the attention mass over the chosen queries, in float32, and weighs it by modality."""
        starts = self._starts(layer)
        if min(starts) == max(starts):
            mass = self._mass(layer, starts[0])
        else:
            mass = torch.cat([self._mass(row, start) for row, start in zip(layer.rows(), starts, strict=True)])
        if self.image_weight == self.text_weight == 1:
            return mass
        if layer.is_image is None:
            return mass * self.text_weight
        return mass * torch.where(layer.is_image, self.image_weight, self.text_weight)

    def importance(self, score: Importance, queries: Int[Tensor, "batch sets tokens"]) -> Importance:
        """Divides by the number of counted queries that saw the token if `reduce` is "mean"."""
        kind, _, count = self.queries.partition(":")
        if self.reduce == "sum" or kind == "post_vision":
            return score
        return score / (queries.clamp(max=int(count)) if kind == "window" else queries)

    def _starts(self, layer: LayerContext) -> list[int]:
        """The first query of this forward that counts, per row."""
        (batch, _, queries, _), (kind, _, count) = layer.query.shape, self.queries.partition(":")
        if kind == "stride":
            keys = [f"{self.seed} {layer.layer} {last + 1}" for last in layer.index[:, 0, -1].tolist()]
            return [random.Random(key).randrange(min(int(count), queries)) for key in keys]
        if kind == "post_vision" and layer.is_image is not None:
            order = torch.arange(1, queries + 1, device=layer.query.device)
            after = (layer.is_image[:, 0, -queries:] * order).amax(-1)  # this forward's tokens are the last in any set
            return after.clamp(max=queries - 1).tolist()
        return [max(0, queries - int(count)) if kind == "window" else 0] * batch

    def _mass(self, layer: LayerContext, start: int) -> Importance:
        (queries, tokens), (kind, _, count) = (layer.query.shape[2], layer.keys.shape[2]), self.queries.partition(":")
        step = min(int(count), queries) if kind == "stride" else 1
        mass = layer.attention_mass(start, step) * step
        if self.reduce == "sum" or kind != "post_vision":
            return mass
        return mass / torch.arange(tokens, 0, -1, device=mass.device).clamp(max=queries - start)
