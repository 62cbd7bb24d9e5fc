"""What the grid reads and compares for text: codes hidden in long documents, and how these go on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.grid_readings import Follow, Methods, Prompt, Way
from benchmarks.grid_ways import EVEN, LARGER, LAYER, OF_LAYERS, RUNS, SHARED, TEXT, WIDE, WINDOW, presets, ways
from kvcompress import CompressionConfig
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.perplexity import english_text

BATCH = 8
MORE = 32  # tokens of a continuation
# Names of as many tokens each, so that questions about them are one batch.
PLACES = (
    *("the old mill", "the boat house", "the clock tower", "the green house", "the north gate"),
    *("the stone bridge", "the river house", "the west tower", "the iron gate", "the city hall"),
)


class Haystack:
    """SmolLM2, Python's manual, and codes hidden in it."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Takes the manual in tokens, and what the chat template puts around a turn."""
        self.tokenizer = loaded.tokenizer
        self.text = self.ids(english_text())
        turn = [{"role": "user", "content": "@@"}]
        whole = str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        self.before, self.after = whole.split("@@")

    def ids(self, text: str) -> Tensor:
        """Tokens of a text alone."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    def document(
        self, tokens: int, needles: Sequence[tuple[str, str]], depths: Sequence[float], start: int
    ) -> tuple[Tensor, Tensor]:
        """A document of so many tokens with codes at some depths, and what follows it in the manual."""
        said = [self.ids(f" The secret code of {place} is {code}. ") for place, code in needles]
        lead = self.ids(self.before)
        room = tokens - lead.shape[1] - sum(part.shape[1] for part in said)
        hay, parts, at = self.text[:, start : start + room], [lead], 0
        for depth, needle in zip(depths, said, strict=True):
            end = round(depth * room)
            parts += [hay[:, at:end], needle]
            at = end
        return torch.cat([*parts, hay[:, at:]], 1), self.text[:, start + room : start + room + MORE]

    def question(self, place: str) -> Tensor:
        """Asks for a code, and begins the answer."""
        return self.ids(f"\n\nWhat is the secret code of {place}?{self.after}The secret code of {place} is ")


def needles(loaded: LoadedModel, count: int, tokens: int = 1400) -> Iterator[Prompt]:
    """A code in a document, asked for with it; and how the document goes on."""
    hay = Haystack(loaded)
    apart = (hay.text.shape[1] - tokens - 64) // 32
    for group in range(0, count, BATCH):
        draw = random.Random(f"needle {group}")
        place, parts = draw.choice(PLACES), []
        for number in range(group, min(group + BATCH, count)):
            code, turn = str(draw.randrange(100_000, 1_000_000)), (number * 13) % 32
            made = hay.document(tokens, [(place, code)], [(turn + 0.5) / 32], number % 32 * apart)
            parts.append((*made, hay.ids(code)))
        document, more, answer = (torch.cat(part) for part in zip(*parts, strict=True))
        question = hay.question(place).expand(len(document), -1)
        yield Prompt(f"{group}", "seen", {"input_ids": torch.cat([document, question], 1)}, {"code": Follow(answer)})
        yield Prompt(f"{group}", "unseen", {"input_ids": document}, {"text": Follow(more)})


def many(loaded: LoadedModel, count: int, tokens: int = 1400) -> Iterator[Prompt]:
    """Ten codes in a document, all asked for after it."""
    hay = Haystack(loaded)
    apart = (hay.text.shape[1] - tokens - 64) // 32
    for number in range(count):
        draw = random.Random(f"many {number}")
        places = draw.sample(PLACES, len(PLACES))
        codes = [str(draw.randrange(100_000, 1_000_000)) for _ in places]
        depths = sorted(draw.random() for _ in places)
        document, _ = hay.document(tokens, list(zip(places, codes, strict=True)), depths, number % 32 * apart)
        question = torch.cat([hay.question(place) for place in places])
        answers = torch.cat([hay.ids(code) for code in codes])
        follows = {"codes": Follow(torch.cat([question, answers], 1), question.shape[1])}
        yield Prompt(f"{number}", "ten", {"input_ids": document}, follows)


def needle_methods() -> Methods:
    """For long text."""
    return {
        "snapkv": ways(TEXT, "snapkv", SHARED) | ways(TEXT, "snapkv", EVEN, LARGER),
        "attention": ways(TEXT, "attention", SHARED, WIDE) | presets("h2o"),
        "expected": ways(TEXT, "expected_attention", SHARED, WIDE),
        "tova": ways(TEXT, "tova", OF_LAYERS, evictor=LAYER) | ways(TEXT, "tova", EVEN, LARGER, evictor=LAYER),
        "none": presets("streaming"),
        "snapkv 16 in runs": ways(TEXT, WINDOW, {**SHARED, **EVEN}, evictor=RUNS),
        "window8": ways(TEXT, {"name": "snapkv", "window": 8}, {"uniform": "uniform"}, LARGER),
    }


def short(loaded: LoadedModel, count: int) -> Iterator[Prompt]:
    """The same in documents of 500 tokens."""
    yield from needles(loaded, count, 500)


def short_methods() -> Methods:
    """For short text: how long runs should be."""
    runs = {}
    for length in (4, 6, 8, 12):
        runs[f"runs of {length}"] = ways(TEXT, WINDOW, {"": "uniform"}, evictor={**RUNS, "length": length})[""]
    return {
        "snapkv 16": {**runs, "token by token": ways(TEXT, WINDOW, {"": "uniform"})[""]},
        "attention": presets("h2o"),
        "tova": ways(TEXT, "tova", {"uniform": "uniform"}, evictor=LAYER),
        "none": presets("streaming"),
    }


def many_methods() -> Methods:
    """For many questions on one document."""
    some = {name: SHARED[name] for name in ("uniform", "headprefix", "adakv")}
    mended = {**OF_LAYERS, **EVEN}
    return {
        "kvzip": ways(TEXT, "kvzip", some, (0.3,)) | ways(TEXT, "kvzip", {"scores": "scores"}),
        "snapkv 16 in runs": ways(TEXT, WINDOW, {"uniform": "uniform"}, (0.3,), RUNS),
        "snapkv": ways(TEXT, "snapkv", some, (0.3,)),
        "expected": ways(TEXT, "expected_attention", some, (0.3,)),
        "tova": ways(TEXT, "tova", mended, (0.3,), evictor=LAYER),
        "none": {"streaming": Way(CompressionConfig.preset("streaming"), (0.3,))},
    }
