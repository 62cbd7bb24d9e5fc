"""The same tasks, model and budget in kvcompress and in kvpress, side by side: `python -m benchmarks.peer`.

kvpress asks for other releases of transformers than kvcompress, so it runs in an environment of its own, whose Python
`--peer` names; the model is written to a folder that both read, and both are given the same token ids. A context is
compressed before its question, and what comes later is kept whole, as kvpress does it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import peer_kvpress
from benchmarks.machine import about_line
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache.argument import cache_argument
from kvcompress.evaluation.bootstrap import ratio_interval
from kvcompress.evaluation.data import Sample, load_samples
from kvcompress.evaluation.data.encoding import begun_answer, reader_of
from kvcompress.evaluation.metrics import string_match
from kvcompress.evaluation.models import LoadedModel, load_model
from kvcompress.files import write_text
from kvcompress.reuse.prompts import Prompter

_HEAD = {"name": "topk", "granularity": "head", "decode": "none"}
_LAYER = {"name": "topk", "decode": "none"}
# The methods that both have, with kvpress's defaults: what is protected, the scorer, the evictor.
METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {"scorer": {"name": "snapkv", "window": 64}, "evictor": _HEAD},
    "knorm": {"scorer": "key_norm", "evictor": _HEAD},
    "tova": {"scorer": "tova", "evictor": _LAYER, "recent": 1},
    "expected_attention": {"scorer": "expected_attention", "evictor": _HEAD, "sink": 4},
    "streaming": {"scorer": "position", "evictor": _LAYER, "sink": 4},
}
Row = dict[str, Any]


def config_of(method: str, tokens: int) -> CompressionConfig:
    """A method as kvpress has it: so many tokens in every layer, and none freed once the context is compressed."""
    fields = dict(METHODS[method])
    protected = {name: fields.pop(name, 0) for name in ("sink", "recent")}
    return CompressionConfig(budget={"tokens": tokens, **protected}, allocator="uniform", **fields)  # type: ignore[arg-type]


def encoded(loaded: LoadedModel, sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the question after it, with the chat template and the answer's beginning."""
    prompter = Prompter(loaded.model, reader_of(loaded))
    inputs, after = prompter.document(sample.context, [])
    ids, _ = prompter.questions([sample.question], after + begun_answer(loaded, sample))
    return inputs["input_ids"][0].tolist(), ids[0].tolist()


@torch.inference_mode()
def own_answers(
    loaded: LoadedModel, context: list[int], questions: list[int], config: CompressionConfig | None, new_tokens: int
) -> list[int]:
    """Greedy answer to a question on a context that was compressed before it; every later token is kept."""
    model, stop = loaded.model, set(peer_kvpress.stops(loaded.model))
    cache = CompressedCache(model, config or CompressionConfig.preset("full"))
    model(torch.tensor([context]), **cache_argument(cache), logits_to_keep=1)
    cache = copy.deepcopy(cache)
    for token in questions:  # one by one: a forward of several tokens would be compressed again
        logits = model(torch.tensor([[token]]), **cache_argument(cache)).logits
    found: list[int] = []
    while len(found) < new_tokens:
        found.append(int(logits[0, -1].argmax()))
        if found[-1] in stop:
            break
        logits = model(torch.tensor([[found[-1]]]), **cache_argument(cache)).logits
    return found


def scores(loaded: LoadedModel, samples: Sequence[Sample], answers: list[list[int]]) -> list[float]:
    """RULER's match of each answer."""
    texts = [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return [string_match(str(text), "", sample.answer or "") for text, sample in zip(texts, samples, strict=True)]


def shown(values: list[float]) -> str:
    """A mean in percent with its bounds."""
    mean, low, high = ratio_interval(values, [1] * len(values), seed=0)
    return f"{100 * mean:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def main(
    data: Annotated[Path, typer.Option(help="Records of 'kvcompress ruler'.")],
    peer: Annotated[Path, typer.Option(help="The Python of an environment with kvpress.")],
    budget: Annotated[float, typer.Option(help="Share of a context that is kept.")] = 0.5,
    samples: Annotated[int, typer.Option(help="The first so many.")] = 8,
    model: Annotated[str, typer.Option(help="A text model, as for kvcompress evaluate.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Of both.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, where its record wants more.")] = 128,
    method: Annotated[list[str] | None, typer.Option(help="Some of the methods; all if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="A .json for every answer.")] = None,
) -> None:
    """Prints a table of scores, and how many answers are the same to the token."""
    loaded, chosen = load_model(model, dtype=dtype, device="cpu"), load_samples(str(data), limit=samples)
    methods = ["full", *(method or METHODS)]
    pieces = [encoded(loaded, sample) for sample in chosen]
    asked: list[dict[str, Any]] = [
        {"context": context, "question": question, "new_tokens": min(max_new_tokens, sample.max_new_tokens or 64)}
        for sample, (context, question) in zip(chosen, pieces, strict=True)
    ]
    ours: dict[str, list[list[int]]] = {}
    for name in methods:
        ours[name] = []
        for one in asked:
            kept = int(len(one["context"]) * budget)  # as kvpress rounds
            config = None if name == "full" else config_of(name, kept)
            ours[name].append(own_answers(loaded, one["context"], one["question"], config, one["new_tokens"]))
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"asked": asked, "methods": methods, "budget": budget, "dtype": dtype}))
        command = [str(peer), peer_kvpress.__file__, folder, str(job)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    about = f"{data.name}, {len(chosen)} samples, budget {budget:g}, {model} in {dtype}"
    print(f"{about}; {about_line()}; {theirs['about']}\n")
    print("| method | kvcompress | kvpress | same answers |\n|---|---|---|---|")
    for name in methods:
        a, b = ours[name], theirs["answers"][name]
        same = sum(one == two for one, two in zip(a, b, strict=True))
        both = " | ".join(shown(scores(loaded, chosen, each)) for each in (a, b))
        print(f"| `{name}` | {both} | {same} of {len(chosen)} |")
    if output is not None:
        write_text(output, json.dumps({"kvcompress": ours, "kvpress": theirs["answers"]}) + "\n")


if __name__ == "__main__":
    typer.run(main)
