"""Accumulated attention: how much probability the queries gave to each slot."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.registry import SCORERS
from kvcompress.shapes import Importance, LayerContext
from kvcompress.stages import Scorer


@SCORERS.register("attention")
class Attention(Scorer):
    """Attention probability that a slot received, averaged over each group of heads.

    Source: PrefixKV (arXiv 2412.03409, section 3) sums over all prompt queries; H2O (arXiv 2306.14048) likewise.

    *Deviates:* scores are per key/value head, and the evictor decides whether a layer ranks their mean. `stride` and
    `window` are cheaper than the papers' sum over all queries.

    Args:
        queries: which queries count. "all"; "stride:n", every n-th from a seeded random offset, scaled to estimate the
            same sum; "window:n", the last n of a forward (n = 32 if left out), which replace earlier scores instead
            of adding to them.
        window: short for `queries="window:n"`.
        reduce: "sum" as in the papers, which favours early tokens since more queries see them, or "mean" over the
            queries that saw the token.
        seed: seed of the offset of "stride:n".
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    queries: str = Field(default="all", pattern=r"^(all|stride:[1-9]\d*|window:[1-9]\d*)$")
    reduce: Literal["sum", "mean"] = "sum"
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
        """A window's scores replace earlier ones, sums go on."""
        return not self.queries.startswith("window")

    def score(self, layer: LayerContext) -> Importance:
        """Sums the attention mass over the chosen queries, in float32."""
        kind, _, count = self.queries.partition(":")
        if kind == "all":
            return layer.attention_mass()
        if kind == "window":
            return layer.attention_mass(start=max(0, layer.query.shape[2] - int(count)))
        step = min(int(count), layer.query.shape[2])
        offset = random.Random(f"{self.seed} {layer.layer} {layer.seen}").randrange(step)
        return layer.attention_mass(start=offset, step=step) * step

    def importance(self, score: Importance, queries: Int[Tensor, "batch sets tokens"]) -> Importance:
        """Divides by the number of counted queries that saw the token if `reduce` is "mean"."""
        if self.reduce == "sum":
            return score
        kind, _, count = self.queries.partition(":")
        return score / (queries.clamp(max=int(count)) if kind == "window" else queries)
