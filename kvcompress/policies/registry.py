"""One registry per stage: name -> policy class, from this package, a decorator, or an installed entry point."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, TypeVar, get_args

from pydantic import BeforeValidator, PlainSerializer

from kvcompress.errors import ConfigError, KVCompressWarning, UnknownPolicyError, did_you_mean, shown
from kvcompress.policies.base import Allocator, Evictor, Merger, Policy, Quantizer, Reducer, Scorer

# What policies of former names are now: (stage, name) -> how to ask for them.
_NOW = {
    ("merger", "average"): "'lookm'",
    ("merger", "pivotal"): "'lookm' with rule='pivotal'",
    ("merger", "weighted"): "'lookm' with rule='weighted'",
}
ENTRY_POINT_GROUP = "kvcompress.policies"
PolicyT = TypeVar("PolicyT", bound=Policy)


class Registry(Generic[PolicyT]):
    """The policies of one stage by name.

    Example:
        >>> from kvcompress import ALLOCATORS
        >>> "prefix" in ALLOCATORS.names()
        True
        >>> ALLOCATORS.create("uniform")
        Uniform()
    """

    def __init__(self, contract: type[PolicyT]) -> None:
        """Makes an empty registry for the subclasses of one contract."""
        self.contract = contract
        self.stage = contract.stage
        self._policies: dict[str, type[PolicyT]] = {}

    def register(self, name: str) -> Callable[[type[PolicyT]], type[PolicyT]]:
        """Class decorator that gives a policy its name.

        Raises:
            ConfigError: if the class is of another stage or the name is taken by another class.
        """

        def decorate(policy: type[PolicyT]) -> type[PolicyT]:
            if not issubclass(policy, self.contract):
                raise ConfigError(f"{self.stage}: '{name}' must subclass {self.contract.__name__}, got {policy!r}")
            if not name.replace("_", "").replace("-", "").isalnum() or name == "none":
                raise ConfigError(f"{self.stage}: a name is letters, digits, '_' and '-', and not 'none'; got {name!r}")
            known = self._policies.get(name)
            if known is not None and _identity(known) != _identity(policy):
                raise ConfigError(
                    f"{self.stage}: the name '{name}' is taken by {'.'.join(_identity(known))}; choose another"
                )
            policy.name = name
            self._policies[name] = policy
            return policy

        return decorate

    def names(self) -> list[str]:
        """Registered names, sorted, installed entry points included."""
        _load_entry_points()
        return sorted(self._policies)

    def spellings(self) -> list[str]:
        """Names with the short ones that say the bits (`quanto4`), in the order of `names`."""
        return [spelling for name in self.names() for spelling in (name, *self._with_bits(name))]

    def _with_bits(self, name: str) -> list[str]:
        field = self._policies[name].model_fields.get("bits")
        return [] if field is None else [f"{name}{bits}" for bits in get_args(field.annotation)]

    def get(self, name: str) -> type[PolicyT]:
        """The class registered under a name, without or with a number of bits at its end.

        Raises:
            UnknownPolicyError: if there is none; the message suggests the nearest name.
        """
        return self._policies[self._read(name)[0]]

    def create(self, name: str, /, **fields: Any) -> PolicyT:
        """Makes the policy of that name; a number at its end is short for the field `bits`.

        Raises:
            UnknownPolicyError: if nobody registered the name.
            ConfigError: if a field is unknown or has a wrong value.
        """
        registered, bits = self._read(name)
        if bits is not None and fields.setdefault("bits", bits) != bits:
            raise ConfigError(
                f"{self.stage} {name}: the name says {bits} bits, the field {shown(fields['bits'])}; give one"
            )
        try:
            return self._policies[registered](**fields)
        except ConfigError as error:
            raise ConfigError(f"{self.stage} {name}: {error}") from None

    def _read(self, name: str) -> tuple[str, int | None]:
        """The registered name, and the bits where they stand at the end of what was given."""
        if not isinstance(name, str):
            known = ", ".join(self.spellings()) or "(none)"
            raise ConfigError(f"{self.stage}: a policy's name is a text; got {shown(name)}; known: {known}")
        if name not in self._policies:
            _load_entry_points()
        if name in self._policies:
            return name, None
        short = name.rstrip("0123456789")
        if short != name and "bits" in getattr(self._policies.get(short), "model_fields", {}):
            return short, int(name[len(short) :])
        if (self.stage, name) in _NOW:
            raise UnknownPolicyError(f"{self.stage}: '{name}' is now {_NOW[self.stage, name]}")
        raise unknown_name(self.stage, "policy", name, self.spellings())

    def parse(self, given: object) -> PolicyT | None:
        """Reads a policy given as a name, a dict with a `name`, an object, or None / "none" for no policy."""
        if given is None or given == "none":
            return None
        if isinstance(given, self.contract):
            if not given.name:
                kind = type(given).__name__
                raise ConfigError(f"{self.stage}: {kind} is not registered; decorate it with @..register('name')")
            return given
        if isinstance(given, str):
            return self.create(given)
        if isinstance(given, dict):
            fields = dict(given)
            name = fields.pop("name", None)
            if not isinstance(name, str):
                raise ConfigError(f"{self.stage}: a dict needs the key 'name' with a string; got {shown(given)}")
            if not all(isinstance(key, str) for key in fields):
                raise ConfigError(f"{self.stage} {name}: names of fields are texts; got {shown(list(fields))}")
            return self.create(name, **fields)
        allowed = f"a name, a dict with 'name' or a {self.contract.__name__}"
        raise ConfigError(f"{self.stage}: must be {allowed}; got {shown(given)}")

    @staticmethod
    def dump(policy: Policy | None) -> dict[str, Any] | None:
        """The inverse of `parse`: a dict with the name and every field."""
        return None if policy is None else {"name": policy.name, **policy.model_dump(mode="json")}


def unknown_name(subject: str, kind: str, name: str, known: Iterable[str]) -> UnknownPolicyError:
    """The error for a misspelt name, with the nearest known one."""
    names = list(known)
    hint = did_you_mean(name, names) or ";"
    return UnknownPolicyError(f"{subject}: unknown {kind} '{name}'{hint} known: {', '.join(names) or '(none)'}")


def _identity(policy: type) -> tuple[str, str]:
    return policy.__module__, policy.__qualname__


_loaded: set[str] = set()
_loading = threading.RLock()


def _load_entry_points() -> None:
    """Imports the modules that installed packages declare; a broken one, or one that exits, is reported and skipped."""
    with _loading:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.value in _loaded:
                continue
            _loaded.add(point.value)  # first, since the module may ask for names
            try:
                importlib.import_module(point.module)
            except (Exception, SystemExit) as error:  # another package's fault must not take this one down
                told = f"entry point '{point.name}' of {ENTRY_POINT_GROUP} failed: {error!r}"
                warnings.warn(told, KVCompressWarning, stacklevel=3)
            except BaseException:  # Ctrl-C: another time
                _loaded.discard(point.value)
                raise


SCORERS: Registry[Scorer] = Registry(Scorer)  # type: ignore[type-abstract]
ALLOCATORS: Registry[Allocator] = Registry(Allocator)  # type: ignore[type-abstract]
EVICTORS: Registry[Evictor] = Registry(Evictor)  # type: ignore[type-abstract]
MERGERS: Registry[Merger] = Registry(Merger)  # type: ignore[type-abstract]
QUANTIZERS: Registry[Quantizer] = Registry(Quantizer)  # type: ignore[type-abstract]
REDUCERS: Registry[Reducer] = Registry(Reducer)  # type: ignore[type-abstract]

# Fields of policies that are made of other policies: a name, a dict with `name`, or an object.
AllocatorField = Annotated[Allocator, BeforeValidator(ALLOCATORS.parse), PlainSerializer(ALLOCATORS.dump)]

REGISTRIES: tuple[Registry[Any], ...] = (SCORERS, ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS)
