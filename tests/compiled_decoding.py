"""Decoding by compiled steps, preset by preset; run as a program, since checks of every shape cannot be traced.

Prints, for each preset, a line of JSON: what its test wants to know. Compiled with the backend "eager", which runs the
graph that was traced as it is. After `--cuda`, the code that is generated for a GPU runs.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from kvcompress import CompressedCache, CompressionConfig
from tests import tiny

PROMPT, NEW, ROWS = 60, 40, 2
OTHERS: dict[str, Any] = {  # what no preset has
    "every": CompressionConfig(scorer="tova", evictor={"name": "every", "period": 9}),
}


def generate(model: PreTrainedModel, cache: Any, compiled: bool, new: int = NEW, **inputs: Tensor) -> Tensor:
    """Greedy tokens, by steps that are compiled as one graph or by steps in Python."""
    arguments: dict[str, Any] = {"disable_compile": True}
    if compiled:
        arguments = {"compile_config": CompileConfig(fullgraph=True, backend="eager", mode=None)}
        arguments["compile_config"]._compile_all_devices = True
    return model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=new, do_sample=False, **arguments)


def row(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """A row without its padding."""
    real = inputs["attention_mask"][number].bool()
    return {name: value[number : number + 1, real] for name, value in inputs.items()}


def afterwards(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor) -> list[Any]:
    """What is left after rows were chosen, and a turn that ends with tokens taken back, in a copy and in itself."""
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    twin = copy.deepcopy(cache)
    ids = torch.cat([ids[[1, 0, 1]], tiny.token_ids(3, 5, seed=9)], 1)
    mask = torch.cat([mask, mask.new_ones(ROWS, ids.shape[1] - mask.shape[1])], 1)[[1, 0, 1]]
    found: list[Any] = []
    for held in (cache, twin):
        held.activate_past_recording()
        seen = held.get_seq_length()
        model(ids[:, int(seen) :], attention_mask=mask, **tiny.with_cache(held))
        held.crop(-2)
        report = held.report()
        found.append([report.held_positions, report.layer_lengths, report.tokens_seen])
    return found


@torch.no_grad()
def look(name: str) -> dict[str, Any]:
    """Everything about a preset."""
    model = tiny.build("llama")
    inputs = tiny.inputs("llama", PROMPT, 0, ROWS)
    inputs["attention_mask"][1, :20] = 0
    config = OTHERS.get(name) or CompressionConfig.preset(name)
    evicts = config.evictor is not None

    def make(budget: float, **more: Any) -> CompressedCache:
        return CompressedCache(model, config, reserve=NEW + 8, **({"budget": budget} if evicts else {}), **more)

    eager, compiled, second = make(0.3), make(0.3), make(0.3)
    if not compiled.is_compileable:
        return {"preset": name, "compileable": False}
    expected = generate(model, eager, False, **inputs)
    torch._dynamo.reset()
    counters.clear()
    first = generate(model, compiled, True, **inputs)
    graphs = counters["stats"]["unique_graphs"]
    again = generate(model, second, True, **inputs)
    found = {
        "preset": name,
        "compileable": True,
        "decoding": compiled.report().decoding,
        "graphs": graphs,
        "more graphs": counters["stats"]["unique_graphs"] - graphs,
        "breaks": sum(counters["graph_break"].values()),
        "tokens": torch.equal(first, expected) and torch.equal(again, expected),
        "held": compiled.report().held_positions == eager.report().held_positions,
        "after": afterwards(model, compiled, first, inputs["attention_mask"])
        == afterwards(model, eager, expected, inputs["attention_mask"]),
    }
    alone = generate(model, make(0.3), True, **row(inputs, 1))
    found["rows"] = torch.equal(alone[0, -NEW:], expected[1, -NEW:])
    whole = generate(model, make(1.0), True, **inputs)
    found["identity"] = torch.equal(whole, generate(model, DynamicCache(config=model.config), False, **inputs))
    return found


@torch.no_grad()
def look_on_a_gpu(name: str) -> dict[str, Any]:
    """Tokens of generated code, which `generate` asks for by itself, against those of steps in Python."""
    model = tiny.build("llama").cuda()
    inputs = tiny.inputs("llama", PROMPT, 0, ROWS)
    inputs["attention_mask"][1, :20] = 0
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    budget = {"budget": 0.3} if CompressionConfig.preset(name).evictor is not None else {}
    found = []
    for how in ("eager", "compiled", "compiled"):
        cache = CompressedCache(model, name, decoding=how, **budget)
        ids = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=NEW, do_sample=False)
        found.append((ids, cache.report().decoding))
    (expected, _), *compiled = found
    return {
        "preset": name,
        "decoding": [how for _, how in found],
        "tokens": all(torch.equal(ids, expected) for ids, _ in compiled),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    on_a_gpu = sys.argv[1] == "--cuda"
    for preset in sys.argv[1 + on_a_gpu :]:
        print(json.dumps(look_on_a_gpu(preset) if on_a_gpu else look(preset)), flush=True)
