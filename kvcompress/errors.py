"""Every error of kvcompress: one tree, each branch also a builtin exception.

KVCompressError
├── ConfigError (ValueError)          a field, value, name or combination that a configuration cannot have
│   ├── UnknownPolicyError            a policy or preset name that nobody registered
│   └── BudgetError                   a budget that means nothing
├── PolicyError (ValueError)          a policy was given or returned something outside its contract
├── UnsupportedModelError (TypeError) a model that no adapter knows, or with layers that cannot be compressed
├── UnsupportedModeError (RuntimeError) a way of calling the model that a compressed cache cannot serve
├── CacheStateError (RuntimeError)    the cache is not in a state in which the call makes sense
└── MissingDependencyError (ImportError) an optional package that the call needs
"""

from __future__ import annotations


class KVCompressError(Exception):
    """The root: catch this to catch every error that kvcompress raises on purpose."""


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


class MissingDependencyError(KVCompressError, ImportError):
    """An optional package that the call needs is not installed."""


class KVCompressWarning(UserWarning):
    """The root of the warnings that kvcompress gives."""


class BudgetWarning(KVCompressWarning):
    """The protected tokens alone are more than the budget allows."""
