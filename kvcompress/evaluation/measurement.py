"""What a benchmark tells of one cache: medians with their spread, ratios, and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A figure over rounds, or over the steps of all rounds.

    Attributes:
        median: the middle.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measurement:
    """One cache with one length of prompt and one batch.

    Attributes:
        policy: name of the configuration, or of the reference.
        budget: the bare amount; None for references.
        budget_unit: what it counts: "fraction", "tokens" (per layer) or "bytes".
        prompt_tokens: tokens of each prompt.
        batch: prompts at a time.
        seconds_to_first_token: the prompt's forward, compression included, and the choice of a token.
        seconds_per_token: a later step, over all steps of all rounds.
        tokens_per_second: batch / seconds of each such step.
        first_token_ratio: seconds to first token / `DynamicCache`'s in the same round, median over rounds.
        per_token_ratio: the same for seconds per token, median over all steps.
        held_bytes: of the cache at the end of a round, with what says which tokens it holds.
        peak_bytes: most memory that a round took on top of the weights; None where the system does not tell.
        row_bytes: bytes that one more prompt in the batch takes, see `largest_batch`.
        largest_batch: how many rows fit into the memory limit beside the weights: (limit - weights) / row bytes, where
            row bytes are the peak over the batch on a GPU, and the held bytes over the batch elsewhere.
        note: why there are no figures, if there are none.
    """

    policy: str
    budget: float | None
    budget_unit: str | None
    prompt_tokens: int
    batch: int
    seconds_to_first_token: Spread | None = None
    seconds_per_token: Spread | None = None
    tokens_per_second: Spread | None = None
    first_token_ratio: float | None = None
    per_token_ratio: float | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    row_bytes: int | None = None
    largest_batch: int | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON has them; a spread is three entries, `NAME`, `NAME_low` and `NAME_high`."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                found |= {name: value["median"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                found[name] = value
        return found
