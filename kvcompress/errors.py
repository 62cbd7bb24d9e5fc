"""Every error of kvcompress: one tree, each branch also a builtin exception.

KVCompressError
├── ConfigError (ValueError)          a field, value, name or combination that a configuration cannot have
│   ├── UnknownPolicyError            a policy or preset name that nobody registered
│   └── BudgetError                   a budget that means nothing
├── PolicyError (ValueError)          a policy was given or returned something outside its contract
├── UnsupportedModelError (TypeError) a model that no adapter knows, or with layers that cannot be compressed
├── UnsupportedModeError (RuntimeError) a way of calling the model that a compressed cache cannot serve
├── LawError (AssertionError)         a policy breaks a law of `kvcompress.testing`
├── CacheStateError (RuntimeError)    the cache is not in a state in which the call makes sense
└── MissingDependencyError (ImportError) an optional package that the call needs
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 4000  # characters of a message


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python writes out no more than 4,300 digits
            return f"an integer of {value.bit_length():,} bits"


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, cut where it is long or deep."""
    return _SHORT.repr(value)


_SHORT = _Short()


class KVCompressError(Exception):
    """The root: catch this to catch every error that kvcompress raises on purpose.

    A message of more than 4,000 characters loses its middle, and half a surrogate pair in it is written as an escape.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(one) if isinstance(one, str) else one for one in args))


class ConfigError(KVCompressError, ValueError):
    """A field, value, name or combination that a configuration cannot have."""


class UnknownPolicyError(ConfigError):
    """A policy or preset name that nobody registered."""


class BudgetError(ConfigError):
    """A budget that means nothing, such as a fraction of 1.5."""


class PolicyError(KVCompressError, ValueError):
    """A policy was given, or returned, something outside its contract."""


class UnsupportedModelError(KVCompressError, TypeError):
    """A model that no adapter knows, or with layers that cannot be compressed."""


class UnsupportedModeError(KVCompressError, RuntimeError):
    """A way of calling the model that a compressed cache cannot serve."""


class CacheStateError(KVCompressError, RuntimeError):
    """The cache is not in a state in which the call makes sense."""


class LawError(KVCompressError, AssertionError):
    """A policy breaks a law of its stage; see `kvcompress.testing`."""


class MissingDependencyError(KVCompressError, ImportError):
    """An optional package that the call needs is not installed."""


class KVCompressWarning(UserWarning):
    """The root of the warnings that kvcompress gives."""


class BudgetWarning(KVCompressWarning):
    """The protected tokens alone are more than the budget allows."""


def in_plain_words(message: str) -> str:
    """What a library says of a wrong value, as the errors here say it: "must be a whole number"."""
    for pattern, words in _PLAINLY:
        message = re.sub(pattern, words, message)
    return message


# What pydantic says -> what is said here.
_PLAINLY = (
    (r"^(Value error|Assertion failed), ", ""),
    (r"^[A-Z]\w+ should ", "must "),
    (r"a valid integer(, .*)?$", "a whole number"),
    (r"a valid number(, .*)?$", "a number"),
    (r"a valid boolean(, .*)?$", "true or false"),
    (r"a valid string$", "a text"),
    (r"a valid (list|tuple)$", "a list"),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r" after validation, not \d+", ""),
    (r"^Field required$", "is needed, and was not given"),
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name, in whatever case, as the end of a sentence about an unknown one; empty where none is."""
    by_folded = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), list(by_folded), n=1)
    return f"; did you mean '{by_folded[near[0]]}'?" if near else ""


def _cut(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # pydantic and terminals take no half surrogates
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"
