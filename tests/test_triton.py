"""Triton kernels against the written-out formulas in float64: on a GPU, or run by Triton's interpreter on a CPU.

The interpreter multiplies matrices of float32 and float16 alone, so bfloat16 is computed on GPUs only; that it compiles
is tested everywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.kernels.codes import codes_op
from kvcompress.kernels.ragged import _in_torch
from tests.strategies import generator
from tests.test_kernels import counted_mass, padding, quantized, slots_attention, without_gaps

pytest.importorskip("triton", reason="needs Triton, which is published for Linux alone: pip install triton")

from kvcompress.kernels import triton_codes, triton_decode, triton_mass, triton_write, write_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.cuda] * (DEVICE == "cuda")  # by the device itself where there is one
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
ERRORS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape))).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor, error: float) -> None:
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected.double(), atol=error, rtol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "queries", "tokens", "head_dim", "stride", "start", "own_starts", "padded"),
    [
        (2, 2, 50, 77, 16, 1, 0, False, False),
        (1, 3, 150, 150, 20, 7, 3, True, True),
        (1, 1, 40, 140, 128, 1, 0, True, False),
        (1, 16, 5, 70, 32, 1, 2, False, True),
        (1, 1, 40, 40, 80, 50, 39, False, False),
        (1, 1, 1, 130, 16, 1, 0, False, False),
    ],
)
def test_the_mass_kernel_sums_the_counted_probabilities(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    queries: int,
    tokens: int,
    head_dim: int,
    stride: int,
    start: int,
    own_starts: bool,
    padded: bool,
) -> None:
    query = drawn(dtype, 2, queries, kv_heads * group, head_dim).transpose(1, 2)
    key = drawn(dtype, 2, kv_heads, tokens + 3, head_dim)[:, :, :tokens]
    valid = padding(2, tokens, 0) if padded else torch.ones(2, tokens, dtype=torch.bool)
    first = torch.randint(0, queries if own_starts else 1, (2,), generator=generator(0))
    valid, first = valid.to(DEVICE), first.to(DEVICE)
    expected, lse = counted_mass(query, key, valid, first, start, stride)
    rows = (valid if padded else None, first if own_starts else None)
    found = triton_mass.mass(query, key, lse.float(), head_dim**-0.5, *rows, stride, start)
    close(found, expected, 1e-4)  # the same in half precision: the numbers as they are


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "slots", "head_dim", "value_dim", "lengths"),
    [
        (2, 2, 77, 16, 16, [[30], [0]]),
        (2, 3, 300, 20, 20, [[300, 1], [64, 129]]),
        (1, 16, 40, 64, 64, None),
        (1, 1, 140, 128, 96, [[140], [7]]),
        (1, 1, 5, 256, 256, [[4], [5]]),
    ],
)
def test_the_decode_kernel_attends_over_slots_in_use(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    slots: int,
    head_dim: int,
    value_dim: int,
    lengths: list[list[int]] | None,
) -> None:
    query = drawn(dtype, 2, 1, kv_heads * group, head_dim).transpose(1, 2)
    keys = drawn(dtype, 2, kv_heads, slots + 9, head_dim)[:, :, :slots]
    values = drawn(dtype, 2, kv_heads, slots + 9, value_dim)[:, :, 9:]
    length = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    found = triton_decode.decode(query, keys, values, head_dim**-0.5, length)
    assert found.dtype == dtype
    close(found, slots_attention(query, keys, values, length), ERRORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("without_gaps", [False, True])
@pytest.mark.parametrize("sets", [1, 3])
def test_the_write_kernel_changes_one_slot_of_each_head(dtype: torch.dtype, without_gaps: bool, sets: int) -> None:
    """As `write_slots` does without it, and nothing else, for keys and values of different widths."""
    shape = (2, 3, 9) if not without_gaps else (2 * 3 * 9,)
    keys, values = drawn(dtype, *shape, 20), drawn(dtype, *shape, 16)
    key, value = drawn(dtype, 2, 1, 3, 20).transpose(1, 2), drawn(dtype, 2, 3, 1, 16)
    slot = torch.tensor([[4, 0, 8], [7, 7, 1]], device=DEVICE)[:, :sets]
    start = torch.arange(6, device=DEVICE).view(2, 3) * 9 if without_gaps else None
    expected = keys.clone().cpu(), values.clone().cpu()
    write_slots(*expected, key.cpu(), value.cpu(), slot.cpu(), None if start is None else start.cpu())
    triton_write.write(keys, values, key, value, slot, start)
    assert torch.equal(keys.cpu(), expected[0]) and torch.equal(values.cpu(), expected[1])


def test_the_write_kernel_leaves_what_is_beyond_its_buffers() -> None:
    """A row whose slot is not there writes into no other row."""
    keys, values = drawn(torch.float32, 2, 1, 5, 16), drawn(torch.float32, 2, 1, 5, 16)
    before = keys.clone(), values.clone()
    new = drawn(torch.float32, 2, 1, 1, 16)
    triton_write.write(keys, values, new, new, torch.tensor([[5], [-1]], device=DEVICE), None)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_a_token_in_another_dtype_is_not_cast_unasked(device: str) -> None:
    keys, values = (torch.zeros(1, 1, 4, 16, device=device) for _ in range(2))
    new, slot = torch.ones(1, 1, 1, 16, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    for pair in ((new.half(), new), (new, new.half())):
        with pytest.raises(TypeError, match="go on in one dtype"):
            write_slots(keys, values, *pair, slot)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim", "group"), [(16, 16, 2), (20, 32, 3)])
def test_the_decode_kernel_reads_buffers_without_gaps(
    dtype: torch.dtype, head_dim: int, value_dim: int, group: int
) -> None:
    """Each row and head begins where it does, and has as many slots as it has."""
    slots = torch.tensor([[70, 3, 1], [130, 9, 40]])
    length = torch.tensor([[65, 3, 0], [129, 1, 40]])
    start = (slots.flatten().cumsum(0) - slots.flatten()).view(2, 3)
    keys, values = (drawn(dtype, int(slots.sum()), 1, 1, size)[:, 0, 0] for size in (head_dim, value_dim))
    query = drawn(dtype, 2, 1, 3 * group, head_dim).transpose(1, 2)
    places = (start.unsqueeze(-1) + torch.arange(130)).clamp(max=len(keys) - 1).to(DEVICE)
    expected = slots_attention(query, keys[places], values[places], length.to(DEVICE))
    found = triton_decode.decode(query, keys, values, head_dim**-0.5, length.to(DEVICE), start.to(DEVICE), 130)
    in_torch = _in_torch(query, keys, values, head_dim**-0.5, length.to(DEVICE), start.to(DEVICE), 130)
    for one in (found, in_torch):
        close(one, expected, ERRORS[dtype])


def test_what_lies_in_unused_slots_counts_for_nothing() -> None:
    query, keys, values = drawn(torch.float32, 1, 2, 1, 16), *(drawn(torch.float32, 1, 1, 90, 16) for _ in range(2))
    length = torch.tensor([[33]], device=DEVICE)
    expected = triton_decode.decode(query, keys[:, :, :33], values[:, :, :33], 0.25, None)
    keys[:, :, 33:] = values[:, :, 33:] = torch.nan
    close(triton_decode.decode(query, keys, values, 0.25, length), expected, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8, "float8"])
@pytest.mark.parametrize(
    ("head_dim", "group", "slots", "full", "own_rows"),
    [(16, 8, 40, 3, False), (32, 64, 128, 0, False), (20, 8, 96, 5, True), (128, 64, 64, 1, False)],
)
def test_the_kernel_over_codes_attends_over_what_they_stand_for(
    dtype: torch.dtype, bits: Any, head_dim: int, group: int, slots: int, full: int, own_rows: bool
) -> None:
    keys, exact_keys = quantized(bits, (2, 2, slots, head_dim), group, head_dim, dtype, 0)
    values, exact_values = quantized(bits, (2, 2, slots, head_dim), 1, max(1, head_dim // 64), dtype, 1)
    query, other_keys, other_values = (drawn(dtype, 2, 2, size, head_dim) for size in (2, full, full))
    query = query.view(2, 4, 1, head_dim)
    lengths = torch.tensor([[slots], [slots // 3]]), torch.tensor([[full], [0]])
    rows = (torch.arange(slots) // group).int().expand(2, 2, -1).to(DEVICE) if own_rows else None
    tensors = [None if tensor is None else tensor.to(DEVICE) for tensor in (*keys, *values)]
    coded, length = (length.to(DEVICE) for length in lengths)
    rest = (other_keys, other_values, head_dim**-0.5, coded, length, rows, None)
    expected = slots_attention(
        query,
        torch.cat([exact_keys.to(DEVICE), other_keys.double()], 2),
        torch.cat([exact_values.to(DEVICE), other_values.double()], 2),
        (coded, length),
        slots,
    )
    close(triton_codes.decode_codes(query, *tensors, *rest), expected, ERRORS[dtype])
    close(codes_op(query, *tensors, *rest), expected, ERRORS[dtype])


@pytest.mark.parametrize(("bits", "own_rows"), [(2, False), (4, True), (8, False), ("float8", True)])
def test_the_kernel_over_codes_reads_them_without_gaps(bits: Any, own_rows: bool) -> None:
    """Rows and heads with different numbers of slots, coded and not; some have none of the one or the other."""
    slots, full, head_dim, group, dtype = 96, 20, 32, 8, torch.float32
    used, length = torch.tensor([[96, 8], [0, 41]]), torch.tensor([[20, 3], [1, 0]])
    keys, exact_keys = quantized(bits, (2, 2, slots, head_dim), group, head_dim, dtype, 0)
    values, exact_values = quantized(bits, (2, 2, slots, head_dim), 1, 1, dtype, 1)
    query, other_keys, other_values = (drawn(dtype, 2, 2, size, head_dim) for size in (2, full, full))
    query = query.view(2, 4, 1, head_dim)
    (flat_keys, start), (flat_values, _) = without_gaps(keys, used, group), without_gaps(values, used, group)
    rows = (torch.arange(flat_keys[0].shape[2]) // group)[None, None].int() if own_rows else None
    places = (start, slots, torch.arange(4).view(2, 2) * full, full)
    arguments = (*flat_keys, *flat_values, other_keys.flatten(0, 2), other_values.flatten(0, 2), head_dim**-0.5)
    arguments = (*arguments, used, length, rows, None, *places)
    on_device = [one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in arguments]
    exact = (
        torch.cat([exact_keys.to(DEVICE), other_keys.double()], 2),
        torch.cat([exact_values.to(DEVICE), other_values.double()], 2),
    )
    expected = slots_attention(query, *exact, (used.to(DEVICE), length.to(DEVICE)), slots)
    close(triton_codes.decode_codes(query, *on_device), expected, ERRORS[dtype])
    close(codes_op(query, *on_device), expected, ERRORS[dtype])


@pytest.mark.timeout(600)
def test_kernels_compile_for_gpus_that_are_not_here_and_spill_nothing() -> None:
    """Triton's compiler needs no GPU; 99 KiB of shared memory is what the smallest of these GPUs gives a program.

    Codes in float32 are no use case that registers are laid out for: there a few numbers may lie in local memory.
    """
    cases = ["bfloat16:128:4:80", "bfloat16:128:4:90", "float32:256:16:80", "float16:64:1:90", "bfloat16:128:16:90"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_kernels", *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 8 * len(cases)
    for resources in found:
        in_float32 = resources["case"].startswith("float32") and resources["kernel"].startswith("codes")
        assert resources["local"] <= 512 * in_float32, resources
        assert resources["shared"] <= 99 * 1024, resources
