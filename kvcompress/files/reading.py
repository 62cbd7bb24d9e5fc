"""Reading: one reader of text, YAML and JSON for files that strangers wrote, with limits on size, depth and numbers."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kvcompress.errors import ConfigError, shown

JSON_BYTES = 16 * 2**20  # of a configuration or profile
YAML_BYTES = 2**20
DATA_BYTES = 2 * 2**30  # of data and of results
DEPTH = 64  # lists and mappings inside each other
DIGITS = 400  # of a number
_BINARY, _AT_ONCE = getattr(os, "O_BINARY", 0), getattr(os, "O_NONBLOCK", 0)  # of Windows, of the others
FORMATS = (".json", ".yaml", ".yml")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def path_of(given: object, what: str) -> Path:
    """A path that a user gave.

    Args:
        given: as text or `os.PathLike`.
        what: what an error calls it, such as "profile".

    Raises:
        ConfigError: if it is anything else.
    """
    try:
        return Path(given)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{what}: must be a path, as text or a pathlib.Path; got {shown(given)}") from None


def read_bytes(path: Path, what: str, limit: int, *, pipes: bool = False) -> bytes:
    """Reads a file of at most so many bytes.

    Args:
        path: the file.
        what: what an error calls it, such as "profile".
        limit: most bytes.
        pipes: whether pipes and devices are read too, up to the limit; otherwise they are refused and never waited for.

    Raises:
        ConfigError: if it is no regular file, cannot be read or is larger.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _BINARY | (0 if pipes else _AT_ONCE))
        with open(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISDIR(found.st_mode):
                raise ConfigError(f"{what} {path}: cannot be read: it is a folder")
            if not (pipes or stat.S_ISREG(found.st_mode)):
                raise ConfigError(f"{what} {path}: cannot be read: it is no regular file")
            content = file.read(limit + 1) if found.st_size <= limit else None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or what the file system cannot encode
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if content is None or len(content) > limit:
        raise ConfigError(f"{what} {path}: is larger than {limit:,} bytes, the most that is read")
    return content


def read_text(path: Path, what: str, limit: int = DATA_BYTES, *, pipes: bool = False) -> str:
    """Reads a text in UTF-8; see `read_bytes`.

    Raises:
        ConfigError: as `read_bytes`, or if it is no UTF-8.
    """
    try:
        return read_bytes(path, what, limit, pipes=pipes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path}: cannot be read: it is no text in UTF-8: {error.reason}") from None


def read_structure(path: Path, what: str) -> Any:
    """Reads what a .json, .yaml or .yml file holds.

    Raises:
        ConfigError: if its name ends otherwise, it cannot be read or is not valid; see `parse_json` and `parse_yaml`.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{what} {path}: the file name must end in one of {', '.join(FORMATS)}")
    if path.suffix == ".json":
        return parse_json(read_text(path, what, JSON_BYTES), f"{what} {path}:")
    return parse_yaml(read_text(path, what, YAML_BYTES), f"{what} {path}:")


def parse_json(text: str, where: str) -> Any:
    """Reads JSON.

    Args:
        text: the JSON.
        where: how an error begins.

    Raises:
        ConfigError: if it is not valid, names a key twice, is nested more than `DEPTH` deep, or holds a number of more
            than `DIGITS` digits or half a surrogate pair.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_integer)
        _check(content, surrogates=_SURROGATE.search(text) is not None)
    except RecursionError:
        raise ConfigError(f"{where} is not valid JSON: it is nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Reads plain YAML: mappings, lists, text, numbers, true, false and null. A date is text.

    Args:
        text: the YAML.
        where: how an error begins.

    Raises:
        ConfigError: if it is not valid, names a key twice, is nested more than `DEPTH` deep, or holds anchors, aliases,
            merge keys, tags or a number of more than `DIGITS` digits.
    """
    if len(text) > YAML_BYTES:
        raise ConfigError(f"{where} is larger than {YAML_BYTES:,} bytes, the most that is read as YAML")
    try:
        _check_events(yaml.parse(text, Loader=_PlainLoader))
        content = yaml.load(text, Loader=_PlainLoader)
        _check(content, surrogates=True)
    except RecursionError:
        raise ConfigError(f"{where} is not valid YAML: it is nested more than {DEPTH} deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    return content


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader without dates and merge keys, and with limits."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("merge keys (<<) are not read; write the fields out")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            seen: set[Any] = set()
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {shown(twice)} is there twice")
        return found

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > DIGITS:
            raise ValueError(f"a number has more than {DIGITS} digits")
        kind = yaml.SafeLoader.construct_yaml_int if node.tag.endswith(":int") else yaml.SafeLoader.construct_yaml_float
        return kind(self, node)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in _PlainLoader.yaml_implicit_resolvers.items()
}


def _check_events(events: Iterator[Any]) -> None:
    """Goes through YAML as it stands, before anything is built from it."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("anchors (&) and aliases (*) are not read; write the value out")
        if getattr(event, "tag", None) not in (None, "!", *_PLAIN_TAGS):
            raise ValueError(f"the tag {shown(event.tag)} is not read; leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")


def _check(content: Any, *, surrogates: bool) -> None:
    """Goes through what was read, without recursion."""
    level, depth = [content], 0
    while level:
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
                if surrogates:
                    below += value
            elif isinstance(value, list):
                below += value
            elif surrogates and isinstance(value, str):
                _check_text(value)
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} holds half a surrogate pair") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return int(digits)
