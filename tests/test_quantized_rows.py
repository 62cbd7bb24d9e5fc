"""Every row of a batch is quantized on its own: what one row holds costs the others nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress import CompressedCache
from tests import tiny
from tests.reference import held


def run(cache: CompressedCache, lengths: list[int], seed: int, steps: tuple[int, ...] = ()) -> list[Tensor]:
    """A left-padded batch and what follows it; row r has the same tokens in any batch. Logits of each forward."""
    rows = [tiny.token_ids(1, length, seed + length) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    found = []
    with torch.no_grad():
        for number, tokens in enumerate((longest, *steps)):
            if number:
                ids = torch.cat([tiny.token_ids(1, tokens, seed + length + 1000 * number) for length in lengths])
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            found.append(tiny.model("llama")(**inputs, **tiny.with_cache(cache)).logits[:, -1])
    return found


@pytest.mark.parametrize("quantizer", ["quanto2", "quanto8", "rotated4", "k8v4", "fp8"])
@pytest.mark.parametrize("lengths", [[400, 400, 10], [400, 90, 200], [300, 1]], ids=str)
def test_a_short_row_costs_no_bytes(lengths: list[int], quantizer: str) -> None:
    """A batch holds at most what so many copies of its longest row hold, and less than in full precision."""
    small = {"name": quantizer, "group": 16, "residual": 16}
    batch, alone = (CompressedCache(tiny.model("llama"), "full", quantizer=small) for _ in range(2))
    run(batch, lengths, seed=1)
    run(alone, [max(lengths)], seed=1)
    found, one = batch.report(), alone.report()
    assert one.kv_bytes < 0.75 * one.full_kv_bytes
    assert found.kv_bytes <= len(lengths) * (one.kv_bytes + 16 * one.full_kv_bytes / max(lengths))


def test_a_budget_in_bytes_holds_with_a_short_row() -> None:
    cache = CompressedCache(
        tiny.model("llama"), "uniform", budget="100KB", quantizer={"name": "quanto2", "residual": 32}
    )
    run(cache, [700, 90], seed=2, steps=(1, 1, 7, 1))
    assert cache.report().kv_bytes <= 100_000


@pytest.mark.parametrize("quantizer", ["quanto2", "quanto8", "rotated4", "k8v4", "fp8"])
@pytest.mark.parametrize(
    ("fields", "reserve"), [({}, 0), ({}, 30), ({"config": "prefixkv", "budget": 0.7}, 30)], ids=str
)
def test_a_row_of_a_padded_batch_is_quantized_as_it_is_alone(
    fields: dict[str, Any], reserve: int, quantizer: str
) -> None:
    """The same groups from the row's own first token on, so the same logits and the same columns."""
    small = {"name": quantizer, "group": 8, "residual": 26}
    config = {"config": "full", **fields, "quantizer": small}
    lengths, steps = [90, 61, 40], (1, 1, 9, 1, 1, 12, *[1] * 12)
    batch = CompressedCache(tiny.model("llama"), **config, reserve=reserve)
    found = run(batch, lengths, seed=3, steps=steps)
    for row, length in enumerate(lengths):
        alone = CompressedCache(tiny.model("llama"), **config)
        wanted = run(alone, [length], seed=3, steps=steps)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=0, atol=1e-4)
        for layer, own in zip(held(batch), held(alone), strict=True):
            assert [[column - (90 - length) for column in columns] for columns in layer[row]] == own[0]
