"""Every registered policy keeps every law of `kvcompress.testing`, and each law catches a policy that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvcompress.errors import ConfigError, LawError
from kvcompress.policies.base import Policy
from kvcompress.policies.registry import REGISTRIES
from kvcompress.testing import Law, all_laws, check_allocator, check_policy, check_scorer, laws_of
from tests import strategies
from tests.wrong_policies import WRONG, Share


def every_policy_and_law() -> Iterator[Any]:
    """Laws that run models are checked on one policy a stage: other tests run all of them in more ways."""
    for registry in REGISTRIES:
        for number, policy in enumerate(strategies.variants(registry)):
            for law in laws_of(policy):
                if not law.runs_models or number == 0 or strategies.THOROUGH:
                    yield pytest.param(policy, law, id=f"{registry.stage}-{strategies.label(policy)}-{law}")


@pytest.mark.parametrize(("policy", "law"), list(every_policy_and_law()))
def test_a_registered_policy_keeps_its_laws(policy: Any, law: Law) -> None:
    law.check(policy, max_examples=strategies.examples(12).max_examples)


@pytest.mark.parametrize(("stage", "name", "make"), WRONG, ids=[f"{stage}-{name}" for stage, name, _ in WRONG])
def test_a_law_catches_a_policy_that_breaks_it(stage: str, name: str, make: Callable[[], Policy]) -> None:
    """With the law's sentence, and an example."""
    policy = make()
    law = next(one for one in laws_of(policy) if one.name == name)
    with pytest.raises(LawError) as caught:
        law.check(policy, max_examples=100, shrink=False)
    told = str(caught.value)
    assert told.startswith(
        f"{stage} {policy.name or type(policy).__name__}: breaks the law '{name}'.\n  {law.sentence}"
    )
    assert "\nIt did: " in told and "\nThe smallest example: " in told


def test_every_law_has_a_policy_that_breaks_it() -> None:
    assert {law.name for law in all_laws()} == {name for _, name, _ in WRONG}
    assert all(law.sentence.endswith(".") for law in all_laws())


def test_an_allocator_that_drops_the_remainder_is_told_so_with_the_smallest_example() -> None:
    """One token for two layers; and the first law that is broken is the one that is named."""
    with pytest.raises(LawError) as caught:
        check_allocator(Share())
    assert str(caught.value).startswith(
        "allocator Share: breaks the law 'meets_the_total_exactly'.\n  The layers of a row add up to clamp(total, sum "
        "of floors, sum of capacities), exactly.\nIt did: gave [0] tokens to the rows, which must be [1]\n"
    )
    example = str(caught.value).splitlines()[-1]
    assert "total=[1], floor=[[0], [0]], capacity=[[1], [1]]" in example


@pytest.mark.parametrize(
    ("check", "given", "says"),
    [
        (check_allocator, Share, r"allocator: must be an object of a subclass of Allocator.*make one of it"),
        (check_scorer, Share(), "scorer: must be an object of a subclass of Scorer; got Share"),
        (check_policy, "uniform", "policy: must be an object of a policy's class; got 'uniform'"),
    ],
)
def test_what_is_no_policy_of_the_stage_is_refused(check: Any, given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(given)
