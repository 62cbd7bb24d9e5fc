"""What a step asks of the device, counted: few operations, whatever the batch, and no waiting for an answer."""

from __future__ import annotations

import ast
import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvcompress
from kvcompress import CompressedCache
from kvcompress.cache import selection
from kvcompress.kernels import mass
from kvcompress.testing import models
from tests import tiny
from tests.operations import Operations

LAYERS, TOKENS = 8, 200
BATCHES = {"one row": (1, False), "16 rows": (16, False), "16 padded rows": (16, True)}
BY_AGE = ("uniform", "prefixkv", "snapkv", "streaming", "pyramidkv")
BY_SCORE = ("h2o", "tova")
BY_MERGING = ("image", "lookm", "prefixkv+merge")
BY_HEAD = ("headprefix", "ada-snapkv")  # these copy what heads hold into one shape where no kernel reads it as it is


@cache
def model() -> Any:
    """A LLaMA of eight layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    made(tiny.token_ids(1, 9, seed=0), **tiny.with_cache(CompressedCache(made, "uniform")))  # what is found out once
    return made


@cache
def half() -> Any:
    """The same in half precision."""
    return copy.deepcopy(model()).to(torch.bfloat16)


@contextmanager
def mass_is_one(counted: Operations) -> Iterator[list[int]]:
    """Counts the tiles of the attention mass apart: on a GPU it is one kernel, here as many as suit the processor."""
    tiles, apart = mass._in_tiles, [0]

    def counting(*args: Any) -> torch.Tensor:
        before = counted.number
        result = tiles(*args)
        apart[0] += counted.number - before - 1
        return result

    mass._in_tiles = counting
    try:
        yield apart
    finally:
        mass._in_tiles = tiles


@cache
@torch.no_grad()
def counts(name: str, rows: str) -> tuple[int, int, int, int]:
    """Operations and syncs of a prompt, and of a decode step in which no buffer grows, with a cache of this name."""
    batch, padded = BATCHES[rows]
    ids = tiny.token_ids(batch, TOKENS, seed=1)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, : 7 * row % 100] = 0
    if name == "DynamicCache":
        held = DynamicCache(config=model().config)
    else:
        held = CompressedCache(model(), name, **({} if name == "full" else {"budget": 0.3}))
    prefill, steps = Operations(), []
    with mass_is_one(prefill) as apart, prefill:
        model()(ids, attention_mask=mask, **tiny.with_cache(held))
    for _ in range(4):
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        with Operations() as step:
            model()(ids[:, :1], attention_mask=mask, position_ids=positions, **tiny.with_cache(held))
        steps.append(step)
    return prefill.number - apart[0], prefill.syncs, min(s.number for s in steps), max(s.syncs for s in steps)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, *BY_HEAD, "full"])
def test_a_decode_step_is_quiet(name: str, rows: str) -> None:
    """It waits for nothing, and starts little more than the model does by itself, whatever leaves by which rule."""
    _, _, operations, syncs = counts(name, rows)
    assert syncs == 0
    per_layer = 5 if name in BY_HEAD else 4 if name in BY_SCORE else 2  # the victims of all layers are found at once
    assert operations <= counts("DynamicCache", rows)[2] + per_layer * LAYERS + 15


@pytest.mark.parametrize("rows", ["one row", "16 rows"])
def test_keeping_everything_costs_a_prompt_no_operation_a_layer(rows: str) -> None:
    """What `full` asks for beyond DynamicCache is asked once: the table of all layers' slots, for decoding."""
    operations, known = (counts(name, rows)[0] for name in ("full", "DynamicCache"))
    assert operations <= known + 2 * LAYERS


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, *BY_MERGING, *BY_HEAD])
def test_compressing_a_prompt_takes_few_operations(name: str, rows: str) -> None:
    """32 a layer more than keeping everything at most, the attention mass as one, and few syncs for all layers."""
    operations, syncs, *_ = counts(name, rows)
    full, full_syncs, *_ = counts("full", rows)
    assert operations <= full + (48 if name in BY_HEAD else 32) * LAYERS
    assert syncs <= full_syncs + 3  # of the budgets, of the checks, and of padding


@pytest.mark.parametrize("more", [{}, {"allocator": "pyramid", "merger": "lookm"}], ids=["", "sizes differ"])
@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, *BY_MERGING])
def test_layers_cut_together_are_what_they_are_one_by_one(
    name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short layers wait for each other, which nobody sees but in the number of operations."""
    ids, found, operations = tiny.token_ids(3, TOKENS, seed=1), [], []
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    for most in (2**28, 1):
        monkeypatch.setattr("kvcompress.cache.selection.TOGETHER", most)
        monkeypatch.setattr("kvcompress.cache.merging.TOGETHER", most)
        cache = CompressedCache(model(), name, budget=0.5, **more)
        with Operations() as counted, torch.no_grad():
            model()(ids, attention_mask=mask, **tiny.with_cache(cache))
        operations.append(counted.number)
        held = [layer.store.dense() for layer in cache._state.layers]
        found.append([*(part for parts in held for part in parts), *(layer.index for layer in cache._state.layers)])
    for together, alone in zip(*found, strict=True):
        assert together.shape == alone.shape
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert operations[0] < operations[1] or name == "prefixkv"


@pytest.mark.parametrize("most", [1, 5000, 2**13])
def test_no_more_waits_than_may(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt each layer is cut when it ran, and of shorter ones as many at once as are told."""
    monkeypatch.setattr("kvcompress.cache.selection.TOGETHER", most)
    seen = []

    def counting(layers: Any, *given: Any) -> None:
        seen.append(sum(layer.store.nbytes for layer in layers))
        compress(layers, *given)

    compress = selection.compress
    monkeypatch.setattr(selection, "compress", counting)
    with torch.no_grad():
        model()(tiny.token_ids(1, 8, seed=1), **tiny.with_cache(CompressedCache(model(), "uniform", budget=0.5)))
    one = 2 * 8 * 2 * 8 * 4  # keys and values of two heads of eight dimensions, in float32
    assert sum(seen) == one * LAYERS
    assert max(seen) <= max(one, most)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, "full"])
@torch.no_grad()
def test_a_decode_step_copies_no_buffer(name: str, rows: str) -> None:
    """What layers hold stays where it is, inside of operations too: `scatter_` copies all of it in half precision."""
    (batch, padded), model = BATCHES[rows], half()
    ids = tiny.token_ids(batch, TOKENS, seed=1)
    mask = torch.ones_like(ids)
    mask[1:, : 20 * padded] = 0
    cache = CompressedCache(model, name, **({} if name == "full" else {"budget": 0.3}))
    for _ in range(2):
        model(ids, attention_mask=mask, **tiny.with_cache(cache))
        ids, mask = ids[:, :1], torch.cat([mask, mask.new_ones(batch, 1)], 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        model(ids, attention_mask=mask, **tiny.with_cache(cache))
    buffers = [layer.store.dense()[0] for layer in cache._state.layers]
    copies = [event for event in profiled.events() if event.name in ("aten::copy_", "aten::cat", "aten::clone")]
    slots = [shape for event in copies for shape in event.input_shapes if shape[-1:] == [buffers[0].shape[3]]]
    assert copies
    assert max(map(math.prod, slots), default=0) < min(buffer.numel() for buffer in buffers)


@torch.no_grad()
def test_compressing_after_a_reducer_waits_as_often_as_without() -> None:
    """For budgets, checks and what sinks were given, whatever the number of layers that got fewer tokens."""
    model, inputs, syncs = tiny.model("llava"), tiny.inputs("llava", 24, 0), []
    reducer = {"name": "random", "after": [1], "keep_shares": [0.5]}
    for name, budget in {"full": {}, "prefixkv": {"budget": 0.4}}.items():
        with Operations() as counted:
            model(**inputs, **tiny.with_cache(CompressedCache(model, name, reducer=reducer, **budget)))
        syncs.append(counted.syncs)
    assert syncs[1] <= syncs[0] + 3, syncs


@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, *BY_HEAD])
def test_rows_cost_no_operations(name: str) -> None:
    """16 rows take as many operations as one, and within a tenth as many if they are padded."""
    one, many, padded = (counts(name, rows)[0] for rows in BATCHES)
    padding = counts("full", "16 padded rows")[0] - counts("full", "16 rows")[0]  # what it costs without eviction
    assert abs(one - many) <= (2 * LAYERS if name in BY_HEAD else 2)  # of heads that hold as many, nothing is copied
    assert padded - padding <= 1.1 * many


def test_the_host_sends_numbers_to_a_device_without_waiting_for_it() -> None:
    """By `sent`, which pins them first: any other copy out of the host waits for all that the device was asked."""
    waiting = []
    for package in ("cache", "policies"):
        for path in (Path(kvcompress.__file__).parent / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                named = isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.tensor", "torch.as_tensor")
                if named and "device" in [keyword.arg for keyword in call.keywords]:
                    waiting.append(f"{path.name}:{call.lineno}")
    assert not waiting


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*BY_AGE, *BY_SCORE, *BY_HEAD, "prefixkv+int4", "prefixkv+merge", "full"])
@torch.no_grad()
def test_a_prompt_waits_for_a_gpu_a_few_times_for_all_layers(name: str) -> None:
    """For what a mask says, the budgets, and the checks of policies' answers; decode steps never."""
    llama = model().cuda()
    try:
        for _ in range(2):  # kernels are there the second time
            held = CompressedCache(llama, name, **({} if name == "full" else {"budget": 0.3}))
            ids, found = tiny.token_ids(2, TOKENS, seed=1).cuda(), []
            for tokens in (ids, ids[:, :1], ids[:, :1]):
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    llama(tokens, **tiny.with_cache(held))
                    torch.cuda.set_sync_debug_mode("default")
                found.append(sum("synchronizing" in str(one.message) for one in said))
        assert found[0] <= 4 and found[1:] == [0, 0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        llama.cpu()
