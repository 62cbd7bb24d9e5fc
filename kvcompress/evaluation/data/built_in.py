"""Data that is made rather than read: scenes, pages, needles in haystacks, and English text."""

from __future__ import annotations

import random
from collections.abc import Collection

from kvcompress.errors import ConfigError, did_you_mean
from kvcompress.evaluation.data.sample import TEXT, Sample
from kvcompress.evaluation.pages import ASKED, draw_page, page_seed, question, sample_page
from kvcompress.evaluation.pages import KINDS as PAGES
from kvcompress.evaluation.perplexity import english_text
from kvcompress.evaluation.shapes import Question, Scene, ask, describe_question, draw_scene, sample_scene, scene_seed
from kvcompress.evaluation.shapes.questions import KINDS

_DESCRIPTION = "description"
_CODE_DIGITS = 6
_PLACES = (
    "the lighthouse",
    "the old mill",
    "the north gate",
    "the wine cellar",
    "the observatory",
    "the boat house",
    "the green door",
    "the archive",
)


def shapes(*, count: int = 100, seed: int = 0, kind: str | None = None) -> list[Sample]:
    """Questions about held-out scenes of ShapesLLaVA, one a scene.

    Args:
        count: of scenes.
        seed: of what is asked about them.
        kind: of all questions; None goes through all kinds in turn, "description" first.

    Raises:
        ConfigError: if there is no such kind.
    """
    kinds = [_DESCRIPTION, *KINDS]
    _check_kind(kind, kinds)
    samples: list[Sample] = []
    index = 0
    while len(samples) < count:
        scene = sample_scene(scene_seed("test", index))
        asked = _ask(scene, kind or kinds[len(samples) % len(kinds)], seed)
        if asked is not None:  # not every scene has something that could be asked about in every way
            name = f"test-{index:06}-{asked.kind}"
            samples.append(Sample(name, asked.text, asked.answer, picture=draw_scene(scene), kind=asked.kind))
        index += 1
    return samples


def pages(*, count: int = 40, seed: int = 0, kind: str | None = None) -> list[Sample]:
    """Questions about held-out pages of PagesLLaVA, one a page, each with the words that its answer begins with.

    Args:
        count: of pages.
        seed: of what is asked about them.
        kind: of all questions; None goes through all kinds in turn, "letter" first.

    Raises:
        ConfigError: if there is no such kind.
    """
    _check_kind(kind, ASKED)
    samples = []
    for index in range(count):
        asked_as = kind or ASKED[index % len(ASKED)]
        page = sample_page(asked_as if asked_as in PAGES else PAGES[0], page_seed("test", index))
        asked = question(page, asked_as, seed)
        samples.append(
            Sample(
                f"test-{index:06}-{asked_as}",
                asked.text,
                asked.answer,
                picture=draw_page(page),
                kind=asked_as,
                answer_prefix=asked.prefix,
                max_new_tokens=asked.tokens,
            )
        )
    return samples


def needle(*, count: int = 20, seed: int = 0, length: int = 1000, depth: float | None = None) -> list[Sample]:
    """A sentence with a code hidden in English prose, and the question for that code.

    Source: the "needle in a haystack" test (Kamradt, 2023); haystack and needles are our own.

    Args:
        count: of samples.
        seed: of codes, places and where a haystack begins.
        length: words of the haystack.
        depth: where the needle is, from 0 (the haystack's start) to 1 (its end); None spreads the samples evenly over
            that range.

    Raises:
        ConfigError: if length or depth is out of range.
    """
    words = english_text().split()
    if not 1 <= length <= len(words):
        raise ConfigError(f"length: must be from 1 to {len(words):,} words; got {length}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth: must be from 0 to 1; got {depth}")
    samples = []
    for index in range(count):
        draw = random.Random(f"needle {seed} {index}")
        begin = draw.randint(0, len(words) - length)
        code, place = str(draw.randrange(10 ** (_CODE_DIGITS - 1), 10**_CODE_DIGITS)), draw.choice(_PLACES)
        share = depth if depth is not None else index / max(1, count - 1)
        before = round(share * length)
        hay = words[begin : begin + length]
        hidden = f"The secret code of {place} is {code}."
        story = " ".join([*hay[:before], hidden, *hay[before:]])
        prompt = f"{story}\n\nWhat is the secret code of {place}? Answer with the number alone."
        samples.append(Sample(f"needle-{index:04}-depth-{share:.2f}", prompt, code, kind="needle", context=story))
    return samples


def text(*, count: int = 10, seed: int = 0, length: int = 800, answer: int = 60) -> list[Sample]:
    """Pieces of English prose and their continuations, spread evenly over Python's own manual.

    Args:
        count: of samples.
        seed: moves all pieces by the same number of words.
        length: words of each prompt.
        answer: words of each continuation.

    Raises:
        ConfigError: if the text is too short for so many pieces that do not overlap.
    """
    pieces = split_text(english_text(), length, answer)
    if not 1 <= count <= len(pieces):
        raise ConfigError(f"samples: the text gives 1 to {len(pieces)} of {length} + {answer} words; got {count}")
    begin = random.Random(seed).randrange(len(pieces)) if seed else 0
    chosen = [(begin + number * len(pieces) // count) % len(pieces) for number in range(count)]
    return [Sample(f"text-{index:05}", *pieces[index], kind=TEXT) for index in chosen]


def split_text(text: str, length: int, answer: int) -> list[tuple[str, str]]:
    """Cuts text into prompts of `length` words and continuations of `answer` words, white space kept.

    A text shorter than one piece is one piece, cut in that proportion.
    """
    if length < 1 or answer < 1:
        raise ConfigError(f"length, answer: must be at least 1 word; got {length} and {answer}")
    ends = [position for position, character in enumerate(text) if character.isspace() and _ends_word(text, position)]
    if text and not text[-1].isspace():
        ends.append(len(text))
    if 2 <= len(ends) < length + answer:
        length = min(len(ends) - 1, max(1, len(ends) * length // (length + answer)))
        answer = len(ends) - length
    step = length + answer
    pieces, start = [], 0
    for first in range(0, len(ends) - step + 1, step):
        middle, end = ends[first + length - 1], ends[first + step - 1]
        pieces.append((text[start:middle].lstrip(), text[middle:end]))
        start = end
    return pieces


def _check_kind(kind: str | None, known: Collection[str]) -> None:
    if kind is not None and kind not in known:
        raise ConfigError(f"kind: unknown '{kind}'{did_you_mean(kind, known)}; known: {', '.join(known)}")


def _ends_word(text: str, position: int) -> bool:
    return position > 0 and not text[position - 1].isspace()


def _ask(scene: Scene, kind: str, seed: int) -> Question | None:
    return describe_question(scene) if kind == _DESCRIPTION else ask(scene, kind, seed)
