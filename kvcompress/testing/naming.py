"""Policies by the names that users write on a command line."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any, TypeGuard

from kvcompress import policies  # noqa: F401  (registers the built-in policies)
from kvcompress.config.composition import EXAMPLES
from kvcompress.errors import ConfigError, UnknownPolicyError, did_you_mean, shown
from kvcompress.policies.base import Policy
from kvcompress.policies.registry import REGISTRIES, unknown_name
from kvcompress.testing.laws import name_of


def policies_named(name: str) -> list[Policy]:
    """What a name stands for: `NAME` in any registry (installed entry points included), `MODULE:NAME` or `MODULE`.

    `MODULE:NAME` is a policy, a class of one, or what the module registered; `MODULE` all that it registered.

    Raises:
        ConfigError: if there is no such module, nothing in it is a policy, or one needs fields that nobody gives; then
            name an object of it: `MODULE:NAME` of a variable.
        UnknownPolicyError: if no registry has the name.
    """
    module_name, colon, wanted = name.partition(":")
    if not colon and (found := _registered(name)):
        return found
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if not colon:
            known = sorted({one for registry in REGISTRIES for one in registry.names()})
            raise unknown_name("policies", "policy", name, known) from None
        raise ConfigError(f"{name}: the module '{module_name}' cannot be imported: {error}") from error
    if not wanted:
        return _all_of(module)
    own = vars(module).get(wanted)
    if own is None:
        return _registered(wanted) or _refuse(name, module, wanted)
    if isinstance(own, Policy):
        return [own]
    if _is_policy(own):
        return [_made(own)]
    raise ConfigError(f"{name}: must be a policy or its class; got {shown(own)}")


def label_of(policy: Policy) -> str:
    """Stage, name and fields."""
    fields = ", ".join(f"{name}={value}" for name, value in policy if name in policy.model_fields_set)
    return f"{policy.stage} {name_of(policy)}" + (f"({fields})" if fields else "")


def _registered(name: str) -> list[Policy]:
    """The policies of all stages under a name."""
    found = []
    for registry in REGISTRIES:
        try:
            kind = registry.get(name)
        except UnknownPolicyError:
            continue
        fields = EXAMPLES.get((registry.stage, name), {})
        found.append(registry.create(name, **fields) if kind.name != name or fields else _made(kind))
    return found


def _all_of(module: ModuleType) -> list[Policy]:
    found = [
        _made(registry.get(name))
        for registry in REGISTRIES
        for name in registry.names()
        if f"{registry.get(name).__module__}.".startswith(f"{module.__name__}.")
    ]
    return found or _refuse(module.__name__, module)


def _made(kind: type[Policy]) -> Policy:
    fields: dict[str, Any] = EXAMPLES.get((kind.stage, kind.name), {})
    try:
        return kind(**fields)
    except ConfigError as error:
        raise ConfigError(
            f"{kind.__name__}: needs fields ({error}); make one in a module and name it: MODULE:VARIABLE"
        ) from None


def _refuse(name: str, module: ModuleType, wanted: str = "") -> list[Policy]:
    known = [one for one, own in vars(module).items() if isinstance(own, Policy) or _is_policy(own)]
    known += [one for registry in REGISTRIES for one in registry.names()]
    hint = did_you_mean(wanted, known) if wanted else ""
    raise ConfigError(f"{name}: {module.__file__ or module.__name__} holds no such policy, and registers none{hint}")


def _is_policy(own: object) -> TypeGuard[type[Policy]]:
    return isinstance(own, type) and issubclass(own, Policy) and not inspect.isabstract(own)
