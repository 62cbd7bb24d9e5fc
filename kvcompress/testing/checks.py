"""One call a stage: every law that binds a policy, in order."""

from __future__ import annotations

from kvcompress.errors import ConfigError, shown
from kvcompress.policies.base import Allocator, Evictor, Merger, Policy, Quantizer, Reducer, Scorer
from kvcompress.testing.laws import Law, all_laws, laws_of


def check_policy(policy: Policy, *, max_examples: int | None = None) -> None:
    """Checks a policy of any stage against every law that binds it.

    Args:
        policy: an object, registered or not.
        max_examples: examples of each law; those of Hypothesis's profile if None. Some laws draw fewer (`Law.share`).

    Raises:
        LawError: at the first law that it breaks: the sentence, what the policy did, and the smallest example found.
        ConfigError: if it is no policy.
    """
    if not isinstance(policy, Policy):
        hint = "; make one of it, as in check_policy(Mine())" if isinstance(policy, type) else ""
        raise ConfigError(f"policy: must be an object of a policy's class; got {shown(policy)}{hint}")
    for one in laws_of(policy):
        one.check(policy, max_examples=max_examples)


def _check(contract: type[Policy], policy: Policy, max_examples: int | None) -> None:
    if not isinstance(policy, contract):
        hint = "; make one of it, as in Mine()" if isinstance(policy, type) else ""
        allowed = f"an object of a subclass of {contract.__name__}"
        raise ConfigError(f"{contract.stage}: must be {allowed}; got {shown(policy)}{hint}")
    check_policy(policy, max_examples=max_examples)


def check_scorer(scorer: Scorer, *, max_examples: int | None = None) -> None:
    """Checks a scorer against every law of scorers; see `check_policy`."""
    _check(Scorer, scorer, max_examples)


def check_allocator(allocator: Allocator, *, max_examples: int | None = None) -> None:
    """Checks an allocator against every law of allocators; see `check_policy`.

    Layers, rows and tokens are drawn: one that holds something for each layer (a `retention` or `retentions`) is given
    as many as there are.
    """
    _check(Allocator, allocator, max_examples)


def check_evictor(evictor: Evictor, *, max_examples: int | None = None) -> None:
    """Checks an evictor against every law of evictors; see `check_policy`."""
    _check(Evictor, evictor, max_examples)


def check_merger(merger: Merger, *, max_examples: int | None = None) -> None:
    """Checks a merger against every law of mergers; see `check_policy`."""
    _check(Merger, merger, max_examples)


def check_quantizer(quantizer: Quantizer, *, max_examples: int | None = None) -> None:
    """Checks a quantizer against every law of quantizers; see `check_policy`."""
    _check(Quantizer, quantizer, max_examples)


def check_reducer(reducer: Reducer, *, max_examples: int | None = None) -> None:
    """Checks a reducer against every law of reducers; see `check_policy`."""
    _check(Reducer, reducer, max_examples)


__all__ = [
    "Law",
    "all_laws",
    "check_allocator",
    "check_evictor",
    "check_merger",
    "check_policy",
    "check_quantizer",
    "check_reducer",
    "check_scorer",
    "laws_of",
]
