"""Budgets per head: every head of every layer holds as many tokens as it was given, and no memory beyond that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import ALLOCATORS, CompressedCache, CompressionConfig
from tests import strategies, tiny
from tests.reference import Reference, recorded
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
