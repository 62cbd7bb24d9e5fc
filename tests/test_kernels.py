"""The kernels against plain float64 attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.kernels import dense as kernels
from tests.strategies import generator


def tensors(batch: int, kv_heads: int, group: int, queries: int, tokens: int, seed: int) -> tuple[Tensor, ...]:
    g = generator(seed)
    shapes = [(batch, kv_heads * group, queries, 16), (batch, kv_heads, tokens, 16), (batch, kv_heads, tokens, 16)]
    return tuple(torch.randn(shape, generator=g) * 1.5 for shape in shapes)


def probabilities(query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Probabilities `[batch, heads, queries, tokens]` and log-sum-exp in float64."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    logits = query.double() @ key.transpose(2, 3) * 0.25
    if causal:
        past = key.shape[2] - query.shape[2]
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(past + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1), logits.logsumexp(-1)


SHAPES = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "group": st.integers(1, 3),
    "queries": st.integers(1, 40),
    "past": st.integers(0, 30),
    "seed": st.integers(0, 9),
}


@given(**SHAPES)
def test_attention_with_lse_is_attention(
    batch: int, kv_heads: int, group: int, queries: int, past: int, seed: int
) -> None:
    query, key, value = tensors(batch, kv_heads, group, queries, queries + past, seed)
    weights, sums = probabilities(query, key, causal=False)
    values = value.repeat_interleave(group, 1).double()
    for run in (kernels.attention_with_lse, kernels._blockwise_attention):
        output, lse = run(query, key, value, 0.25, False)
        torch.testing.assert_close(output.double(), weights @ values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), sums, atol=1e-5, rtol=1e-5)


@given(**SHAPES)
def test_older_and_own_tokens_together_are_one_softmax(
    batch: int, kv_heads: int, group: int, queries: int, past: int, seed: int
) -> None:
    query, key, value = tensors(batch, kv_heads, group, queries, queries + past, seed)
    weights, sums = probabilities(query, key, causal=True)
    output, lse = kernels.attention_with_lse(query, key[:, :, past:], value[:, :, past:], 0.25, causal=True)
    if past:
        older = kernels.attention_with_lse(query, key[:, :, :past], value[:, :, :past], 0.25, causal=False)
        output, lse = kernels.merge_attention(output, lse, *older)
    expected = weights @ value.repeat_interleave(group, 1).double()
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), sums, atol=1e-5, rtol=1e-5)
    blocks = kernels._blockwise_attention(query, key[:, :, past:], value[:, :, past:], 0.25, True)
    torch.testing.assert_close(
        blocks, kernels.attention_with_lse(query, key[:, :, past:], value[:, :, past:], 0.25, True)
    )


@given(**SHAPES, start=st.integers(0, 39), step=st.integers(1, 7), tile=st.sampled_from([(4, 8), (16, 16), (7, 5)]))
def test_mass_is_the_column_sum_of_probabilities(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    past: int,
    seed: int,
    start: int,
    step: int,
    tile: tuple[int, int],
) -> None:
    query, key, _ = tensors(batch, kv_heads, group, queries, queries + past, seed)
    weights, lse = probabilities(query, key, causal=True)
    with pytest.MonkeyPatch.context() as patch:  # small tiles, so that small shapes have many
        patch.setattr(kernels, "_tile", lambda *_: tile)
        found = kernels.attention_mass(query, key, lse.float(), 0.25, start % queries, step)
    chosen = weights[:, :, start % queries :: step].sum(2)
    expected = chosen.view(batch, kv_heads, group, -1).mean(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.005), (torch.float32, 1e-5)])
def test_mass_in_half_precision_is_near_the_exact_one(dtype: torch.dtype, error: float) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(1, 2, 3, 600, 600, 0))
    _, lse = kernels.attention_with_lse(query, key, value, 0.25, causal=True)
    exact = probabilities(query, key, causal=True)[0].sum(2).view(1, 2, 3, -1).mean(2)
    mass = kernels.attention_mass(query, key, lse, 0.25)
    assert float(((mass - exact).abs() / exact).max()) < error
    assert float((mass.sum(-1) - 600).abs().max()) < 600 * error / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mass_is_finite_where_unseen_keys_have_huge_logits(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 40, 16), 8.0, dtype=dtype)
    key = torch.linspace(-8, 8, 40, dtype=dtype)[None, None, :, None].expand(1, 1, 40, 16).contiguous()
    _, lse = kernels.attention_with_lse(query, key, key, 0.25, causal=True)
    mass = kernels.attention_mass(query, key, lse, 0.25)
    assert bool(mass.isfinite().all())
    assert float(mass.sum()) == pytest.approx(40, rel=0.02)


def test_no_tile_is_larger_than_its_budget() -> None:
    for heads in (1, 9, 64, 1024):
        queries, keys = kernels._tile(heads, torch.device("cpu"))
        assert queries == 16 or queries * keys * heads <= kernels._TILE_LOGITS_CPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_kernels_give_the_log_sum_exp(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to("cuda", dtype) for tensor in tensors(2, 2, 3, 77, 77, 0))
    output, lse = kernels.attention_with_lse(query, key, value, 0.25, causal=True)
    expected = kernels._blockwise_attention(query, key, value, 0.25, True)
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected[1], atol=2e-2, rtol=2e-2)
