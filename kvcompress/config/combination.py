"""Which policies may stand together in one configuration: a rule a function, each with its reason and a way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch

from kvcompress.config.budget import Budget
from kvcompress.errors import ConfigError, shown
from kvcompress.policies.base import Allocator, Evictor, Merger, OverForwards, Quantizer, Scorer
from kvcompress.policies.registry import EVICTORS, SCORERS
from kvcompress.policies.statistics import STATISTICS

_MANY = 2**20  # more tokens than any rule that goes by age reaches back


@dataclass(frozen=True)
class Combination:
    """The policies of one configuration."""

    budget: Budget
    scorer: Scorer | None
    allocator: Allocator
    evictor: Evictor | None
    merger: Merger | None
    quantizer: Quantizer | None

    @property
    def recent(self) -> int:
        """Last tokens that every layer keeps."""
        return max(self.budget.recent, self.scorer.protects if self.scorer is not None else 0)


def check_combination(chosen: Combination) -> None:
    """Raises ConfigError for the first rule that a combination breaks."""
    _statistics(chosen)
    _over_forwards(chosen)
    if chosen.evictor is None:
        _nothing_to_evict(chosen)
        return
    for rule in (_importance, _mass):
        rule(chosen, chosen.evictor)
    _recents(chosen, chosen.evictor)
    _window(chosen, chosen.evictor)
    if chosen.quantizer is not None:
        _residual(chosen, chosen.evictor, chosen.quantizer)


def _over_forwards(chosen: Combination) -> None:
    known: tuple[str, ...] = get_args(OverForwards)
    if chosen.scorer is not None and chosen.scorer.over_forwards not in known:
        raise ConfigError(
            f"scorer {chosen.scorer.name}: over_forwards must be one of {', '.join(map(repr, known))}; got "
            f"{shown(chosen.scorer.over_forwards)}"
        )


def _nothing_to_evict(chosen: Combination) -> None:
    if not chosen.budget.keeps_everything:
        raise ConfigError(
            "evictor: none, so nothing could be evicted to meet the budget; choose an evictor "
            f"({_names(EVICTORS.names())}) or set budget=1.0"
        )
    if chosen.merger is not None:
        raise ConfigError(
            f"merger {chosen.merger.name}: evictor is none, so there is nothing to merge; choose an evictor "
            f"({_names(EVICTORS.names())}) or merger=None"
        )


def _importance(chosen: Combination, evictor: Evictor) -> None:
    if chosen.scorer is not None:
        return
    for policy, other in ((evictor, "evictor='streaming'"), (chosen.allocator, "allocator='uniform'")):
        if policy.reads_importance:
            raise ConfigError(
                f"{policy.stage} {policy.name}: reads importance, but scorer is none; choose a scorer "
                f"({_names(SCORERS.names())}) or {other}"
            )


def _mass(chosen: Combination, evictor: Evictor) -> None:
    if chosen.scorer is not None and chosen.scorer.mass:
        return
    came = "scorer is none" if chosen.scorer is None else f"the scores of the scorer {chosen.scorer.name} are no mass"
    for policy in (chosen.allocator, evictor, chosen.merger):
        if policy is not None and policy.reads_mass:
            mass = [name for name in SCORERS.names() if SCORERS.get(name).mass]
            raise ConfigError(
                f"{policy.stage} {policy.name}: reads shares of mass, but {came}; choose a scorer of mass "
                f"({_names(mass)}) or another {policy.stage}"
            )


def _statistics(chosen: Combination) -> None:
    unknown = [name for name in chosen.allocator.needs if name not in STATISTICS]
    if unknown:
        raise ConfigError(
            f"allocator {chosen.allocator.name}: needs the statistic '{unknown[0]}', which nobody computes; known: "
            f"{_names(sorted(STATISTICS))}"
        )


def _recents(chosen: Combination, evictor: Evictor) -> None:
    if evictor.reach is not None and chosen.recent > evictor.reach:
        raise ConfigError(
            f"evictor {evictor.name}: decode steps free the slot {evictor.reach} before the end, which would evict "
            f"some of the {chosen.recent} recents; raise its distance, lower budget.recent or choose decode='oldest'"
        )


def _window(chosen: Combination, evictor: Evictor) -> None:
    """What scores between two cuts is what the scorer was made to look at."""
    needed = 0 if chosen.scorer is None else chosen.scorer.protects
    if evictor.cuts_every is not None and evictor.looks_back(chosen.scorer) < needed:
        assert chosen.scorer is not None
        raise ConfigError(
            f"evictor {evictor.name}: the last {evictor.looks_back(chosen.scorer)} of {evictor.cuts_every} generated "
            f"tokens are to score, but the scorer {chosen.scorer.name} looks at its last {needed} queries; raise the "
            "evictor's period and window, or lower the window of the scorer"
        )


def _residual(chosen: Combination, evictor: Evictor, quantizer: Quantizer) -> None:
    """Decode steps free single slots, which only slots in full precision can be."""
    if evictor.frees == "nothing":
        return
    kept, sinks = (torch.tensor([count], dtype=torch.int64) for count in (_MANY, chosen.budget.sink))
    loose = _MANY - int(evictor.pinned(kept, sinks, chosen.recent))
    if evictor.frees == "chosen" or loose > quantizer.residual:
        reach = "any token" if evictor.frees == "chosen" or loose > _MANY // 2 else f"one of the last {loose} tokens"
        raise ConfigError(
            f"quantizer {quantizer.name}: decode steps of the evictor {evictor.name} free {reach}, but all except the "
            f"residual of {quantizer.residual} is quantized; choose an evictor with decode='fixed_point' or 'none', or "
            "a residual of at least its distance"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
