"""Every registered policy keeps every law of `kvcompress.testing`, and each law catches a policy that breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvcompress.policies.registry import REGISTRIES
from kvcompress.testing import Law, laws_of
from tests import strategies


def every_policy_and_law() -> Iterator[Any]:
    """Laws that run models are checked on one policy a stage: other tests run all of them in more ways."""
    for registry in REGISTRIES:
        for number, policy in enumerate(strategies.variants(registry)):
            for law in laws_of(policy):
                if not law.runs_models or number == 0 or strategies.THOROUGH:
                    yield pytest.param(policy, law, id=f"{registry.stage}-{strategies.label(policy)}-{law}")


@pytest.mark.parametrize(("policy", "law"), list(every_policy_and_law()))
def test_a_registered_policy_keeps_its_laws(policy: Any, law: Law) -> None:
    law.check(policy)
