"""Readers of data files in public formats; each gives samples and names what is wrong with an entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError, shown
from kvcompress.evaluation.conversations import check_fields, read_conversations
from kvcompress.evaluation.data.built_in import split_text
from kvcompress.evaluation.data.sample import TEXT, Sample
from kvcompress.files import parse_json, picture_path, read_text

FORMATS = (".json", ".jsonl", ".txt")
TEXT_WORDS = (800, 60)  # of a plain text's prompts and continuations
# What a question may have; of names in one row a record has one. Those of the last row are for its reader alone.
_QUESTION = ("question", "prompt", "text")
_CONTEXT = ("context",)
_ANSWER = ("answer",)
_IMAGE = ("image", "imagename")
_NAME = ("id", "question_id")
_KIND = ("kind", "category", "capability")
_PREFIX, _MOST = ("answer_prefix",), ("max_new_tokens",)
_SEVERAL = "questions"  # on one context
_UNREAD = ("imagesource", "metadata")
_IMAGE_TOKEN = "<image>"


def read_file(path: Path, images: Path | None) -> list[Sample]:
    """Reads samples by the file's suffix and, for JSON, by its form.

    Args:
        path: the file.
        images: the folder that image paths are relative to; None for the file's own, and for MM-Vet's form the folder
            `images` beside it where there is one.

    Raises:
        ConfigError: if the suffix is none of `FORMATS`, the file cannot be read or has another form.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"data {path}: the file name must end in one of {', '.join(FORMATS)}")
    content = read_text(path, "data")
    if path.suffix == ".txt":
        pieces = split_text(content, *TEXT_WORDS)
        return [Sample(f"{path.stem}-{number:05}", *piece, kind=TEXT) for number, piece in enumerate(pieces)]
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        return [
            sample
            for number, line in lines
            for sample in _record(
                parse_json(line, f"data {path}: line {number}:"), path, images, f"data {path}: line {number}"
            )
        ]
    entries = parse_json(content, f"data {path}:")
    if isinstance(entries, dict):
        return [sample for name, entry in entries.items()
                for sample in _record(_named(entry, name), path, images, f"data {path}: entry '{name}'")]  # fmt: skip
    if isinstance(entries, list) and any(isinstance(entry, dict) and "conversations" in entry for entry in entries):
        return _conversations(path, images)
    if isinstance(entries, list):
        return [sample for number, entry in enumerate(entries)
                for sample in _record(entry, path, images, f"data {path}: entry {number}")]  # fmt: skip
    raise ConfigError(
        f"data {path}: must hold a list of dialogues (LLaVA), a list of questions, or an object of questions by id "
        f"(MM-Vet); got {type(entries).__name__}"
    )


def _conversations(path: Path, images: Path | None) -> list[Sample]:
    """The first question of each dialogue."""
    return [
        Sample(dialogue.name, *dialogue.turns[0], image=dialogue.image, folder=images or path.parent)
        for dialogue in read_conversations(path, images)
    ]


def _record(entry: Any, path: Path, images: Path | None, where: str) -> list[Sample]:
    """A record as samples: one, or one for each of its `questions`, which share all else that it says."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be an object with 'question' and 'answer'; got {type(entry).__name__}")
    if _SEVERAL not in entry:
        return [_question(entry, path, images, where)]
    check_fields(where, entry, (_SEVERAL,), _CONTEXT, _IMAGE, _NAME, _KIND, unread=_UNREAD)
    asked, shared = entry[_SEVERAL], {name: value for name, value in entry.items() if name != _SEVERAL}
    if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
        raise ConfigError(f"{where}: '{_SEVERAL}' must be a list of objects with 'question' and 'answer'")
    record = _first(entry, _NAME)
    samples = []
    for number, one in enumerate(asked):
        place = f"{where}: question {number}"
        check_fields(place, one, _QUESTION, _ANSWER, _NAME, _KIND, _PREFIX, _MOST, unread=_UNREAD)
        own = {name: value for name, value in shared.items() if name not in _NAME}
        if _first(one, _KIND) is not None:
            own = {name: value for name, value in own.items() if name not in _KIND}
        if _first(one, _NAME) is None and record is not None:
            own[_NAME[0]] = record if isinstance(record, (list, dict)) else f"{record}-{number}"
        samples.append(_question({**own, **one}, path, images, place))
    return samples


def _question(entry: dict[str, Any], path: Path, images: Path | None, where: str) -> Sample:
    """One record as a sample: a document (`context`) comes before the question, with an empty line between."""
    check_fields(where, entry, _QUESTION, _CONTEXT, _ANSWER, _IMAGE, _NAME, _KIND, _PREFIX, _MOST, unread=_UNREAD)
    question, context = _first(entry, _QUESTION), _first(entry, _CONTEXT)
    if not isinstance(question, str):
        raise ConfigError(f"{where}: must have {' or '.join(map(repr, _QUESTION))}, a text; has {', '.join(entry)}")
    prefix, most = _first(entry, _PREFIX), _first(entry, _MOST)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigError(f"{where}: 'max_new_tokens' must be a whole number from 1; got {shown(most)}")
    for name, value in (("context", context), ("image", _first(entry, _IMAGE)), ("answer_prefix", prefix)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: '{name}' must be a text; got {type(value).__name__}")
    answer, name, image = (_first(entry, names) for names in (_ANSWER, _NAME, _IMAGE))
    for field, value in (("answer", answer), ("id", name)):
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{where}: '{field}' must be one text or number; got {type(value).__name__}")
    folder = images
    if folder is None:
        folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    said = [part for each in (context, question) if (part := (each or "").replace(_IMAGE_TOKEN, "").strip())]
    return Sample(
        name="" if name is None else str(name),
        prompt="\n\n".join(said),
        answer=None if answer is None else str(answer),
        image=None if image is None else picture_path(folder, image, where),
        kind=_kind(_first(entry, _KIND), where),
        folder=None if image is None else folder,
        context=said[0] if len(said) == 2 else None,
        answer_prefix=(prefix or "").strip(),
        max_new_tokens=most,
    )


def _kind(given: Any, where: str) -> str:
    if given in (TEXT, [TEXT]):
        raise ConfigError(
            f"{where}: the kind '{TEXT}' is that of plain text without a chat template; name it otherwise"
        )
    if given is None or isinstance(given, str):
        return given or ""
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        return "+".join(given)
    raise ConfigError(f"{where}: {', '.join(map(repr, _KIND))} must be a text or a list of texts; got {shown(given)}")


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((entry[name] for name in names if name in entry), None)


def _named(entry: Any, name: str) -> dict[str, Any]:
    """An entry with its name in the file, unless it has one of its own."""
    fields = entry if isinstance(entry, dict) else {}
    return fields if any(own in fields for own in _NAME) else {"id": name, **fields}
