"""Models whose fields a user sets, with errors that a user can read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError

from kvcompress.errors import ConfigError, KVCompressError, did_you_mean, in_plain_words, shown
from kvcompress.files.reading import DEPTH

_LARGEST = 2**31


class Configured(BaseModel):
    """A frozen model whose validation errors are `ConfigError`s of one readable line each."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    unbounded: ClassVar[frozenset[str]] = frozenset()  # fields that check their numbers themselves
    no_fields: ClassVar[Mapping[str, str]] = {}  # what is taken for a field: where it goes instead

    def __init__(self, /, **fields: Any) -> None:
        for name, value in fields.items():
            if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                raise ConfigError(f"{name}: the keys of a mapping must be texts; got {shown(list(value))}")
            if name in type(self).model_fields:
                _check_truths(value, name, type(self).model_fields[name].annotation)
            if name not in self.unbounded:
                _check_numbers(value, name)  # as they came: some overflow in pydantic
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise readable_error(error, type(self)) from None
        for name in type(self).model_fields:
            if name not in self.unbounded:
                _check_numbers(getattr(self, name), name)  # and as they were read, from texts too

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What differs from the defaults, which is what one needs to read, or to write it down again."""
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(name or "")
            if field is None or value != field.get_default(call_default_factory=True):
                yield name, value

    def __str__(self) -> str:
        return repr(self)


def _check_numbers(value: Any, name: str) -> None:
    """Raises ConfigError for numbers of 2^31 or more, which overflow later; what a mapping becomes checks itself."""
    for one in _flat(value):
        if isinstance(one, (int, float)) and abs(one) >= _LARGEST:
            raise ConfigError(f"{name}: a number must be less than 2^31 ({_LARGEST:,}); got {shown(one)}")


def _check_truths(value: Any, name: str, annotation: Any) -> None:
    """Raises ConfigError for True or False in a field of numbers alone, which pydantic would take for 1 or 0."""
    for one in _flat(value):
        if isinstance(one, bool) and not _takes_truths(annotation):
            raise ConfigError(f"{name}: must be a number; got {one}; write {int(one)} if that is meant")


def _takes_truths(annotation: Any) -> bool:
    """Whether True and False may stand where an annotation is, or nothing there would be a number."""
    parts = [annotation]
    for one in parts:
        parts.extend(get_args(one))
    return bool in parts or Any in parts or not any(kind in parts for kind in (int, float, ByteSize))


def _flat(value: Any) -> Iterator[Any]:
    """A value and what lists hold, at most as deep as files may be; each object once a level."""
    level, depth = [value], 0
    while level and depth <= DEPTH:
        level = list({id(one): one for one in level}.values())  # a list may stand in many places
        yield from level
        level, depth = [part for one in level if isinstance(one, (list, tuple)) for part in one], depth + 1


def readable_error(error: ValidationError, model: type[BaseModel]) -> KVCompressError:
    """Turns pydantic's report into one `ConfigError` that names the field, what came and what is allowed."""
    errors, lines = error.errors(), []
    unknown = [item for item in errors if item["type"] == "extra_forbidden"]
    for item in errors:
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KVCompressError):
            if len(errors) == 1:
                return cause
            lines.append(str(cause))
        elif item["type"] == "extra_forbidden":
            fields = list(model.model_fields)
            instead = getattr(model, "no_fields", {}).get(where)
            hint = f"; {instead};" if instead else did_you_mean(where, fields) or ";"
            known = f" its fields: {', '.join(fields) or 'none'}" if item is unknown[-1] else ""  # once is enough
            lines.append(f"{where}: unknown field of {model.__name__}{hint}{known}".removesuffix(";"))
        else:
            came = "" if item["type"] == "missing" else f"; got {shown(item['input'])}"
            lines.append(f"{where or model.__name__}: {in_plain_words(item['msg'])}{came}")
    return ConfigError("; ".join(lines))
