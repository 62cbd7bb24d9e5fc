"""Questions about pages, with the words that an answer begins with: SmolLM2 repeats what it read."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvcompress.errors import ConfigError
from kvcompress.evaluation.pages.contents import CELLS, KINDS, Page

READ = "read"
ASKED = (*KINDS, READ)
_GIVEN, _ALOUD = 12, 50  # tokens of a stretch that are given, and that are to be read on


@dataclass(frozen=True)
class Question:
    """A question about a page.

    Attributes:
        kind: one of `ASKED`.
        text: what the user says.
        prefix: what the answer begins with.
        answer: how it goes on, as the page has it.
        tokens: of `answer`.
        at: the patch that the answer begins in.
    """

    kind: str
    text: str
    prefix: str
    answer: str
    tokens: int
    at: int


def question(page: Page, kind: str, seed: int = 0) -> Question:
    """Asks about one of the things that a page shows, or to read a stretch of it aloud.

    A table, a chart and a scene are asked row by row: the answer begins with the two rows above, as if read from there.

    Args:
        page: the page.
        kind: the page's own, or `READ`.
        seed: of the choice.

    Raises:
        ConfigError: if the page is not asked that way.
    """
    if kind not in (READ, page.kind):
        raise ConfigError(f"kind: a page of kind '{page.kind}' is asked as {page.kind} or {READ}; got '{kind}'")
    draw = random.Random(f"{kind} {page.seed} {seed}")
    if kind == READ:
        return _read(page, draw)
    if kind == "letter":
        fact = draw.choice(page.facts)
        text, prefix = f"What is the secret code of {fact.name}?", f"The secret code of {fact.name} is "
    else:
        number = draw.randrange(2, len(page.facts))
        above, fact = page.facts[number - 2 : number], page.facts[number]
        the, text = (
            ("The ", f"What is the {fact.name}?") if kind == "scene" else ("", f"What is the number of {fact.name}?")
        )
        prefix = "".join(f"{the}{one.name} : {one.value}\n " for one in above) + f"{the}{fact.name} :"
        prefix += "" if kind == "scene" else " "  # before digits a space is a token of its own
    answer = f" {fact.value}" if kind == "scene" else fact.value
    return Question(kind, text, prefix, answer, 3 if kind == "letter" else 2, fact.at)


def _read(page: Page, draw: random.Random) -> Question:
    """A stretch from the start of a word on."""
    starts = [at for at in range(CELLS - _GIVEN - _ALOUD) if page.cells[at].text[:1] == " " != page.cells[at].text]
    start = draw.choice(starts)
    middle = start + _GIVEN
    given, wanted = (
        "".join(cell.text for cell in page.cells[a : a + n]) for a, n in ((start, _GIVEN), (middle, _ALOUD))
    )
    return Question(READ, "Read the page aloud.", given.lstrip(" "), wanted, _ALOUD, middle)
