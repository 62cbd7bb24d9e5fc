"""Which preset suits which prompt: what `auto` is chosen by. `python -m benchmarks.choosing`."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import about_line
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache.argument import cache_argument
from kvcompress.evaluation.models import load_model
from kvcompress.evaluation.perplexity import english_text
from kvcompress.evaluation.shapes.measure import accuracy, description_perplexity, held_out_scenes
from kvcompress.evaluation.shapes.questions import KINDS

BUDGETS = (0.2, 0.3, 0.5)
TOKENS = 1400  # of the long prompts
_PLACES = ("the lighthouse", "the old mill", "the wine cellar", "the archive")
_ALONE = "Answer with the number alone."
_READ = 8  # tokens of the continuation
_SAID = 16  # tokens of an answer
_PER_HEAD = {"name": "topk", "granularity": "head", "decode": "oldest"}
_PROTECTED = {"fraction": 0.2, "sink": 4, "recent": 32}

# What has no preset of its own stands in one, by what is set in it.
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("text", "snapkv", "streaming", "prefixkv", "uniform", "tova")},
    "critical": ("snapkv", {"evictor": "critical"}),
    "expected attention": ("snapkv", {"scorer": "expected_attention", "budget": _PROTECTED}),
    "leverage": ("snapkv", {"scorer": "leverage", "budget": {"fraction": 0.2, "sink": 8, "recent": 4}}),
    "text by prefix": ("text", {"allocator": "prefix"}),
}
IMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "image",
        "snapkv",
        "text",
        "streaming",
        "prefixkv",
        "prefixkv+merge",
        "uniform",
    )
}
Row = dict[str, Any]


def configs(methods: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, float, CompressionConfig]]:
    """Every method at every budget."""
    for name, (preset, fields) in methods.items():
        for share in BUDGETS:
            yield name, share, CompressionConfig.preset(preset, **fields).override(budget=share)


class Text:
    """SmolLM2, asked for a code that a long prompt hides: the question read with the prompt, or after it is compressed.

    A prompt is read once and compressed in every way from there, so that many ways cost little more than one.
    """

    def __init__(self) -> None:
        loaded = load_model("smollm2", dtype="float32")
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.text = self.ids(english_text())
        turn = [{"role": "user", "content": "@@"}]
        whole = str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        self.before, self.after = whole.split("@@")

    def ids(self, text: str) -> Tensor:
        """Tokens of a text alone."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    def group(self, rows: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Documents with codes at different depths, the question, how each document goes on, and the codes."""
        draw, documents, after, codes = random.Random("choosing"), [], [], []
        place = draw.choice(_PLACES)
        for row in range(rows):
            code, start = str(draw.randrange(100_000, 1_000_000)), draw.randrange(self.text.shape[1] - 2 * TOKENS)
            parts = [self.ids(self.before), self.ids(f" The secret code of {place} is {code}. ")]
            hay = self.text[:, start : start + TOKENS - sum(part.shape[1] for part in parts)]
            depth, end = round((row + 0.5) / rows * hay.shape[1]), start + hay.shape[1]
            documents.append(torch.cat([parts[0], hay[:, :depth], parts[1], hay[:, depth:]], 1))
            after.append(self.text[:, end : end + _READ])
            codes.append(code)
        asks = f"\n\nWhat is the secret code of {place}? {_ALONE}{self.after}"
        return torch.cat(documents), self.ids(asks).expand(rows, -1), torch.cat(after), codes

    def step(self, cache: CompressedCache, ids: Tensor) -> Tensor:
        """Logits of what comes next."""
        logits: Tensor = self.model(ids, **cache_argument(cache), logits_to_keep=1).logits[:, -1]
        return logits

    def right(self, cache: CompressedCache, logits: Tensor, codes: list[str]) -> int:
        """In how many rows greedy decoding says the code."""
        said = [logits.argmax(-1, keepdim=True)]
        for _ in range(_SAID - 1):
            said.append(self.step(cache, said[-1]).argmax(-1, keepdim=True))
        texts = self.tokenizer.batch_decode(torch.cat(said, 1))
        return sum(code in text for code, text in zip(codes, texts, strict=True))

    def loss(self, cache: CompressedCache, logits: Tensor, ids: Tensor) -> float:
        """Negative log-likelihood of how the texts go on, in nats."""
        total = 0.0
        for place in range(ids.shape[1]):
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids[:, place], reduction="sum"))
            logits = self.step(cache, ids[:, place : place + 1])
        return total

    def rows(self, cases: int) -> Iterator[Row]:
        """One row for each method and budget."""
        document, question, more, codes = self.group(cases)
        known, first = self.read(torch.cat([document, question], 1))
        unknown, goes_on = self.read(document)
        for (name, share, seen), (_, _, held) in zip(self.ways(known), self.ways(unknown), strict=True):
            row = {"task": "text", "cases": cases, "method": name, "budget": share}
            row |= {"retention": held.report().retention, "seen": self.right(seen, first, codes)}
            asked = copy.deepcopy(held)
            row["unseen"] = self.right(asked, self.step(asked, question), codes)
            yield {**row, "loss": self.loss(held, goes_on, more), "read": more.numel()}

    def read(self, ids: Tensor) -> tuple[CompressedCache, Tensor]:
        """A cache that has read prompts and has yet to score and to evict, with what comes next."""
        cache = CompressedCache(self.model, "text")
        cache.activate_past_recording()
        return cache, self.step(cache, ids)

    def ways(self, read: CompressedCache) -> Iterator[tuple[str, float, CompressedCache]]:
        """Copies of a cache that has yet to score and to evict, compressed by every method to every budget."""
        yield "full", 1.0, compressed(read, CompressionConfig.preset("full"))
        for name, (preset, fields) in TEXT.items():
            config = CompressionConfig.preset(preset, **fields)
            scored = copy.deepcopy(read)
            scored._state.adopt(config)
            scored.ranked()
            for share in BUDGETS:
                yield name, share, compressed(scored, config.override(budget=share))


def compressed(cache: CompressedCache, config: CompressionConfig) -> CompressedCache:
    """A copy of a cache that has yet to evict, compressed in a way of its own."""
    twin = copy.deepcopy(cache)
    twin._state.adopt(config)
    twin._state.recording = False
    twin.compress()
    return twin


def images(scenes: int) -> Iterator[Row]:
    """ShapesLLaVA: short questions answered rightly, and perplexity of descriptions."""
    loaded, held_out = load_model("shapes"), held_out_scenes(scenes)
    every: list[tuple[str, float, CompressionConfig | None]] = [("full", 1.0, None), *configs(IMAGE)]
    for name, share, config in every:
        found = accuracy(loaded, config, held_out, tuple(KINDS))
        yield {
            "task": "image",
            "scenes": scenes,
            "method": name,
            "budget": share,
            "questions": sum(found[kind] for kind in KINDS) / len(KINDS),
            "perplexity": description_perplexity(loaded, config, held_out),
        }


def tables(rows: Sequence[Row]) -> str:
    """The tables of docs/evaluation.md."""
    lines = ["| preset | budget | question known | question after | perplexity |", "|---|---|---|---|---|"]
    for name, share in dict.fromkeys((row["method"], row["budget"]) for row in rows if row["task"] == "text"):
        own = [row for row in rows if row["task"] == "text" and (row["method"], row["budget"]) == (name, share)]

        def of(kind: str, own: list[Row] = own) -> str:
            return f"{sum(row[kind] for row in own)}/{sum(row['cases'] for row in own)}"

        loss = math.exp(sum(row["loss"] for row in own) / sum(row["read"] for row in own))
        lines.append(f"| {name} | {share} | {of('seen')} | {of('unseen')} | {loss:.2f} |")
    lines += ["", "| preset | budget | short questions | perplexity |", "|---|---|---|---|"]
    for row in rows:
        if row["task"] == "image":
            lines.append(f"| {row['method']} | {row['budget']} | {row['questions']:.1%} | {row['perplexity']:.2f} |")
    return "\n".join(lines)


def main(
    cases: Annotated[int, typer.Option(help="Long prompts; 0 leaves text out.")] = 6,
    scenes: Annotated[int, typer.Option(help="Held-out scenes; 0 leaves images out.")] = 40,
    output: Annotated[Path, typer.Option(help="A line of JSON for every row.")] = Path("choosing.jsonl"),
) -> None:
    """Measures presets on long text and on images; about a quarter of an hour on one core."""
    print(about_line(), flush=True)
    rows, start = [], time.process_time()
    with torch.inference_mode(), output.open("w") as file:
        for part in ([images(scenes)] if scenes else []) + ([Text().rows(cases)] if cases else []):
            for row in part:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(tables(rows))
    print(f"{time.process_time() - start:,.0f} s of CPU")


if __name__ == "__main__":
    typer.run(main)
