"""The tokens that pages are made of: pieces of English that are one token each to SmolLM2."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from kvcompress.errors import ConfigError
from kvcompress.evaluation.perplexity import english_text

TOKENS: tuple[str, ...] = tuple(json.loads((Path(__file__).parent / "vocabulary.json").read_text(encoding="utf-8")))
NUMBER = {token: number for number, token in enumerate(TOKENS)}
BLANK, NEWLINE = " ", "\n"
LONGEST = max(map(len, TOKENS))  # characters
_PIECE = re.compile(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\n| ")
# without contractions, which the tokenizer cuts before their apostrophe
_SENTENCE = re.compile(r"(?!.*[A-Za-z]'[A-Za-z])[A-Z][A-Za-z ,;:.()'\"-]{30,240}[.!?]")


def pieces(text: str) -> list[str]:
    """Cuts text where SmolLM2's tokenizer does.

    Raises:
        ConfigError: if a piece of it is not in the vocabulary.
    """
    found = _PIECE.findall(text)
    unknown = next((piece for piece in found if piece not in NUMBER), None)
    if unknown is not None or "".join(found) != text:
        raise ConfigError(f"text: {unknown or text!r} is not in the vocabulary of pages")
    return found


@cache
def sentences() -> tuple[tuple[str, ...], ...]:
    """Sentences of Python's manual that the vocabulary covers, in pieces; each begins with a space."""
    found = []
    for paragraph in re.split(r"\n\s*\n", english_text()):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            cut = _PIECE.findall(f" {sentence}")
            if _SENTENCE.fullmatch(sentence) and "".join(cut) == f" {sentence}" and all(p in NUMBER for p in cut):
                found.append(tuple(cut))
    return tuple(found)
