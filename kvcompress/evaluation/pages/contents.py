"""Pages made from a seed: what stands in which patch, and what a page can be asked about."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvcompress.errors import ConfigError
from kvcompress.evaluation.pages.vocabulary import NEWLINE, TOKENS, pieces, sentences
from kvcompress.evaluation.splits import split_seed

SIDE = 24  # patches, each way
CELLS = SIDE**2
_WIDTH = 6  # patches of a row of a table, a chart or a scene; four of them go on a line
COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 70, 220),
    "green": (30, 150, 50),
    "yellow": (235, 205, 30),
    "orange": (240, 130, 20),
    "purple": (140, 50, 180),
    "brown": (120, 75, 35),
    "pink": (240, 90, 160),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
NAMES = tuple(
    "boat house tree bread garden school river stone clock tower market bridge window ship horse paper music bank cat "
    "dog fish bird milk salt iron gold silver glass wood coffee tea water fire snow rain wind moon king queen doctor "
    "teacher farmer apple table chair door lamp book road hill lake sand coal oil honey butter".split()
)
_KINDS_OF_PLACE = tuple("mill house tower gate bridge hall garden market school church station".split())
_WHICH = tuple("old new north south east west stone iron green river upper lower long small".split())


class Cell(NamedTuple):
    """One patch.

    Attributes:
        text: the token that a reader gets from it.
        look: "text"; "bar", whose length stands for a digit; or the "left" or "right" half of an object.
        thing: colour and shape of that object.
    """

    text: str
    look: str = "text"
    thing: tuple[str, str] = ("", "")


_THINGS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
LOOKS = (  # all ways in which a patch can look
    *(Cell(token) for token in TOKENS),
    *(Cell(str(digit), "bar") for digit in range(10)),
    *(Cell(f" {colour}", "left", (colour, shape)) for colour, shape in _THINGS),
    *(Cell(f" {shape}", "right", (colour, shape)) for colour, shape in _THINGS),
)


@dataclass(frozen=True)
class Fact:
    """Something that a page shows once.

    Attributes:
        name: whose it is.
        value: as text.
        at: the patch that it begins in, from 0 (top left), in reading order.
    """

    name: str
    value: str
    at: int


@dataclass(frozen=True)
class Page:
    """Patches in reading order, `SIDE` a line.

    Attributes:
        kind: one of `KINDS`.
        seed: what it was made from, and what its jitter and colours are drawn from.
        cells: the patches.
        facts: what can be asked about.
    """

    kind: str
    seed: int
    cells: tuple[Cell, ...]
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        """The page as a reader has it."""
        return "".join(cell.text for cell in self.cells)


def page_seed(split: str, index: int) -> int:
    """The seed of a page of a split, as `split_seed` has them: "train", "validation" or "test"."""
    return split_seed(split, index)


def sample_page(kind: str, seed: int) -> Page:
    """Makes a page.

    Args:
        kind: "letter" (prose with codes in it), "table" (names with numbers), "chart" (names with bars), "scene" (names
            with coloured objects); the last three stand within prose.
        seed: a number.

    Raises:
        ConfigError: if there is no such kind.
    """
    if kind not in _MAKERS:
        raise ConfigError(f"kind: unknown '{kind}'; known: {', '.join(KINDS)}")
    cells, facts = _MAKERS[kind](random.Random(f"{kind} {seed}"))
    return Page(kind, seed, tuple(cells), tuple(facts))


def plain(text: str) -> list[Cell]:
    """Patches that show a text, one a token."""
    return [Cell(piece) for piece in pieces(text)]


def prose(draw: random.Random, count: int) -> list[Cell]:
    """So many patches of sentences in any order; the last may be cut."""
    found: list[Cell] = []
    known = sentences()
    while len(found) < count:
        found += map(Cell, known[draw.randrange(len(known))])
    return found[:count]


def _letter(draw: random.Random) -> tuple[list[Cell], list[Fact]]:
    count = 2
    places = [f"the {which} {what}" for which in _WHICH for what in _KINDS_OF_PLACE if which != what]
    cells: list[Cell] = []
    facts = []
    for place in draw.sample(places, count):
        cells += prose(draw, draw.randint(20, CELLS // count - 40))
        code = str(draw.randint(100, 999))
        said = plain(f" The secret code of {place} is {code}.")
        facts.append(Fact(place, code, len(cells) + len(said) - len(code) - 1))
        cells += said
    return cells + prose(draw, CELLS - len(cells)), facts


def _within_prose(draw: random.Random, rows: Sequence[Sequence[Cell]]) -> tuple[list[Cell], list[int]]:
    """Rows as whole lines somewhere on a page of prose, and where each begins."""
    taken = len(rows) * _WIDTH
    before = draw.randint(1, (CELLS - taken) // SIDE - 1) * SIDE
    begins = [before + number * _WIDTH for number in range(len(rows))]
    cells = [*prose(draw, before - 1), Cell(NEWLINE), *(cell for row in rows for cell in row)]
    return cells + prose(draw, CELLS - len(cells)), begins


def _rows(draw: random.Random, least: int, most: int) -> list[str]:
    """Names, as many as fill lines."""
    return draw.sample(NAMES, draw.randint(least // 4, most // 4) * 4)


def _table(draw: random.Random) -> tuple[list[Cell], list[Fact]]:
    values = [(name, str(draw.randint(10, 99))) for name in _rows(draw, 16, 40)]
    rows = [plain(f" {name} : {value}\n") for name, value in values]
    cells, begins = _within_prose(draw, rows)
    return cells, [Fact(name, value, at + 3) for (name, value), at in zip(values, begins, strict=True)]


def _chart(draw: random.Random) -> tuple[list[Cell], list[Fact]]:
    values = [(name, str(draw.randint(10, 99))) for name in _rows(draw, 16, 32)]
    rows = [[*plain(f" {name} : "), *(Cell(digit, "bar") for digit in value), Cell(NEWLINE)] for name, value in values]
    cells, begins = _within_prose(draw, rows)
    return cells, [Fact(name, value, at + 3) for (name, value), at in zip(values, begins, strict=True)]


def _scene(draw: random.Random) -> tuple[list[Cell], list[Fact]]:
    objects = [(name, draw.choice(list(COLOURS)), draw.choice(SHAPES)) for name in _rows(draw, 12, 20)]
    rows = []
    for name, colour, shape in objects:
        thing = (colour, shape)
        halves = [Cell(f" {colour}", "left", thing), Cell(f" {shape}", "right", thing)]
        rows.append([*plain(f" The {name} :"), *halves, Cell(NEWLINE)])
    cells, begins = _within_prose(draw, rows)
    return cells, [Fact(o[0], f"{o[1]} {o[2]}", at + 3) for o, at in zip(objects, begins, strict=True)]


_MAKERS: dict[str, Callable[[random.Random], tuple[list[Cell], list[Fact]]]] = {
    "letter": _letter,
    "table": _table,
    "chart": _chart,
    "scene": _scene,
}
KINDS = tuple(_MAKERS)
