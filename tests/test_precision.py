"""Number formats: autocast, a default dtype of one's own, half precision with large logits, non-contiguous outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from kvcompress import SCORERS, CompressedCache, CompressionConfig
from kvcompress.config.presets import PRESETS
from kvcompress.kernels import attention_mass, attention_probabilities, attention_share, attention_with_mask
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext
from tests import strategies, tiny

HALF = [torch.bfloat16, torch.float16]
TEXT = [name for name in PRESETS if CompressionConfig.preset(name).reducer is None]
EVICTING = [name for name in TEXT if CompressionConfig.preset(name).evictor is not None]
halves = pytest.mark.parametrize("dtype", HALF, ids=str)


def sequence_of_steps(model: Any, cache: Any, batch: int = 2, prompt: int = 60) -> list[Tensor]:
    """Logits of a prompt, decode steps, a turn of several tokens, and more decode steps."""
    found = []
    with torch.no_grad():
        for number, tokens in enumerate((prompt, 1, 1, 6, 1)):
            ids = tiny.token_ids(batch, tokens, seed=number)
            found.append(model(ids, **tiny.with_cache(cache)).logits)
    return found


# -- autocast ----------------------------------------------------------------------------------------------------------


def each(names: list[str], check: Callable[[str], None]) -> list[str]:
    """The presets for which a check fails, with what is wrong, so that one test hears all of them."""
    faults = []
    for name in names:
        try:
            check(name)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}"[:200])
    return faults


@halves
def test_autocast_at_full_budget_is_near_dynamic_cache(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        wanted = sequence_of_steps(tiny.untouched("llama"), DynamicCache())
    exact = sequence_of_steps(tiny.untouched("llama"), DynamicCache())
    rounding = max(float((one - other).abs().max()) for one, other in zip(wanted, exact, strict=True))

    def check(preset: str) -> None:
        cache = CompressedCache(tiny.model("llama"), preset, **({"budget": 1.0} if preset in EVICTING else {}))
        with torch.autocast("cpu", dtype):
            found = sequence_of_steps(tiny.model("llama"), cache)
        lost = max(float((one - other).abs().max()) for one, other in zip(found, exact, strict=True))
        assert lost < 1.5 * rounding, "more is lost than with DynamicCache"

    assert not each(TEXT, check)


@halves
def test_autocast_stores_half_precision_within_the_budget(dtype: torch.dtype) -> None:
    def check(preset: str) -> None:
        cache = CompressedCache(tiny.model("llama"), preset, budget=0.5)
        with torch.autocast("cpu", dtype):
            sequence_of_steps(tiny.model("llama"), cache, prompt=150)
        report, evictor = cache.report(), cache.config.evictor
        grown = 9 if evictor is not None and evictor.cuts_every is not None else 0  # tokens after the prompt, uncut
        assert report.retention <= 0.5 + grown / report.tokens_seen
        # tokens, rows, layers, keys and values, heads, head_dim, bytes
        assert report.full_kv_bytes == 159 * 2 * 3 * 2 * 2 * 8 * 2

    assert not each(EVICTING, check)


class Watching(Scorer):
    """Attention mass, compared with attention written out in double precision from the same queries and keys."""

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    errors: ClassVar[list[float]] = []

    def score(self, layer: LayerContext) -> Tensor:
        mass = layer.attention_mass()
        group, (queries, tokens) = (
            layer.query.shape[1] // layer.keys.shape[1],
            (layer.query.shape[2], layer.keys.shape[2]),
        )
        keys = layer.keys.double().repeat_interleave(group, 1)
        logits = torch.einsum("bhqd,bhkd->bhqk", layer.query.double(), keys) * layer.scaling
        logits = logits.masked_fill(torch.ones(queries, tokens, dtype=torch.bool).triu(tokens - queries + 1), -math.inf)
        if layer.valid is not None:
            logits = logits.masked_fill(~layer.valid.unsqueeze(2), -math.inf)
        exact = logits.softmax(-1).sum(2).unflatten(1, (-1, group)).mean(2)
        self.errors.append(float(((mass.double() - exact).abs() / exact.clamp(min=1e-3)).max()))
        return mass


@halves
def test_scores_under_autocast_are_as_exact_as_without(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(SCORERS, "_policies", dict(SCORERS._policies))
    SCORERS.register("watching")(Watching)
    Watching.errors.clear()
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5, scorer="watching")
    with torch.autocast("cpu", dtype):
        sequence_of_steps(tiny.model("llama"), cache)
    assert len(Watching.errors) >= 6 and max(Watching.errors) < 0.02


def test_kernels_keep_their_precision_under_autocast() -> None:
    """What a kernel promises in float32 is float32, whoever calls it."""
    query, key, value, scaling = with_logits(torch.float32, 16, 12.0)
    _, lse = attention_with_mask(query, key, value, scaling, None)
    counted = torch.ones(1, 1, 300, dtype=torch.bool)
    counted[..., 40:] = False

    def run() -> list[Tensor]:
        return [
            attention_mass(query, key, lse, scaling),
            attention_probabilities(query, key, lse, scaling, 20),
            attention_share(query, key, counted, scaling),
        ]

    wanted = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- the default dtype -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def half_by_default() -> Iterator[None]:
    """A default dtype that nothing may take, while the model and its inputs are in single precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def three_forwards(config: CompressionConfig) -> list[dict[str, Any]]:
    """Inputs of a prompt, a decode step and a turn of several tokens; the prompt has an image for a reducer."""
    prompt = tiny.inputs("llama" if config.reducer is None else "llava_36", 40, seed=0)
    return [prompt, {"input_ids": tiny.token_ids(1, 1, 1)}, {"input_ids": tiny.token_ids(1, 4, 2)}]


def of_config(
    config: CompressionConfig, inputs: list[dict[str, Any]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Any]:
    """Logits and the report of a cache through three forwards."""
    model = tiny.model("llama" if config.reducer is None else "llava_36", dtype)
    cache = CompressedCache(model, config)
    given = [{name: x.to(dtype) if x.is_floating_point() else x for name, x in each.items()} for each in inputs]
    with torch.no_grad():
        return [model(**each, **tiny.with_cache(cache)).logits for each in given], cache.report()


def every_config(check: Callable[[CompressionConfig, list[dict[str, Any]]], str]) -> list[str]:
    """What a check finds wrong with any preset and any policy, so that one test hears all of them."""
    faults = []
    for parameters in strategies.configs():
        config, label = parameters.values[0], parameters.id
        try:
            told = check(config, three_forwards(config))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:160]
        if told:
            faults.append(f"{label}: {told}")
    return faults


def test_a_default_dtype_changes_nothing() -> None:
    """Every preset and every policy, bit for bit."""

    def check(config: CompressionConfig, inputs: list[dict[str, Any]]) -> str:
        wanted, expected = of_config(config, inputs)
        with half_by_default():
            found, report = of_config(config, inputs)
        same = report == expected and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        return "" if same else "another result"

    assert not every_config(check)


# -- double precision --------------------------------------------------------------------------------------------------


def test_a_model_in_float64_gives_what_it_gives_in_float32() -> None:
    """Every preset and every policy: the same tokens stay, and logits differ by what float32 rounds away."""

    def check(config: CompressionConfig, inputs: list[dict[str, Any]]) -> str:
        wanted, expected = of_config(config, inputs)
        found, report = of_config(config, inputs, torch.float64)
        lost = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
        if report.held_positions != expected.held_positions:
            return "other tokens stay"
        return f"logits differ by {lost:.1e}" if lost > 1e-3 else ""

    assert not every_config(check)


# -- half precision with large logits ----------------------------------------------------------------------------------


def with_logits(
    dtype: torch.dtype, head_dim: int, largest: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values whose scaled logits go up to `largest`."""
    g, scaling = strategies.generator(seed), head_dim**-0.5
    query, key, value = (torch.randn(1, heads, 300, head_dim, generator=g) for heads in (6, 2, 2))
    logits = (query @ key.repeat_interleave(3, 1).transpose(2, 3)).abs().max() * scaling
    factor = float(largest / logits) ** 0.5
    return (query * factor).to(dtype), (key * factor).to(dtype), value.to(dtype), scaling


def exact_mass(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention mass in double precision."""
    logits = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * scaling
    hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -math.inf).softmax(-1).sum(2).unflatten(1, (2, 3)).sum(2)


@halves
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("largest", [468, 1584, 20000])
def test_attention_mass_is_near_the_exact_one_however_large_the_logits(
    dtype: torch.dtype, head_dim: int, largest: float
) -> None:
    query, key, value, scaling = with_logits(dtype, head_dim, largest)
    output, lse = attention_with_mask(query, key, value, scaling, None)
    assert bool(output.isfinite().all())
    exact = exact_mass(query, key, scaling)
    for start, step in ((0, 1), (7, 3)):
        mass = attention_mass(query, key, lse, scaling, start=start, stride=step)
        assert bool(mass.isfinite().all())
        if step == 1:
            assert float(((mass - exact).abs() / exact.clamp(min=1e-2)).max()) < 0.01
            assert float(mass.sum(-1).sub(900).abs().max()) < 900 * 0.002
    probabilities = attention_probabilities(query, key, lse, scaling, 40)
    assert float(probabilities.sum(-1).sub(1).abs().max()) < 0.01


@torch.no_grad()
def test_where_plain_attention_is_finite_nothing_is_refused() -> None:
    model = loud(torch.float16)
    wanted = sequence_of_steps(model, DynamicCache())
    assert all(bool(logits.isfinite().all()) for logits in wanted)

    def check(preset: str) -> None:
        for logits in sequence_of_steps(model, CompressedCache(model, preset, budget=0.9)):
            assert bool(logits.isfinite().all())

    assert not each(EVICTING, check)


def loud(dtype: torch.dtype) -> Any:
    """A model whose logits go into the tens of thousands; head_dim 128, since its root is no power of two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 32}
        shape = {**tiny.model("llama").config.to_dict(), **heads, "num_hidden_layers": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                nn.init.normal_(projection.weight, std=40.0)
    return model.to(dtype)


# -- memory layout -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("preset", ["full", "prefixkv", "h2o", "streaming", "elastic"])
def test_attention_may_give_its_output_in_any_layout(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """CUDA's kernels lay it out as [batch, queries, heads, head_dim]."""
    wanted = sequence_of_steps(tiny.model("llama"), CompressedCache(tiny.model("llama"), preset))
    plain = nn.functional.scaled_dot_product_attention

    def another_layout(*args: Any, **kwargs: Any) -> Tensor:
        output = plain(*args, **kwargs)
        other = torch.empty_strided(output.shape, torch.empty(output.transpose(1, 2).shape).transpose(1, 2).stride())
        return other.copy_(output)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", another_layout)
    found = sequence_of_steps(tiny.model("llama"), CompressedCache(tiny.model("llama"), preset))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_mha", "qwen3"])
def test_decoding_on_a_gpu_runs_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    for preset in TEXT:
        model = tiny.build(name, dtype).cuda()
        cache = CompressedCache(model, preset)
        ids = tiny.token_ids(2, 60, seed=1).cuda()
        for step in (ids, ids[:, :1], ids[:, :1], ids[:, :5], ids[:, :1]):
            assert bool(model(step, **tiny.with_cache(cache)).logits.isfinite().all())
