"""Image dialogues in LLaVA's public format: a JSON list of `image` and `conversations`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError
from kvcompress.files import parse_json, picture_path, read_text, write_text

_IMAGE = "<image>"


@dataclass(frozen=True)
class Conversation:
    """A dialogue about one image, or about none.

    Attributes:
        name: its id.
        image: path of the image; None for a dialogue of text alone.
        turns: questions, without the image's token, and answers.
    """

    name: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]


def read_conversations(path: Path, images: Path | None = None) -> list[Conversation]:
    """Reads dialogues: `conversations` with `from` and `value`, `id`, and `image` if there is one.

    `model`, as LLaVA's own files have it, and `metadata` are for the reader of the file; other fields are refused.

    Args:
        path: the JSON file.
        images: the folder that image paths are relative to; the file's own if None.

    Raises:
        ConfigError: if the file cannot be read or is no such list, naming the entry.
    """
    entries = parse_json(read_text(path, "conversations"), f"conversations {path}:")
    if not isinstance(entries, list):
        raise ConfigError(f"conversations {path}: must hold a list of dialogues; got {type(entries).__name__}")
    folder = path.parent if images is None else images
    return [_read(entry, folder, f"conversations {path}: entry {index}") for index, entry in enumerate(entries)]


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Writes dialogues; images lie in the file's folder or below it, and are named relative to it."""
    entries = []
    for conversation in conversations:
        entry: dict[str, Any] = {"id": conversation.name}
        if conversation.image is not None:
            entry["image"] = conversation.image.relative_to(path.parent).as_posix()
        said = []
        for number, (question, answer) in enumerate(conversation.turns):
            shown = f"{_IMAGE}\n{question}" if number == 0 and conversation.image is not None else question
            said += [{"from": "human", "value": shown}, {"from": "gpt", "value": answer}]
        entries.append({**entry, "conversations": said})
    write_text(path, json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "conversations")


def check_fields(where: str, entry: dict[str, Any], *known: tuple[str, ...], unread: tuple[str, ...] = ()) -> None:
    """Refuses a record with a field that nothing would be done with.

    Args:
        where: the file and the place in it.
        entry: the record.
        *known: what is read; of the names in one tuple, which mean the same, an entry may have one.
        unread: what a record may have for its reader alone.

    Raises:
        ConfigError: naming the field.
    """
    for names in known:
        both = [name for name in names if name in entry]
        if len(both) > 1:
            raise ConfigError(f"{where}: has both '{both[0]}' and '{both[1]}', which mean the same; leave one out")
    everything = [*(name for names in known for name in names), *unread]
    for name in entry:
        if name not in everything:
            raise ConfigError(
                f"{where}: unknown field {reprlib.repr(name)}; known: {', '.join(everything)}. "
                "What the model is not to see goes into 'metadata'"
            )


def _read(entry: Any, folder: Path, where: str) -> Conversation:
    said = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(said, list) or not all(
        isinstance(part, dict) and {"from", "value"} <= set(part) for part in said
    ):
        raise ConfigError(f"{where}: must have 'conversations', a list of objects with 'from' and 'value'")
    check_fields(where, entry, ("id",), ("image",), ("conversations",), unread=("model", "metadata"))
    for number, part in enumerate(said):
        check_fields(f"{where}: turn {number}", part, ("from",), ("value",), unread=("metadata",))
    speakers = [part["from"] for part in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise ConfigError(
            f"{where}: 'from' must be human and gpt in turn; got {', '.join(map(str, speakers)) or 'none'}"
        )
    values = [str(part["value"]) for part in said]
    turns = tuple(
        (question.replace(_IMAGE, "").strip(), answer)
        for question, answer in zip(values[::2], values[1::2], strict=True)
    )
    image = entry.get("image")
    return Conversation(str(entry.get("id", "")), None if image is None else picture_path(folder, image, where), turns)
