"""Generates with compressed caches, alone or as one of several processes that share the heads (under torchrun)."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import PreTrainedModel

from kvcompress import ALLOCATORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS, CompressedCache
from kvcompress.cache import undoing
from kvcompress.config.composition import EXAMPLES
from kvcompress.config.presets import PRESETS
from kvcompress.errors import KVCompressError
from kvcompress.integrations import adapter_for
from tests import tiny

BUDGET = {"fraction": 0.3, "sink": 1, "recent": 4}
PER_HEAD = {"name": "topk", "granularity": "head"}
LOWEST = {"name": "topk", "granularity": "head", "decode": "lowest_score"}
SMALL: dict[str, dict[str, Any]] = {"snapkv": {"window": 8}, "lagkv": {"lag": 16, "sink": 4}}  # for short prompts
MODELS = ("llama", "llama_mha", "qwen2", "qwen3", "llava", "llava_next")
TOKENS, NEW = 130, 6


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """What is run: a name, the model, the way of calling it, and the fields of the configuration."""
    for preset, (_, fields) in PRESETS.items():
        reduces = "reducer" in fields
        budget = {} if fields.get("evictor", "topk") is None else {"budget": BUDGET}
        yield preset, "llava_next" if reduces else "llama", "generate", {"config": preset, **budget}
    for number, name in enumerate(SCORERS.names()):
        scorer = {"name": name, **EXAMPLES.get(("scorer", name), SMALL.get(name, {}))}
        fields = {"scorer": scorer, "allocator": "uniform", "evictor": (PER_HEAD, LOWEST, "chunk")[number % 3]}
        yield f"scorer {name}", ("llama", "llama_mha")[number % 2], "generate", fields
    for name in ALLOCATORS.names():
        fields = {"allocator": {"name": name, **EXAMPLES.get(("allocator", name), {})}}
        yield f"allocator {name}", "llama", "generate", fields
    yield "evictor critical", "llama_mha", "generate", {"evictor": {"name": "critical", "granularity": "head"}}
    for name in MERGERS.names():
        yield f"merger {name}", "llama_mha", "generate", {"merger": name, "evictor": LOWEST}
    for name in QUANTIZERS.names():
        quantizer = {"name": name, "group": 4, "residual": 8}
        evictor = {**PER_HEAD, "distance": 8}
        # So little room, and scores so different, that a second turn evicts different numbers of quantized tokens.
        fields = {"scorer": "random", "budget": {"tokens": 30, "sink": 1, "recent": 4}}
        yield f"quantizer {name}", "llama", "second turn", {**fields, "quantizer": quantizer, "evictor": evictor}
    of_heads = {"budget": {"tokens": 30, "sink": 1, "recent": 4}, "evictor": {"name": "topk", "distance": 8}}
    of_heads |= {"allocator": "headprefix", "quantizer": {"name": "quanto4", "group": 4, "residual": 8}}
    yield "quantizer, heads of their own sizes", "llama_mha", "second turn", of_heads
    for name in REDUCERS.names():
        reducer = {"name": name, **EXAMPLES.get(("reducer", name), {})}
        yield f"reducer {name}", "llava_next", "generate", {"reducer": reducer}
    for way in ("second turn", "beams", "padded", "copies", "taken back"):
        yield f"{way}, a set per layer", "qwen3", way, {"evictor": {**LOWEST, "granularity": "layer"}}
        yield f"{way}, one head each", "llama", way, {"evictor": LOWEST}
        yield f"{way}, two heads each", "llama_mha", way, {"evictor": LOWEST}
        yield f"{way}, heads of their own sizes", "llama_mha", way, {"allocator": "headprefix", "evictor": LOWEST}
    for name in ("llama", "llama_mha"):  # the first steps evict nothing, then the heads part
        late = {"budget": {"tokens": TOKENS + 3}, "evictor": LOWEST}
        yield f"late, {name}", name, "generate", late
    for allocator, granularity in (("uniform", "layer"), ("uniform", "head"), ("headprefix", "head")):
        evictor = {"name": "every", "period": 3, "granularity": granularity}
        periods = {"allocator": allocator, "scorer": "attention", "evictor": evictor}
        yield f"every, {allocator}, {granularity}", "llama_mha", "padded", periods
    yield "bytes", "llama", "padded", {"budget": {"bytes": 2 * 3 * 20 * 128, "sink": 1, "recent": 4}}
    yield "tokens", "qwen2", "generate", {"budget": {"tokens": 20, "sink": 1, "recent": 4}}
    yield "image and text", "llava", "generate", {"evictor": LOWEST}


def played(model: PreTrainedModel, name: str, way: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Tokens that come out, and what the cache holds in the end."""
    fields = {"config": "prefixkv", "budget": BUDGET, **fields} if "config" not in fields else dict(fields)
    cache = CompressedCache(model, fields.pop("config"), **fields)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    inputs = tiny.inputs(name, TOKENS, seed=3, batch=2 if way in ("padded", "beams") else 1)
    said: list[Any] = []
    if way == "padded":
        inputs["attention_mask"][0, :17] = 0
    elif way == "beams":
        options["num_beams"] = 3
    elif way == "copies":
        model(**inputs, **tiny.with_cache(cache))
        inputs = longer(inputs["input_ids"], 5)
        other = copy.deepcopy(cache)
        said.append(model.generate(**inputs, **tiny.with_cache(other), **options).tolist())
    elif way == "taken back":
        model(**inputs, **tiny.with_cache(cache))
        cache.activate_past_recording()
        more = longer(inputs["input_ids"], 7)
        model(more["input_ids"][:, TOKENS:], attention_mask=more["attention_mask"], **tiny.with_cache(cache))
        cache.crop(-4)
        said.append(least_held(cache))
        inputs = longer(more["input_ids"][:, : TOKENS + 3], 1)
    options |= {"output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**inputs, **tiny.with_cache(cache), **options)
    said.append(result.sequences.tolist())
    if way == "second turn":
        said.append(least_held(cache))
        result = model.generate(**longer(result.sequences, 40), **tiny.with_cache(cache), **options)
        said.append(result.sequences.tolist())
    report = cache.report()
    return {
        "said": said,
        "lengths": report.layer_lengths,
        "head_lengths": report.head_lengths,
        "positions": report.held_positions,
        "least_held": least_held(cache),
        "logits": result.logits[-1][0].tolist(),
        "packed": [
            [] if (of := getattr(layer.store, "coded", None)) is None else of.tolist() for layer in cache.layers
        ],
        "kv_bytes": report.kv_bytes,
    }


def least_held(cache: CompressedCache) -> list[list[list[int]]]:
    """Tokens from some positions on that every head of a layer holds, which decides what can be taken back."""
    return [
        [
            undoing.holds_from(cache._state, layer, np.full(cache.batch_size, position)).tolist()
            for position in range(0, TOKENS, 10)
        ]
        for layer in cache.layers
    ]


def longer(ids: Tensor, count: int) -> dict[str, Tensor]:
    """A conversation with random tokens after it."""
    ids = torch.cat([ids, tiny.token_ids(len(ids), count, seed=7)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sent(model: PreTrainedModel, past: Any) -> list[int]:
    """Collective calls of a prompt and of a decode step after it."""
    counts = []
    for ids in (tiny.token_ids(1, TOKENS, seed=5), tiny.token_ids(1, 1, seed=6)):
        with CommDebugMode() as mode, torch.no_grad():
            model(ids, **tiny.with_cache(past))
        counts.append(mode.get_total_counts())
    return counts


def shared(folder: Path, name: str, **plan: Any) -> PreTrainedModel:
    """A saved tiny model whose heads are shared out over the processes."""
    kind = "AutoModelForImageTextToText" if name in tiny.IMAGE_MODELS else "AutoModelForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename the argument
        return getattr(transformers, kind).from_pretrained(folder / name, dtype=torch.float32, **plan).eval()


def main(folder: Path) -> None:
    """Plays every case as one of several processes and writes what came out."""
    models = {name: shared(folder, name, tp_plan="auto") for name in MODELS}
    found: dict[str, Any] = {label: played(models[name], name, *rest) for label, name, *rest in cases()}
    configs: dict[str, dict[str, Any]] = {
        "prefixkv": {"config": "prefixkv", "budget": BUDGET},
        "uniform": {"config": "prefixkv", "budget": BUDGET, "allocator": "uniform"},
        "streaming": {"config": "streaming", "budget": BUDGET},
        "lowest score": {"config": "prefixkv", "budget": BUDGET, "evictor": LOWEST},
    }
    found["sent"] = {name: sent(models["llama"], CompressedCache(models["llama"], **c)) for name, c in configs.items()}
    found["sent"]["model"] = sent(models["llama"], transformers.DynamicCache())
    bare = models["llava"].get_decoder()
    found["bare decoder"] = adapter_for(bare).head_group(bare).size
    attention = "model.layers.*.self_attn."
    key_value = {f"{attention}{part}": "replicate" for part in ("k_proj", "v_proj")}
    try:
        CompressedCache(shared(folder, "llama", tp_plan=key_value))
    except KVCompressError as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    whole = {**key_value, f"{attention}q_proj": "replicate", f"{attention}o_proj": "replicate"}
    found["whole"] = played(shared(folder, "llama", tp_plan=whole), "llama", "generate", {})
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
