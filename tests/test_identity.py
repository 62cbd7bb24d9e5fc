"""Identity: with room for every token, a compressed cache gives what DynamicCache gives."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcompress import Budget, CompressedCache, CompressionConfig, restore
from kvcompress.config.presets import PRESETS
from kvcompress.testing.running import continued, require_identity
from tests import strategies, tiny
from tests.strategies import examples

every_preset = pytest.mark.parametrize("preset", PRESETS)
every_model = pytest.mark.parametrize("name", tiny.MODELS)


def everything(preset: str, budget: Any = 1.0) -> CompressionConfig:
    """A preset that has room for every token, and changes none (a quantizer and a reducer do)."""
    return CompressionConfig.preset(preset, budget=budget, quantizer=None, reducer=None)


def generated(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    """Tokens from `generate`, greedy unless the settings say otherwise."""
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    return model.generate(**inputs, **tiny.with_cache(cache), **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@functools.cache
def plain(name: str, tokens: int, seed: int, batch: int = 1, **settings: Any) -> list[list[int]]:
    """What the untouched model generates for some inputs; random draws start from seed 0."""
    inputs = tiny.inputs(name, tokens, seed, batch)
    if "prompt_lookup_num_tokens" in settings:
        inputs = repeated(inputs)
    torch.manual_seed(0)
    return generated(tiny.untouched(name), DynamicCache(), inputs, **settings)


def repeated(inputs: dict[str, Any]) -> dict[str, Any]:
    """A prompt that repeats itself, so that a lookup in it finds drafts."""
    return {key: value.repeat(1, 2) for key, value in inputs.items()}


@functools.cache
def in_float32(name: str, tokens: int, seed: int) -> Tensor:
    """Logits of the untouched model."""
    with torch.no_grad():
        return tiny.untouched(name)(**tiny.inputs(name, tokens, seed)).logits


@every_preset
@every_model
@examples(2)
@given(tokens=st.integers(1, 40), batch=st.integers(1, 2), seed=strategies.seeds)
def test_logits_are_those_of_dynamic_cache(name: str, preset: str, tokens: int, batch: int, seed: int) -> None:
    """A whole prompt's logits are equal bit for bit in float32, and each decode step's within 1e-5."""
    inputs = tiny.inputs(name, tokens, seed, batch)
    model = tiny.model(name)
    found = continued(model, CompressedCache(model, everything(preset)), inputs, 5)
    require_identity(found, continued(tiny.untouched(name), DynamicCache(), inputs, 5))


@pytest.mark.quick
@every_preset
@every_model
def test_generated_tokens_are_those_of_dynamic_cache(name: str, preset: str) -> None:
    """`generate` gives the same tokens, and the cache holds every token it saw."""
    inputs, model = tiny.inputs(name, 24, seed=5, batch=2), tiny.model(name)
    cache = CompressedCache(model, everything(preset))
    assert generated(model, cache, inputs) == plain(name, 24, seed=5, batch=2)
    report = cache.report()
    assert report.retention == 1.0
    assert report.layer_lengths == [[inputs["input_ids"].shape[1] + 7] * 2] * len(report.layer_lengths)


@pytest.mark.parametrize("preset", [name for name in PRESETS if CompressionConfig.preset(name).evictor is not None])
@pytest.mark.parametrize("budget", [10_000, "64MiB", Budget(tokens=10_000, sink=7, recent=11)], ids=str)
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_budget_beyond_the_prompt_is_the_whole_prompt(name: str, budget: Any, preset: str) -> None:
    """Budgets in tokens and bytes that no prompt reaches change nothing either."""
    inputs, model = tiny.inputs(name, 12, seed=6), tiny.model(name)
    cache = CompressedCache(model, everything(preset, budget))
    assert generated(model, cache, inputs) == plain(name, 12, seed=6)
    assert cache.report().retention == 1.0


@pytest.mark.parametrize(
    ("name", "preset"), [("llama", name) for name in PRESETS] + [(name, "prefixkv") for name in tiny.TEXT_MODELS[1:]]
)
@pytest.mark.parametrize(
    "how",
    [
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 1},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_every_way_to_generate_gives_the_same_tokens(name: str, how: dict[str, Any], preset: str) -> None:
    """Chunked prefill, beam search, sampling of several sequences and drafts that are checked change nothing."""
    model, inputs = tiny.model(name), tiny.inputs(name, 17, seed=7)
    if "prompt_lookup_num_tokens" in how:
        inputs = repeated(inputs)
    wanted = plain(name, 17, seed=7, **how)
    torch.manual_seed(0)
    assert generated(model, CompressedCache(model, everything(preset)), inputs, **how) == wanted


HALF = itertools.cycle([(torch.bfloat16, 0.25), (torch.float16, 0.04)])  # in turn: each preset and model meets both


@pytest.mark.parametrize(
    ("name", "preset", "dtype", "tolerance"),
    [(name, preset, *next(HALF)) for preset, name in itertools.product(PRESETS, tiny.MODELS)],
)
def test_half_precision_stays_near_float32(name: str, preset: str, dtype: torch.dtype, tolerance: float) -> None:
    """In half precision logits are finite and as near to those of DynamicCache in float32 as its own are."""
    inputs = tiny.inputs(name, 20, seed=8)
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    model = tiny.model(name, dtype)
    with torch.no_grad():
        found = model(**half, **tiny.with_cache(CompressedCache(model, everything(preset)))).logits
    exact = in_float32(name, 20, seed=8)
    cache = CompressedCache(model, everything(preset))
    tokens = generated(model, cache, half)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert (found - exact).abs().mean() < tolerance
    assert len(tokens[0]) == 8
    assert cache.report().retention == 1.0


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_model_with_a_compressed_cache_before_is_as_it_was(name: str) -> None:
    """With another cache, or after `restore`, a model gives what one that kvcompress never met gives."""
    model, inputs = tiny.build(name), tiny.inputs(name, 15, seed=9)
    wanted = generated(tiny.untouched(name), DynamicCache(), inputs)
    generated(model, CompressedCache(model, "prefixkv", budget=0.5), inputs)
    assert generated(model, DynamicCache(), inputs) == wanted
    restore(model)
    assert generated(model, DynamicCache(), inputs) == wanted


@pytest.mark.cuda
@every_preset
@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_on_a_gpu_are_those_of_dynamic_cache(name: str, dtype: torch.dtype, preset: str) -> None:
    """The same on a GPU, where other kernels run."""
    model, reference = tiny.build(name, dtype).cuda(), tiny.build(name, dtype).cuda()
    inputs = {key: value.cuda() for key, value in tiny.inputs(name, 24, seed=5, batch=2).items()}
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    found, found_steps = continued(model, CompressedCache(model, everything(preset)), inputs, 5)
    wanted, wanted_steps = continued(reference, DynamicCache(), inputs, 5)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(found_steps, wanted_steps, rtol=0, atol=tolerance)
