"""The pytest plug-in: `pytest --kvcompress-policies my_module:deep_heavy` runs every law over policies that are named.

Nothing of the package is imported until there is a name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option and its setting."""
    told = (
        "policies to check against the laws of kvcompress: NAME of a registry, MODULE:NAME (a policy, its class, or "
        "what the module registered under that name) or MODULE (all that it registered)"
    )
    group = parser.getgroup("kvcompress", "laws of cache policies")
    group.addoption("--kvcompress-policies", action="append", default=[], metavar="NAMES", help=f"{told}; with commas")
    group.addoption(
        "--kvcompress-examples", type=int, default=None, metavar="N", help="examples of each law (Hypothesis's setting)"
    )
    parser.addini("kvcompress_policies", told, type="linelist", default=[])


@pytest.hookimpl(tryfirst=True)  # so that -k and -m choose among the laws too
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds a test for each policy and law."""
    given = [*config.getini("kvcompress_policies"), *config.getoption("--kvcompress-policies")]
    names = [name.strip() for one in given for name in one.split(",") if name.strip()]
    if names:
        items.extend(_items(session, names, config.getoption("--kvcompress-examples")))


def _items(session: pytest.Session, names: list[str], examples: int | None) -> Iterator[pytest.Item]:
    from kvcompress.errors import KVCompressError
    from kvcompress.testing.checks import laws_of
    from kvcompress.testing.naming import label_of, policies_named

    here = str(session.config.invocation_params.dir)
    if here not in sys.path:  # which `python -m pytest` has, and `pytest` has not: modules are named from this folder
        sys.path.append(here)
    try:
        policies = [policy for name in names for policy in policies_named(name)]
    except KVCompressError as error:
        raise pytest.UsageError(f"kvcompress_policies: {error}") from None
    for label, policy in {label_of(policy): policy for policy in policies}.items():
        for law in laws_of(policy):
            yield LawItem.from_parent(session, name=f"{label}[{law.name}]", policy=policy, law=law, examples=examples)


class LawItem(pytest.Item):
    """One law over one policy."""

    def __init__(self, *, policy: Any, law: Any, examples: int | None, **given: Any) -> None:
        super().__init__(**given)
        self.policy, self.law, self.examples = policy, law, examples

    def runtest(self) -> None:
        """Searches for an example that breaks the law."""
        self.law.check(self.policy, max_examples=self.examples)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The law's sentence and the smallest example rather than a traceback of the kit."""
        from kvcompress.errors import LawError

        if not isinstance(excinfo.value, LawError):
            return super().repr_failure(excinfo, style)
        cause = excinfo.value.__cause__
        where = "" if cause is None or isinstance(cause, AssertionError) else _place_of(cause)
        return f"{excinfo.value}{where}"

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """What pytest shows of it."""
        return self.path, None, self.name


def _place_of(error: BaseException) -> str:
    """Where the policy raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"\nRaised in {trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
