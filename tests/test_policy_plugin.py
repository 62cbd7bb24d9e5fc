"""The pytest plug-in: every law over the policies that a user names, on a command line or in a configuration file."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from kvcompress import ALLOCATORS
from kvcompress.policies import registry
from kvcompress.testing import laws_of
from tests.test_docs import ROOT, blocks

pytest_plugins = "pytester"

WRONG = '''
import torch
from kvcompress import ALLOCATORS
from kvcompress.policies.base import Allocator

@ALLOCATORS.register("shares")
class Shares(Allocator):
    """Drops the remainder."""

    def allocate(self, importance, total, floor, capacity, context=None):
        return torch.minimum(torch.maximum((total // len(floor)).expand_as(floor), floor), capacity)

class Needy(Shares):
    share: float
'''


def guides_module() -> str:
    """The allocator of the guide, as a module."""
    (block,) = (block for block in blocks(ROOT / "docs" / "guide.md", "python") if "deep_heavy" in block)
    lines = [line for line in block.splitlines() if not line.startswith("cache = ")]
    return "from kvcompress import ALLOCATORS\n" + "\n".join(lines)


@pytest.fixture
def users(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makepyfile(my_policies=guides_module(), their_policies=WRONG, test_other="def test_other(): pass")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    for name in ("my_policies", "their_policies"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return pytester


def run(users: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    plugins = ("-p", "no:kvcompress", "-p", "kvcompress.testing.plugin", "-p", "no:xdist", "-p", "no:cacheprovider")
    return users.runpytest_inprocess(*plugins, "--kvcompress-examples", "3", *arguments)


def test_the_guides_allocator_keeps_every_law(users: pytest.Pytester) -> None:
    result = run(users, "--kvcompress-policies", "my_policies:deep_heavy", "-v")
    laws = laws_of(ALLOCATORS.create("uniform"))
    number = sum(law.name != "reads_importance_only_where_it_says_so" for law in laws)
    result.assert_outcomes(passed=number + 1)
    result.stdout.fnmatch_lines(["*allocator deep_heavy[[]meets_the_total_exactly[]] PASSED*"])


def test_a_broken_law_is_shown_with_its_sentence_and_the_smallest_example(users: pytest.Pytester) -> None:
    result = run(users, "--kvcompress-policies", "their_policies:shares,uniform", "-k", "meets_the_total")
    result.assert_outcomes(passed=1, failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(
        [
            "allocator shares: breaks the law 'meets_the_total_exactly'.",
            "  The layers of a row add up to clamp(total, sum of floors, sum of capacities), exactly.",
            "It did: gave *0* tokens to the rows, which must be *1*",
            "The smallest example: AllocationInput(*total=*floor=*capacity=*",
        ]
    )
    assert "Traceback" not in result.stdout.str() and "laws.py" not in result.stdout.str()


def test_names_come_from_configuration_files_and_entry_points(
    users: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("mine", "my_policies", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    users.makeini("[pytest]\nkvcompress_policies =\n    deep_heavy\n    random\n")
    result = run(users, "--collect-only", "-q")
    result.stdout.fnmatch_lines_random(
        ["*allocator deep_heavy[[]*", "*scorer random[[]*", "*reducer random[[]*", "*test_other*"]
    )


@pytest.mark.parametrize("name", ["my_policies:DeepHeavy", "my_policies"])
def test_a_class_and_all_that_a_module_registered_are_names_too(users: pytest.Pytester, name: str) -> None:
    result = run(users, "--kvcompress-policies", name, "-k", "answers_int64", "-v")
    result.stdout.fnmatch_lines(["*allocator deep_heavy[[]answers_int64[]] PASSED*"])


def test_without_names_nothing_is_added(users: pytest.Pytester) -> None:
    run(users).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unifrom", "*policies: unknown policy 'unifrom'; did you mean 'uniform'*"),
        ("no_such:thing", "*no_such:thing: the module 'no_such' cannot be imported*"),
        ("my_policies:nothing", "*my_policies:nothing: * holds no such policy, and registers none"),
        ("my_policies:deep_hevy", "*holds no such policy, and registers none; did you mean 'deep_heavy'?"),
        ("my_policies:DeepHevy", "*holds no such policy, and registers none; did you mean 'DeepHeavy'?"),
        ("my_policies:Field", "*my_policies:Field: must be a policy or its class; got*"),
        ("their_policies:Needy", "*Needy: needs fields (share: *MODULE:VARIABLE"),
    ],
)
def test_names_of_nothing_are_refused(users: pytest.Pytester, name: str, says: str) -> None:
    result = run(users, "--kvcompress-policies", name)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: kvcompress_policies: {says}"])
