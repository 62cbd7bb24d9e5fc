"""Decoding in periods: layers grow by some tokens, then are scored and cut again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvcompress.policies.base import Scorer
from kvcompress.policies.evictors.topk import ByScore
from kvcompress.policies.registry import EVICTORS


@EVICTORS.register("every")
class Every(ByScore):
    """Keeps the slots of highest importance, and does so anew after every so many generated tokens.

    Source: R-KV (arXiv 2505.24133, section 3: compression after every segment of generated tokens, observed by the
    last of them); kvpress' decoding press.

    Once `period` tokens were generated since the last scoring, the queries of the last `window` of them score every
    slot as those of a prompt do, and each layer keeps the best of its budget: its share as it was given after the last
    prompt or turn, of what the budget gives for the tokens seen by now. So a layer holds up to `period` tokens more
    than its budget, and remembers `window` queries, which the report counts with the index. A
    budget in bytes has room for these tokens: layers are cut to so many fewer.

    *Deviates:* a prompt or turn is scored and cut at its end, and the period starts anew; layers may be of different
    sizes. kvpress keeps the hidden states of the last tokens; here their queries are kept as they were.

    Args:
        granularity: "layer", one set of tokens for all heads, ranked by head-mean importance; or "head", a set per
            key/value head, ranked by its own.
        period: tokens that are generated between two cuts.
        window: last queries (tokens) that score, at most `period`; None for as many as the scorer protects, and for all
            since the last cut where it protects none.
    """

    granularity: Literal["layer", "head"] = "layer"
    period: int = Field(default=128, ge=1)
    window: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _within_a_period(self) -> Every:
        if self.window is not None and self.window > self.period:
            raise ValueError(f"window must be at most period ({self.period} tokens); got {self.window}")
        return self

    @property
    def frees(self) -> Literal["oldest", "chosen", "nothing"]:
        """Nothing between two cuts."""
        return "nothing"

    @property
    def cuts_every(self) -> int:
        """The period."""
        return self.period

    def looks_back(self, scorer: Scorer | None) -> int:
        """The window, or the scorer's own, or all since the last cut."""
        own = 0 if scorer is None else scorer.protects
        return self.window or min(own or self.period, self.period)
