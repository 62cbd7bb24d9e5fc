"""What is left of a model's answers after compression, for many ways to compress: `python -m benchmarks.grid SUITE`.

A prompt is read once; from there it is scored once for every scorer, and cut in every way to every budget, each time in
a copy. What follows (a question and its right answer, or how a text goes on) is then read in one forward, the whole of
it kept, which gives the likelihood of the right answer and whether greedy decoding would have said it. So hundreds of
configurations cost hardly more than one, and all of them see the same prompts.

Every prompt's results are a line of a file in a folder; what is there already is not measured again.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.machine import about_line
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.step import Phase
from kvcompress.evaluation.models import LoadedModel, load_model
from kvcompress.evaluation.perplexity import english_text
from kvcompress.evaluation.shapes.measure import encode, held_out_scenes
from kvcompress.evaluation.shapes.questions import KINDS, ask, describe_question

Row = dict[str, Any]
BUDGETS = (0.1, 0.2, 0.3, 0.5)
LARGER = (0.2, 0.3, 0.5)
WIDE = (0.1, 0.3, 0.5)
BATCH = 8
MORE = 32  # tokens of a continuation
# Names of as many tokens each, so that questions about them are one batch.
PLACES = (
    *("the old mill", "the boat house", "the clock tower", "the green house", "the north gate"),
    *("the stone bridge", "the river house", "the west tower", "the iron gate", "the city hall"),
)


@dataclass(frozen=True)
class Follow:
    """What comes after a prompt.

    Attributes:
        ids: its tokens, `[batch, tokens]`; several rows for each prompt are asked of copies.
        first: the first of them that counts; those before it are the question.
    """

    ids: Tensor
    first: int = 0


@dataclass
class Prompt:
    """What is read before anything is compressed, a batch without padding, and what may follow it.

    Attributes:
        name: of the batch in its suite.
        task: what is measured.
        inputs: what the model is called with.
        follows: by name.
    """

    name: str
    task: str
    inputs: dict[str, Tensor]
    follows: dict[str, Follow]


@dataclass(frozen=True)
class Way:
    """A configuration and the budgets it is measured at."""

    config: CompressionConfig
    budgets: Sequence[float] = BUDGETS


Methods = dict[str, dict[str, Way]]  # what scores -> how the budget is shared


# -- one prompt --------------------------------------------------------------------------------------------------------


class Reading:
    """A prompt that was read, and can be compressed in many ways."""

    def __init__(self, loaded: LoadedModel, inputs: dict[str, Tensor]) -> None:
        """Reads it, and lets scores and evictions wait."""
        self.model = loaded.model
        self.cache = CompressedCache(self.model, "text")
        self.cache.activate_past_recording()
        start = time.process_time()
        self.logits = self.model(**inputs, **cache_argument(self.cache), logits_to_keep=1).logits[:, -1]
        self.seconds = time.process_time() - start

    def scored(self, config: CompressionConfig) -> CompressedCache:
        """A copy that a scorer has looked at, which still holds everything."""
        cache = beside(self.cache)
        cache._state.adopt(config)
        cache.ranked()
        for layer in cache._state.layers:
            layer.unscored = None
        return cache


def beside(cache: CompressedCache) -> CompressedCache:
    """A copy that shares the tensors, none of which is written to before they are cut."""
    state = cache._state
    tensors = [one for layer in state.layers for one in (*vars(layer.store).values(), *vars(layer).values())]
    tensors += [one for layer in state.layers if layer.unscored for one in (layer.unscored.query, layer.unscored.lse)]
    return copy.deepcopy(cache, {id(one): one for one in tensors if isinstance(one, Tensor)})


def compressed(scored: CompressedCache, config: CompressionConfig) -> CompressedCache:
    """A copy of what was scored, cut by an allocator and an evictor to a budget."""
    cache = copy.deepcopy(scored) if config.evictor is None or config.merger is not None else beside(scored)
    state = cache._state
    state.adopt(config)
    for layer in state.layers:
        if config.allocator.by_head:
            before, layer.store = layer.store, layer._new_store()
            keys, values = before.dense()
            layer.store.append(keys[:, :, : layer.slots], values[:, :, : layer.slots], 0)
    state.recording, state.waiting = False, Phase.PREFILL
    cache.compress()
    return cache


def reconstructed(loaded: LoadedModel, inputs: dict[str, Tensor]) -> CompressedCache:
    """A copy scored by the prompt's repetition, which still holds everything."""
    cache = CompressedCache(loaded.model, "text", budget=1.0, scorer="kvzip")
    cache.score_by_reconstruction(loaded.tokenizer, inputs)
    return cache


def followed(model: Any, cache: CompressedCache, logits: Tensor | None, follow: Follow) -> list[list[float]]:
    """For each row: nats of the tokens that count, their number, and 1 if each of them is the likeliest, or else 0.

    Args:
        model: the model.
        cache: what it holds of the prompts; changed.
        logits: of the first token that follows; None where it does not count.
        follow: what follows.
    """
    wanted = follow.ids[:, follow.first :]
    count = wanted.shape[1]
    fed = [] if logits is None or follow.first else [logits.unsqueeze(1)]
    if follow.ids.shape[1] > 1:
        more = count - len(fed)
        fed.append(model(follow.ids[:, :-1], **cache_argument(cache), logits_to_keep=more).logits[:, -more:])
    found = torch.cat(fed, 1).float()
    nats = F.cross_entropy(found.transpose(1, 2), wanted, reduction="none").sum(1)
    right = (found.argmax(-1) == wanted).all(1)
    return [[round(float(one), 4), count, int(hit)] for one, hit in zip(nats, right, strict=True)]


def measured(loaded: LoadedModel, prompt: Prompt, methods: Methods) -> Iterator[Row]:
    """A row for the full cache, then one for every method, way and budget."""
    reading = Reading(loaded, prompt.inputs)

    def row(cache: CompressedCache, method: str, way: str, budget: float) -> Row:
        held, found = cache.report().retention, {}
        for name, follow in prompt.follows.items():
            own = copy.deepcopy(cache) if len(prompt.follows) > 1 else cache
            if (rows := len(follow.ids) // len(reading.logits)) > 1:
                own.batch_repeat_interleave(rows)
            found[name] = followed(loaded.model, own, reading.logits, follow)
        known = {"task": prompt.task, "prompt": prompt.name, "method": method, "way": way, "budget": budget}
        return {**known, "held": held, "read": reading.seconds, "scored": seconds, "found": found}

    full, seconds = CompressionConfig.preset("full"), 0.0
    yield row(compressed(reading.scored(full), full), "full", "", 1.0)
    for method, ways in methods.items():
        one = next(iter(ways.values())).config
        if any(way.config.scorer != one.scorer for way in ways.values()):
            raise ValueError(f"methods: the ways of {method!r} have different scorers; scores are taken once for all")
        repeats = one.scorer is not None and one.scorer.reconstructs
        start = time.process_time()
        scored = reconstructed(loaded, prompt.inputs) if repeats else reading.scored(one)
        seconds = time.process_time() - start
        for name, way in ways.items():
            for budget in way.budgets:
                yield row(compressed(scored, way.config.override(budget=budget)), method, name, budget)


# -- what is read ------------------------------------------------------------------------------------------------------


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


def scenes(loaded: LoadedModel, count: int) -> Iterator[Prompt]:
    """Drawn scenes: questions of every kind and the description, asked after the image, then each with the image."""
    end = [int(loaded.tokenizer.eos_token_id)]
    for number, scene in enumerate(held_out_scenes(count)):
        seen, asked = [], {}
        for kind in (*KINDS, "description"):
            question = describe_question(scene) if kind == "description" else ask(scene, kind, 0)
            if question is None:
                continue
            ids = [*loaded.tokenizer(question.answer, add_special_tokens=False).input_ids, *end]
            task, answer = "description" if kind == "description" else "question", torch.tensor([ids])
            inputs = encode(loaded, [(scene, question)])
            seen.append(Prompt(f"{number} {kind}", task, inputs, {"answer": Follow(answer)}))
            image = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero().max()) + 1
            rest = inputs["input_ids"][:, image:]
            asked[kind] = Follow(torch.cat([rest, answer], 1), rest.shape[1])
        alone = {**inputs, "input_ids": inputs["input_ids"][:, :image]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        yield Prompt(f"{number}", "image", alone, asked)
        yield from seen


# -- ways to compress --------------------------------------------------------------------------------------------------

TEXT = {"fraction": 0.2, "sink": 4, "recent": 32}
IMAGE = {"fraction": 0.2, "sink": 1, "recent": 1}
ON_TOP = {"protected": "on_top"}
SHARED: dict[str, Any] = {
    "uniform": "uniform",
    "prefix": {"name": "prefix", **ON_TOP},
    "headprefix": {"name": "headprefix", **ON_TOP},
    "adakv": "adakv",
}
OF_LAYERS = {name: SHARED[name] for name in ("uniform", "prefix")}
EVEN: dict[str, Any] = {"prefix, half even": {"name": "prefix", **ON_TOP, "even": 0.5}}
LAYER: dict[str, Any] = {"name": "topk", "granularity": "layer", "decode": "oldest"}
HEAD: dict[str, Any] = {"name": "topk", "granularity": "head", "decode": "oldest"}
RUNS: dict[str, Any] = {"name": "chunk", "length": 12, "granularity": "head", "decode": "oldest"}
WINDOW = {"name": "snapkv", "window": 16}


def ways(
    budget: dict[str, Any],
    scorer: Any,
    shared: dict[str, Any],
    budgets: Sequence[float] = BUDGETS,
    evictor: dict[str, Any] = HEAD,
) -> dict[str, Way]:
    """One scorer with several ways to share a budget; heads choose their own tokens, one by one, unless told."""
    found = {}
    for name, allocator in shared.items():
        config = CompressionConfig.model_validate(
            {"budget": budget, "scorer": scorer, "allocator": allocator, "evictor": evictor}
        )
        found[name] = Way(config, budgets)
    return found


def presets(*names: str) -> dict[str, Way]:
    """Presets as they are."""
    return {name: Way(CompressionConfig.preset(name), LARGER) for name in names}


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


def scene_methods() -> Methods:
    """For images."""
    every = {**SHARED, **EVEN}
    return {
        "snapkv": ways(IMAGE, {"name": "snapkv", "window": 8}, every),
        "attention": ways(IMAGE, "attention", every) | presets("prefixkv", "prefixkv+merge"),
        "expected": ways(IMAGE, "expected_attention", SHARED),
        "text": presets("text"),
        "none": presets("streaming"),
        "merged": presets("image"),
    }


def many_methods() -> Methods:
    """For many questions on one document."""
    some = {name: SHARED[name] for name in ("uniform", "headprefix", "adakv")}
    mended = {**OF_LAYERS, **EVEN}
    return {
        "kvzip": ways(TEXT, "kvzip", {**some, "scores": "scores"}, (0.3,)),
        "snapkv 16 in runs": ways(TEXT, WINDOW, {"uniform": "uniform"}, (0.3,), RUNS),
        "snapkv": ways(TEXT, "snapkv", some, (0.3,)),
        "expected": ways(TEXT, "expected_attention", some, (0.3,)),
        "tova": ways(TEXT, "tova", mended, (0.3,), evictor=LAYER),
        "none": {"streaming": Way(CompressionConfig.preset("streaming"), (0.3,))},
    }


def pages(loaded: LoadedModel, count: int) -> Iterator[Prompt]:
    """Drawn pages: questions and a stretch to read aloud, asked after the image, then each with it."""
    from benchmarks import grid_pages  # which imports from here

    yield from grid_pages.pages(loaded, count)


def page_methods() -> Methods:
    """For drawn pages."""
    from benchmarks import grid_pages  # which imports from here

    return grid_pages.page_methods()


SUITES: dict[str, tuple[str, str, Callable[[LoadedModel, int], Iterator[Prompt]], Callable[[], Methods]]] = {
    "needle": ("smollm2", "float32", needles, needle_methods),
    "scenes": ("shapes", "float32", scenes, scene_methods),
    "many": ("smollm2", "float32", many, many_methods),
    "pages": ("pages", "float32", pages, page_methods),
}


def main(
    suite: Annotated[str, typer.Argument(help=f"What is measured: {', '.join(SUITES)}.")],
    samples: Annotated[int, typer.Option(help="Prompts, or scenes.")] = 32,
    folder: Annotated[Path, typer.Option(help="For the lines of JSON; a run that was stopped goes on.")] = Path("grid"),
    only: Annotated[str, typer.Option(help="Methods, with commas; all if left out.")] = "",
) -> None:
    """Measures what is not in the folder yet."""
    model, dtype, prompts, methods = SUITES[suite]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{suite}.jsonl"
    done = set()
    if file.exists():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            done.add((row["task"], row["prompt"]))
    loaded = load_model(model, dtype=dtype)
    print(about_line(), flush=True)
    chosen = {name: ways for name, ways in methods().items() if not only or name in only.split(",")}
    with torch.inference_mode(), file.open("a") as out:
        for prompt in prompts(loaded, samples):
            if (prompt.task, prompt.name) in done:
                continue
            start = time.process_time()
            rows = list(measured(loaded, prompt, chosen))
            seconds = time.process_time() - start
            out.write("".join(json.dumps({**row, "seconds": seconds}) + "\n" for row in rows))
            out.flush()
            print(prompt.task, prompt.name, f"{seconds:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    typer.run(main)
