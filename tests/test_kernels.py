"""The kernels against plain float64 attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import kernels
from kvcompress.kernels import dense, mass
from tests.strategies import generator


def tensors(batch: int, kv_heads: int, group: int, queries: int, tokens: int, seed: int) -> tuple[Tensor, ...]:
    g = generator(seed)
    shapes = [(batch, kv_heads * group, queries, 16), (batch, kv_heads, tokens, 16), (batch, kv_heads, tokens, 16)]
    return tuple(torch.randn(shape, generator=g) * 1.5 for shape in shapes)


def probabilities(query: Tensor, key: Tensor, causal: bool, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities `[batch, heads, queries, tokens]`, 0 where there is nothing to see, and log-sum-exp in float64."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    logits = query.double() @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if causal:
        past = key.shape[2] - query.shape[2]
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(past + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(), logits.logsumexp(-1)


def padding(batch: int, tokens: int, seed: int) -> Tensor:
    """Which tokens are none: a run at the left of row 0, one at the right of row 1, and single ones in between."""
    valid = torch.rand(batch, tokens, generator=generator(seed)) > 0.2
    valid[0, : tokens // 2] = False
    valid[-1, tokens - tokens // 4 :] = False
    return valid


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
    for output, lse in (
        kernels.attention_with_lse(query, key, value, 0.25, causal=False),
        dense._blockwise(query, key, value, 0.25, None, False),
    ):
        torch.testing.assert_close(output.double(), weights @ values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), sums, atol=1e-5, rtol=1e-5)


@given(**SHAPES, causal=st.booleans(), blocks=st.booleans())
def test_padding_gets_no_attention_and_a_query_that_sees_nothing_gives_nothing(
    batch: int, kv_heads: int, group: int, queries: int, past: int, seed: int, causal: bool, blocks: bool
) -> None:
    query, key, value = tensors(batch, kv_heads, group, queries, queries + past, seed)
    valid = padding(batch, queries + past, seed)
    weights, sums = probabilities(query, key, causal, valid)
    if blocks:
        output, lse = dense._blockwise(query, key, value, 0.25, valid, causal)
    else:
        output, lse = kernels.attention_with_mask(query, key, value, 0.25, valid, causal=causal)
    expected = weights @ value.repeat_interleave(group, 1).double()
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), sums, atol=1e-5, rtol=1e-5)


def test_queries_before_a_long_run_of_padding_ends_see_nothing() -> None:
    query, key, value = tensors(1, 1, 1, 1300, 1300, 0)
    valid = (torch.arange(1300) >= 1100).unsqueeze(0)
    output, lse = kernels.attention_with_mask(query, key, value, 0.25, valid)
    alone = kernels.attention_with_mask(*(tensor[:, :, 1100:] for tensor in (query, key, value)), 0.25, None)
    torch.testing.assert_close((output[:, :, 1100:], lse[:, :, 1100:]), alone)
    assert not output[:, :, :1100].any()
    assert bool((lse[:, :, :1100] == -torch.inf).all())


@pytest.mark.parametrize("autocast", [True, False])
def test_keys_of_another_dtype_than_the_queries_are_brought_to_one(autocast: bool) -> None:
    query, key, value = tensors(1, 2, 2, 5, 9, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, lse = kernels.attention_with_mask(query, key, value.bfloat16(), 0.25, None)
    assert (output.dtype, lse.dtype) == (torch.bfloat16 if autocast else torch.float32, torch.float32)
    expected = probabilities(query, key, causal=True)[0] @ value.repeat_interleave(2, 1).double()
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)


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


def counted_mass(
    query: Tensor, key: Tensor, valid: Tensor, first: Tensor, start: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Column sums of the counted queries' probabilities, over the heads of a group, in float64, and log-sum-exp."""
    (batch, kv_heads, tokens), queries = key.shape[:3], query.shape[2]
    weights, lse = probabilities(query, key, True, valid)
    counted = torch.zeros(batch, queries, dtype=torch.bool)
    for row in range(batch):
        counted[row, int(first[row]) + start :: stride] = True
    counted &= valid[:, -queries:]
    return (weights * counted[:, None, :, None]).sum(2).view(batch, kv_heads, -1, tokens).sum(2), lse


@given(
    **SHAPES,
    padded=st.booleans(),
    own_starts=st.booleans(),
    start=st.integers(0, 39),
    stride=st.integers(1, 7),
    tile=st.sampled_from([(4, 8), (16, 16), (7, 5)]),
)
def test_mass_is_the_column_sum_of_the_counted_probabilities(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    past: int,
    seed: int,
    padded: bool,
    own_starts: bool,
    start: int,
    stride: int,
    tile: tuple[int, int],
) -> None:
    query, key, _ = tensors(batch, kv_heads, group, queries, queries + past, seed)
    valid = padding(batch, queries + past, seed) if padded else torch.ones(batch, queries + past, dtype=torch.bool)
    first = torch.randint(0, queries if own_starts else 1, (batch,), generator=generator(seed))
    expected, lse = counted_mass(query, key, valid, first, start % queries, stride)
    with pytest.MonkeyPatch.context() as patch:  # small tiles, so that small shapes have many
        patch.setattr(mass, "_tile", lambda *_: tile)
        found = kernels.attention_mass(
            query,
            key,
            lse.float(),
            0.25,
            valid=valid if padded else None,
            first=first if own_starts else None,
            start=start % queries,
            stride=stride,
        )
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("largest", [20, 500, 1500])
def test_mass_in_half_precision_is_that_of_the_numbers_as_they_are(dtype: torch.dtype, largest: int) -> None:
    g = generator(0)
    query, key = (torch.randn(1, heads, 300, 128, generator=g).to(dtype) for heads in (6, 2))
    query = (query * (largest / float((query.double() @ key.repeat_interleave(3, 1).double().mT).max() / 128**0.5))).to(
        dtype
    )
    weights, lse = probabilities(query, key, causal=True)
    found = kernels.attention_mass(query, key, lse.float(), 128**-0.5)
    expected = weights.sum(2).view(1, 2, 3, -1).sum(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=largest * 1e-6)


@given(**SHAPES, last=st.integers(1, 40))
def test_written_out_probabilities_are_those_of_tokens_that_are_no_padding(
    batch: int, kv_heads: int, group: int, queries: int, past: int, seed: int, last: int
) -> None:
    query, key, _ = tensors(batch, kv_heads, group, queries, queries + past, seed)
    valid = padding(batch, queries + past, seed)
    weights, lse = probabilities(query, key, True, valid)
    found = kernels.attention_probabilities(query, key, lse.float(), 0.25, last, valid)
    expected = (weights * valid[:, None, -queries:, None])[:, :, -last:]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mass_is_finite_where_unseen_keys_have_huge_logits(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 40, 16), 8.0, dtype=dtype)
    key = torch.linspace(-8, 8, 40, dtype=dtype)[None, None, :, None].expand(1, 1, 40, 16).contiguous()
    _, lse = kernels.attention_with_lse(query, key, key, 0.25, causal=True)
    found = kernels.attention_mass(query, key, lse, 0.25)
    assert bool(found.isfinite().all())
    assert float(found.sum()) == pytest.approx(40, rel=0.02)


def test_no_tile_is_larger_than_its_budget() -> None:
    for heads in (1, 9, 64, 1024):
        queries, keys = mass._tile(heads, torch.device("cpu"))
        assert queries == 16 or queries * keys * heads <= mass._TILE_LOGITS_CPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_kernels_give_the_log_sum_exp(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to("cuda", dtype) for tensor in tensors(2, 2, 3, 77, 77, 0))
    output, lse = kernels.attention_with_lse(query, key, value, 0.25, causal=True)
    expected = dense._blockwise(query, key, value, 0.25, None, True)
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected[1], atol=2e-2, rtol=2e-2)
