"""The kernels against plain float64 attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import kernels
from kvcompress.kernels import codes, mass, written_out
from kvcompress.policies.registry import QUANTIZERS
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
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).triu(past + 1)
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


def slots_attention(query: Tensor, keys: Tensor, values: Tensor, length: Any, first: int = 0) -> Tensor:
    """Attention of one query over slots in use in float64; those from `first` on may have another length."""
    (batch, kv_heads, slots), heads, slot = (
        keys.shape[:3],
        query.shape[1],
        torch.arange(keys.shape[2], device=keys.device),
    )
    used = torch.ones(batch, 1, slots, dtype=torch.bool, device=keys.device)
    if isinstance(length, tuple):
        used = torch.where(slot < first, slot < length[0].unsqueeze(-1), slot - first < length[1].unsqueeze(-1))
    elif length is not None:
        used = slot < length.unsqueeze(-1)
    grouped = query.double().reshape(batch, kv_heads, -1, query.shape[3])
    logits = grouped @ keys.double().transpose(2, 3) * query.shape[3] ** -0.5
    weights = logits.masked_fill(~used.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num()
    return (weights @ values.double()).view(batch, heads, 1, -1)


def quantized(
    bits: int | str, shape: tuple[int, ...], group: int, parts: int, dtype: torch.dtype, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """Codes drawn at random, with their scales and shifts, and the numbers they stand for in float64."""
    g, (batch, heads, slots, dim) = generator(seed), shape
    scale = (torch.rand(batch, heads, slots // group, parts, generator=g) * 0.2 + 0.1).to(dtype)
    wide = scale.double().repeat_interleave(group, 2).repeat_interleave(dim // parts, 3)
    if bits == "float8":
        codes = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
        return (codes, scale, None), codes.double() * wide
    assert isinstance(bits, int)
    numbers = torch.randint(0, 2**bits, shape, generator=g)
    if bits == 8:
        scale, wide = scale / 16, wide / 16
    shift = torch.rand(scale.shape, generator=g).to(dtype)
    width = -(-dim * bits // 8)
    codes = torch.zeros(*shape[:3], width, dtype=torch.uint8)
    for place in range(dim):
        codes[..., place % width] |= (numbers[..., place] << bits * (place // width)).to(torch.uint8)
    exact = numbers * wide - shift.double().repeat_interleave(group, 2).repeat_interleave(dim // parts, 3)
    return (codes, scale, shift), exact


SHAPES = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "group": st.integers(1, 3),
    "queries": st.integers(1, 40),
    "past": st.integers(0, 30),
    "seed": st.integers(0, 9),
}


@given(**SHAPES)
def test_attention_with_its_log_sum_exp_is_attention(
    batch: int, kv_heads: int, group: int, queries: int, past: int, seed: int
) -> None:
    query, key, value = tensors(batch, kv_heads, group, queries, queries + past, seed)
    weights, sums = probabilities(query, key, causal=False)
    values = value.repeat_interleave(group, 1).double()
    for output, lse in (
        kernels.attention_with_mask(query, key, value, 0.25, None, causal=False),
        written_out.attention_in_blocks(query, key, value, 0.25, None, False),
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
        output, lse = written_out.attention_in_blocks(query, key, value, 0.25, valid, causal)
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
    output, lse = kernels.attention_with_mask(query, key[:, :, past:], value[:, :, past:], 0.25, None)
    if past:
        older = kernels.attention_with_mask(query, key[:, :, :past], value[:, :, :past], 0.25, None, causal=False)
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
    counted = torch.zeros_like(valid[:, -queries:])
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
    _, lse = kernels.attention_with_mask(query, key, key, 0.25, None)
    found = kernels.attention_mass(query, key, lse, 0.25)
    assert bool(found.isfinite().all())
    assert float(found.sum()) == pytest.approx(40, rel=0.02)


def test_no_tile_is_larger_than_its_budget() -> None:
    for heads in (1, 9, 64, 1024):
        queries, keys = mass._tile(heads, torch.device("cpu"))
        assert queries == 16 or queries * keys * heads <= mass._TILE_LOGITS_CPU


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    slots=st.integers(1, 40),
    per_head=st.booleans(),
    ragged=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_query_attends_over_the_slots_in_use(
    batch: int, kv_heads: int, group: int, slots: int, per_head: bool, ragged: bool, seed: int
) -> None:
    query, keys, values = tensors(batch, kv_heads, group, 1, slots, seed)
    sets = kv_heads if per_head else 1
    length = torch.randint(0, slots + 1, (batch, sets), generator=generator(seed)) if ragged else None
    found = kernels.decode_attention(query, keys, values, 0.25, length)
    torch.testing.assert_close(found.double(), slots_attention(query, keys, values, length), atol=1e-5, rtol=1e-5)


@given(
    bits=st.sampled_from([2, 4, 8, "float8"]),
    head_dim=st.sampled_from([8, 20]),
    group=st.sampled_from([4, 16]),
    groups=st.integers(1, 3),
    full=st.integers(0, 5),
    ragged=st.booleans(),
    own_rows=st.booleans(),
    seed=st.integers(0, 9),
)
def test_codes_are_attended_as_what_they_stand_for(
    bits: int | str, head_dim: int, group: int, groups: int, full: int, ragged: bool, own_rows: bool, seed: int
) -> None:
    g, slots = generator(seed), group * groups
    keys, exact_keys = quantized(bits, (2, 2, slots, head_dim), group, head_dim, torch.float32, seed)
    values, exact_values = quantized(bits, (2, 2, slots, head_dim), 1, 2, torch.float32, seed + 1)
    query = torch.randn(2, 4, 1, head_dim, generator=g)
    others = [torch.randn(2, 2, full, head_dim, generator=g) for _ in range(2)]
    sizes = (slots, full)
    lengths = tuple(torch.full((2, 2), size) for size in sizes)
    if ragged:
        lengths = tuple(torch.randint(0, size + 1, (2, 2), generator=g) for size in sizes)
    rows = (torch.arange(slots) // group).expand(2, 2, -1) if own_rows else None
    with pytest.MonkeyPatch.context() as patch:  # several blocks
        patch.setattr(codes, "_BLOCK", 16)
        found = kernels.decode_attention_codes(
            query,
            *keys,
            *values,
            *others,
            head_dim**-0.5,
            *(lengths if ragged else (None, None)),
            key_rows=rows,
        )
    exact = torch.cat([exact_keys, others[0].double()], 2), torch.cat([exact_values, others[1].double()], 2)
    expected = slots_attention(query, *exact, lengths, slots)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def without_gaps(
    codes: tuple[Tensor, Tensor, Tensor | None], used: Tensor, group: int
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """The first slots of every row and head one after the other, in whole groups, and where those of each begin."""
    data, *scales = codes
    room = (used + group - 1) // group * group
    rows = data.shape[2] // scales[0].shape[2]  # slots of a row of scales

    def flat(tensor: Tensor, each: int) -> Tensor:
        heads = zip(tensor.flatten(0, 1), room.flatten().tolist(), strict=True)
        return torch.cat([of_head[: slots // each] for of_head, slots in heads])[None, None]

    packed = flat(data.view(torch.uint8), 1).view(data.dtype)
    scale, shift = (None if scale is None else flat(scale, rows) for scale in scales)
    assert scale is not None
    return (packed, scale, shift), (room.flatten().cumsum(0) - room.flatten()).view(used.shape)


@given(
    bits=st.sampled_from([2, 4, 8, "float8"]),
    group=st.sampled_from([4, 16]),
    own_rows=st.booleans(),
    seed=st.integers(0, 9),
)
def test_codes_without_gaps_are_attended_as_what_they_stand_for(
    bits: int | str, group: int, own_rows: bool, seed: int
) -> None:
    """Rows and heads with different numbers of slots, coded and not; some have none of the one or the other."""
    g, slots, full, head_dim = generator(seed), 48, 5, 8
    used, length = (torch.randint(0, most + 1, (2, 2), generator=g) for most in (slots, full))
    used[0, 0] = slots
    keys, exact_keys = quantized(bits, (2, 2, slots, head_dim), group, head_dim, torch.float32, seed)
    values, exact_values = quantized(bits, (2, 2, slots, head_dim), 1, 2, torch.float32, seed + 1)
    query = torch.randn(2, 4, 1, head_dim, generator=g)
    others = [torch.randn(2, 2, full, head_dim, generator=g) for _ in range(2)]
    (flat_keys, start), (flat_values, _) = without_gaps(keys, used, group), without_gaps(values, used, group)
    rows = (torch.arange(flat_keys[0].shape[2]) // group)[None, None].int() if own_rows else None
    with pytest.MonkeyPatch.context() as patch:  # several blocks
        patch.setattr(codes, "_BLOCK", 16)
        found = kernels.decode_attention_codes(
            query,
            *flat_keys,
            *flat_values,
            *(other.flatten(0, 2) for other in others),
            head_dim**-0.5,
            used,
            length,
            key_rows=rows,
            code_start=start,
            code_slots=slots,
            start=torch.arange(4).view(2, 2) * full,
            slots=full,
        )
    exact = torch.cat([exact_keys, others[0].double()], 2), torch.cat([exact_values, others[1].double()], 2)
    torch.testing.assert_close(
        found.double(), slots_attention(query, *exact, (used, length), slots), atol=1e-5, rtol=1e-5
    )


OF_CODES = {
    "quanto2",
    "quanto4",
    "quanto8",
    *(n for n in QUANTIZERS.names() if QUANTIZERS.get(n).code_dtype is not None),
}


@pytest.mark.parametrize("name", sorted(OF_CODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantizers_write_the_layout_that_they_say_kernels_read(name: str, dtype: torch.dtype) -> None:
    quantizer, keys = QUANTIZERS.create(name, group=8), torch.randn(1, 2, 24, 16, generator=generator(0)).to(dtype)
    for written in (quantizer.encode_keys(keys), quantizer.encode_values(keys)):
        read = codes.decoded(written.data.view(quantizer.code_dtype), written.scale, written.shift, 16)
        torch.testing.assert_close(read, quantizer.decode(written), rtol=0, atol=0)
        assert written.data.dtype.itemsize == 1
        if written.shift is not None:
            assert written.shift.stride() == written.scale.stride()


def test_decoding_is_one_graph_for_all_lengths_and_its_operators_one_node() -> None:
    """In a process of its own: the type checks that tests put on every function are none of the compiler's business."""
    done = subprocess.run([sys.executable, "-m", "tests.traced_kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("past", "causal"), [(0, True), (21, True), (0, False)])
def test_cuda_kernels_attend_as_blocks_do(dtype: torch.dtype, padded: bool, past: int, causal: bool) -> None:
    query, key, value = (tensor.to("cuda", dtype) for tensor in tensors(2, 2, 3, 77, 77 + past, 0))
    valid = padding(2, 77 + past, 0).cuda() if padded else None
    output, lse = kernels.attention_with_mask(query, key, value, 0.25, valid, causal=causal)
    expected = written_out.attention_in_blocks(query, key, value, 0.25, valid, causal)
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected[1], atol=2e-2, rtol=2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cuda_graph_holds_decoding_while_lengths_change(dtype: torch.dtype) -> None:
    query, keys, values = (tensor.to("cuda", dtype) for tensor in tensors(2, 2, 3, 1, 300, 0))
    length = torch.tensor([[300, 7], [31, 128]], device="cuda")
    kernels.decode_attention(query, keys, values, 0.25, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.decode_attention(query, keys, values, 0.25, length)
    length.copy_(torch.tensor([[1, 300], [299, 0]]))
    graph.replay()
    expected = slots_attention(query, keys, values, length)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("ahead", [False, True], ids=["causal", "both ways"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("part", [None, slice(3, 17)], ids=["all", "part"])
def test_the_highest_probability_is_that_of_all_written_out(
    part: slice | None, padded: bool, softcap: float | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the queries of a group's heads, more of them than are taken at once, and after older keys."""
    monkeypatch.setattr(kernels.highest, "_TILE_LOGITS_CPU", 1)
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 70, 8, generator=g), torch.randn(2, 2, 90, 8, generator=g)
    lse, valid, last_seen = torch.randn(2, 4, 70, generator=g) + 6, None, None
    if padded:
        valid = torch.ones(2, 1, 90, dtype=torch.bool)
        valid[1, :, 15:26] = False
    if ahead:
        last_seen = torch.arange(70).expand(2, -1).clone()
        last_seen[:, 5:40] = 40
    rows = None if valid is None else valid[:, 0]
    every = kernels.attention_probabilities(query, key, lse, 0.3, 70, rows, softcap, last_seen)
    found = kernels.highest_probability(query, key, lse, 0.3, valid, softcap, last_seen, part)
    wanted = every.unflatten(1, (2, 2)).amax((2, 3))
    seen = torch.ones_like(wanted, dtype=torch.bool) if valid is None else valid.expand_as(wanted)
    wanted, seen = (of_keys[..., part or slice(None)] for of_keys in (wanted, seen))
    torch.testing.assert_close(found[seen], wanted[seen])
