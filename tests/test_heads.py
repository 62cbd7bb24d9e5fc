"""Budgets per head: every head of every layer holds as many tokens as it was given, and no memory beyond that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import CompressedCache, CompressionConfig
from tests import strategies, tiny
from tests.strategies import examples
from tests.test_physical_equals_masked import budgets, check, forwards, schedules, with_budget

BY_HEAD = {
    "headprefix": {"name": "headprefix"},
    "headprefix on top": {"name": "headprefix", "protected": "on_top"},
    "adakv": {"name": "adakv"},
    "adakv of prefix": {"name": "adakv", "layers": {"name": "prefix"}, "safeguard": 0.0},
}
every_allocator = pytest.mark.parametrize("allocator", BY_HEAD.values(), ids=BY_HEAD)


def of_heads(allocator: dict[str, Any], **policies: Any) -> CompressionConfig:
    """A configuration that sizes heads by their attention mass."""
    return CompressionConfig(**{"scorer": "attention", "evictor": "topk", "allocator": allocator, **policies})


def padded(lengths: list[int], seed: int, name: str = "llama") -> dict[str, Tensor]:
    """A prompt of rows with so many tokens, padding first."""
    prompt = tiny.inputs(name, max(lengths), seed, len(lengths))
    prompt["attention_mask"] = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return prompt


@every_allocator
@pytest.mark.parametrize("decode", ["fixed_point", "oldest", "lowest_score", "none"])
@examples(4)
@given(
    budget=budgets,
    recent=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    schedule=schedules,
    seed=strategies.seeds,
)
def test_every_forward_equals_masked_attention(
    allocator: dict[str, Any],
    decode: str,
    budget: Any,
    recent: int,
    lengths: list[int],
    schedule: list[int],
    seed: int,
) -> None:
    """Prompt, decode steps and turns of a left-padded batch: each head attends over what it holds, and stores that."""
    config = of_heads(allocator, evictor={"name": "topk", "decode": decode, "distance": 3})
    cache = CompressedCache(tiny.model("llama"), with_budget(config, budget, recent=recent))
    check("llama", cache, forwards("llama", cache, padded(lengths, seed), [*schedule, 1, 1], seed))


EVICTORS = ["topk", "chunk", "critical", "streaming"]


@pytest.mark.parametrize("evictor", EVICTORS)
@examples(3)
@given(budget=budgets, lengths=st.lists(st.integers(1, 24), min_size=1, max_size=2), seed=strategies.seeds)
def test_every_evictor_selects_for_heads(evictor: str, budget: Any, lengths: list[int], seed: int) -> None:
    """An evictor sees each head as a row, so that it need not know of budgets per head."""
    cache = CompressedCache(tiny.model("llama"), with_budget(of_heads(BY_HEAD["headprefix"], evictor=evictor), budget))
    check("llama", cache, forwards("llama", cache, padded(lengths, seed), [1, 3, 1, 1], seed))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_equals_masked_attention(name: str) -> None:
    """With grouped and ungrouped heads, and with images in the prompt."""
    cache = CompressedCache(tiny.model(name), of_heads(BY_HEAD["adakv"], budget=0.4))
    check(name, cache, forwards(name, cache, tiny.inputs(name, 20, seed=1), [1, 1, 4, 1], seed=2))


@torch.no_grad()
@pytest.mark.parametrize("skew", [10, 100])
def test_heads_hold_their_sum_and_no_more(skew: int) -> None:
    """Of heads of which one keeps `skew` times what the others keep, a layer stores the sum, a slot more for each."""
    layers, heads, tokens = 3, 2, 400
    shares = [0.5 / skew] * layers * heads
    shares[::heads] = [0.5] * layers
    config = of_heads({"name": "profile", "retention": shares, "heads": heads}, budget=sum(shares) / len(shares))
    model, prompt = tiny.model("llama"), tiny.inputs("llama", tokens, seed=3, batch=2)
    cache = CompressedCache(model, config)
    model(**prompt, **tiny.with_cache(cache))
    said, slot = cache.report(), 2 * 8 * 4  # bytes of a key and a value of one head
    assert said.head_lengths == [[[200, 200 // skew]] * 2] * layers
    assert said.kv_bytes == layers * 2 * (200 + 200 // skew + heads) * slot
    assert said.layer_lengths == [[round((200 + 200 // skew) / 2)] * 2] * layers
    for step in range(20):  # what is generated comes out of the same memory
        model(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(cache))
    now = cache.report()
    assert now.kv_bytes <= 1.2 * said.kv_bytes and now.retention == pytest.approx(said.retention, abs=0.01)
