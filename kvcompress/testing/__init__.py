"""Property tests for policies of one's own: the laws that the policies of kvcompress are tested with.

Needs `pip install 'kvcompress[testing]'`. What is listed in `__all__` is imported when it is first used.

Example:
    >>> from kvcompress import ALLOCATORS
    >>> from kvcompress.testing import check_allocator
    >>> check_allocator(ALLOCATORS.create("uniform"), max_examples=8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvcompress.errors import LawError, MissingDependencyError

if TYPE_CHECKING:
    from kvcompress.testing import strategies
    from kvcompress.testing.checks import (
        Law,
        all_laws,
        check_allocator,
        check_evictor,
        check_merger,
        check_policy,
        check_quantizer,
        check_reducer,
        check_scorer,
        laws_of,
    )

__all__ = [
    "Law",
    "LawError",
    "all_laws",
    "check_allocator",
    "check_evictor",
    "check_merger",
    "check_policy",
    "check_quantizer",
    "check_reducer",
    "check_scorer",
    "laws_of",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kvcompress.testing' has no attribute '{name}'")
    try:
        if name == "strategies":
            return importlib.import_module("kvcompress.testing.strategies")
        found = getattr(importlib.import_module("kvcompress.testing.checks"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise MissingDependencyError(
            "kvcompress.testing: needs hypothesis; install it with: pip install 'kvcompress[testing]'"
        ) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
