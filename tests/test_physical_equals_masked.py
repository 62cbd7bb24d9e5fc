"""Physical compression equals masking: attention over what is stored is attention over all, the rest hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.testing.running import forwards, require_masked, with_budget
from tests import strategies, tiny
from tests.reference import Reference, recorded
from tests.strategies import examples

# A merger, a quantizer or a reducer changes what is stored; the law speaks of what is kept as it was.
plain = [
    parameters
    for parameters in strategies.configs()
    if not any((parameters.values[0].merger, parameters.values[0].quantizer, parameters.values[0].reducer))
]
budgets = st.one_of(
    st.floats(0.05, 1.0),
    st.integers(1, 20),
    st.integers(1, 12).map(lambda kib: f"{kib}KiB"),  # 8 slots of the tiny LLaMA each
)
schedules = st.lists(st.sampled_from([1, 1, 1, 3, 6]), min_size=1, max_size=8)


@pytest.mark.parametrize("config", plain)
@examples(4)
@given(
    budget=budgets,
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    schedule=schedules,
    seed=strategies.seeds,
)
def test_every_forward_equals_masked_attention(
    config: CompressionConfig, budget: Any, lengths: list[int], schedule: list[int], seed: int
) -> None:
    """Prompt, decode steps and turns of a left-padded batch, for every preset and every policy."""
    cache = CompressedCache(tiny.model("llama"), with_budget(config, budget))
    prompt = tiny.inputs("llama", max(lengths), seed, len(lengths))
    prompt["attention_mask"] = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    require_masked(Reference("llama"), cache, forwards(tiny.model("llama"), cache, prompt, schedule, seed))


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("granularity", ["layer", "head"])
@examples(3)
@given(budget=budgets, tokens=st.integers(1, 24), schedule=schedules, seed=strategies.seeds)
def test_every_model_equals_masked_attention(
    name: str, granularity: str, budget: Any, tokens: int, schedule: list[int], seed: int
) -> None:
    """With grouped and ungrouped heads, biases, norms on queries and keys, and images in the prompt."""
    config = with_budget(CompressionConfig.preset("prefixkv"), budget)
    config = config.override(evictor={"name": "topk", "granularity": granularity})
    cache = CompressedCache(tiny.model(name), config)
    require_masked(
        Reference(name), cache, forwards(tiny.model(name), cache, tiny.inputs(name, tokens, seed), schedule, seed)
    )


@pytest.mark.parametrize("decode", ["fixed_point", "oldest", "lowest_score", "none"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("allocator", ["uniform", "prefix"])
@examples(2)
@given(budget=budgets, recent=st.integers(0, 3), schedule=schedules, seed=strategies.seeds)
def test_every_decode_rule_equals_masked_attention(
    allocator: str, granularity: str, decode: str, budget: Any, recent: int, schedule: list[int], seed: int
) -> None:
    """Whichever slot a step frees, it is attended in that step and gone in the next."""
    evictor = {"name": "topk", "granularity": granularity, "decode": decode, "distance": 3}
    config = CompressionConfig(scorer="attention", allocator=allocator, evictor=evictor)
    cache = CompressedCache(tiny.model("llama"), with_budget(config, budget, recent=recent))
    schedule = [*schedule, 1, 1, 1, 1]
    require_masked(
        Reference("llama"),
        cache,
        forwards(tiny.model("llama"), cache, tiny.inputs("llama", 20, seed, 2), schedule, seed),
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("llava", {}),
        ("llava_next", {}),
        ("llama", {"prefill_chunk_size": 5}),  # chunks would split an image
        ("qwen3", {"prefill_chunk_size": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["prefixkv", "uniform", "streaming"])
def test_generate_equals_masked_attention(name: str, settings: dict[str, Any], preset: str) -> None:
    """The forwards that `generate` makes, two turns of it, with a whole or a chunked prompt."""
    model, inputs = tiny.model(name), tiny.inputs(name, 22, seed=11)
    cache = CompressedCache(model, preset, budget=0.3)
    with recorded(model, cache) as steps:
        settings = {**tiny.with_cache(cache), "max_new_tokens": 6, "do_sample": False, **settings}
        first = model.generate(**inputs, **settings)
        ids = torch.cat([first, tiny.token_ids(1, 7, seed=12)], dim=1)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert len(steps) >= 12
    assert cache.get_seq_length() == ids.shape[1] + 5
    assert cache.report().retention < 0.5
    require_masked(Reference(name), cache, steps)


def test_the_check_sees_one_hidden_column_too_many() -> None:
    """The law is sharp: hide one more column of one layer in one step, and outputs differ."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    steps = forwards(tiny.model("llama"), cache, tiny.inputs("llama", 20, seed=13), [1, 1], seed=14)
    require_masked(Reference("llama"), cache, steps)
    del steps[1].held[2][0][0][3]
    with pytest.raises(AssertionError):
        require_masked(Reference("llama"), cache, steps)
