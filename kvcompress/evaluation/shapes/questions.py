"""Questions about a scene with their right answers, and the words they are made of."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcompress.evaluation.shapes.scenes import COLOURS, GRID, SHAPES, SIZES, Scene, Thing, describe

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
# A place is one token a half ("row 2", "column 3"), so that no decoder must first learn which number is which.
PLACES = tuple(f"{axis} {number}" for axis in ("row", "column") for number in range(1, GRID + 1))
WORDS = (
    *PLACES,
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    *SIZES,
    *(str(number) for number in range(GRID * GRID + 1)),
    *"what is in which colour shape the object objects how many there a are more than left of above".split(),
    *"describe image nothing yes no : . , ?".split(),
)
DESCRIBE = "describe the image."


@dataclass(frozen=True)
class Question:
    """A question and its one right answer.

    Attributes:
        kind: what is asked for: one of `KINDS`, or "description".
        text: the question.
        answer: the right answer, to the letter.
    """

    kind: str
    text: str
    answer: str


def describe_question(scene: Scene) -> Question:
    """Asks for the whole scene."""
    return Question("description", DESCRIBE, describe(scene.things))


def _cell(scene: Scene, draw: random.Random) -> Question:
    row, column = draw.randint(1, GRID), draw.randint(1, GRID)
    if scene.at(row, column) is None and draw.random() < 0.4:  # "nothing" is learned soonest
        thing = draw.choice(scene.things)
        row, column = thing.row, thing.column
    return Question("cell", f"what is in row {row} column {column}?", str(scene.at(row, column) or "nothing"))


def _colour(scene: Scene, draw: random.Random) -> Question | None:
    unique = _unique(scene, lambda thing: (thing.size, thing.shape))
    if not unique:
        return None
    thing = draw.choice(unique)
    return Question("colour", f"which colour is the {thing.size} {thing.shape}?", thing.colour)


def _shape(scene: Scene, draw: random.Random) -> Question | None:
    unique = _unique(scene, lambda thing: (thing.size, thing.colour))
    if not unique:
        return None
    thing = draw.choice(unique)
    return Question("shape", f"which shape is the {thing.size} {thing.colour} object?", thing.shape)


def _count(scene: Scene, draw: random.Random) -> Question:
    what = draw.random()
    if what < 0.4:
        colours = [thing.colour for thing in scene.things]
        colour = draw.choice(colours) if draw.random() < 0.85 else draw.choice(list(COLOURS))
        return Question("count", f"how many {colour} objects?", str(colours.count(colour)))
    if what < 0.8:
        shapes = [thing.shape for thing in scene.things]
        shape = draw.choice(shapes) if draw.random() < 0.85 else draw.choice(SHAPES)
        return Question("count", f"how many {PLURALS[shape]}?", str(shapes.count(shape)))
    if what < 0.9:
        size = draw.choice(SIZES)
        return Question("count", f"how many {size} objects?", str(sum(thing.size == size for thing in scene.things)))
    return Question("count", "how many objects?", str(len(scene.things)))


def _exists(scene: Scene, draw: random.Random) -> Question:
    present = {(thing.colour, thing.shape) for thing in scene.things}
    if draw.random() < 0.5:
        colour, shape = draw.choice(sorted(present))
    else:  # of what is absent, mostly mixtures of what is there
        colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
        mixtures = [
            pair
            for pair in sorted((a.colour, b.shape) for a in scene.things for b in scene.things)
            if pair not in present
        ]
        if mixtures and draw.random() < 0.6:
            colour, shape = draw.choice(mixtures)
    return Question("exists", f"is there a {colour} {shape}?", "yes" if (colour, shape) in present else "no")


def _compare(scene: Scene, draw: random.Random) -> Question | None:
    if draw.random() < 0.5:
        colours = Counter(thing.colour for thing in scene.things)
        if len(colours) < 2:
            return None
        first, second = draw.sample(sorted(colours), 2)
        answer = "yes" if colours[first] > colours[second] else "no"
        return Question("compare", f"are there more {first} than {second} objects?", answer)
    unique = _unique(scene, lambda thing: (thing.colour, thing.shape))
    if len(unique) < 2:
        return None
    a, b = draw.sample(unique, 2)
    relation, true = ("left of", a.column < b.column) if draw.random() < 0.5 else ("above", a.row < b.row)
    text = f"is the {a.colour} {a.shape} {relation} the {b.colour} {b.shape}?"
    return Question("compare", text, "yes" if true else "no")


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "cell": _cell,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "compare": _compare,
}
# What a dialogue of short questions is made of, in shares of its questions.
_SHARES = {"cell": 0.36, "colour": 0.16, "shape": 0.16, "count": 0.16, "exists": 0.08, "compare": 0.08}


def ask(scene: Scene, kind: str, seed: int) -> Question | None:
    """One question of a kind; None if the scene has nothing that it could be asked about."""
    return KINDS[kind](scene, random.Random(f"{kind} {scene.seed} {seed}"))


def ask_several(scene: Scene, count: int, seed: int = 0, shares: dict[str, float] | None = None) -> list[Question]:
    """Different short questions of mixed kinds.

    Args:
        scene: what they are about.
        count: how many.
        seed: of the choice; another seed gives other questions about the same scene.
        shares: weight of each kind; None for mostly single cells.
    """
    draw = random.Random(f"{scene.seed} {seed}")
    shares = _SHARES if shares is None else shares
    questions: dict[str, Question] = {}
    while len(questions) < count:
        kind = draw.choices(list(shares), list(shares.values()))[0]
        question = KINDS[kind](scene, draw)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def _unique(scene: Scene, key: Callable[[Thing], tuple[str, str]]) -> list[Thing]:
    """The objects that are alone with what a question names them by."""
    found: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things:
        found.setdefault(key(thing), []).append(thing)
    return [things[0] for things in found.values() if len(things) == 1]


def right_objects(answer: str, scene: Scene) -> int:
    """How many objects of a scene a description names, each in its place and with all its attributes."""
    named: Iterable[str] = (part.strip() for part in answer.split("."))
    truth = {describe([thing]).rstrip(".") for thing in scene.things}
    return len(truth.intersection(named))
