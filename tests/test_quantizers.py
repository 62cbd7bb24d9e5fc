"""Quantizers: how far off a number may be, what is never touched again, and a store that forgets nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from kvcompress import QUANTIZERS, Budget, CompressedCache, CompressionConfig
from kvcompress.cache import coder
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.testing.numbers import tensors
from tests import strategies, tiny
from tests.reference import held

NAMES = [f"{policy.name}{getattr(policy, 'bits', '')}" for policy in strategies.quantizers()]
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Attention decodes a few slots at a time, so that a handful of tokens already makes several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "_BLOCK", 8)
        yield


class Lossless(Quantizer):
    """Divides by a power of two: keys with one for each head and group, values with one for each head and token."""

    name: ClassVar[str] = "lossless"

    def encode_keys(self, keys: Keys) -> Codes:
        batch, heads, tokens, _ = keys.shape
        blocks = keys.reshape(batch, heads, tokens // self.group, -1)
        return self._encode(keys, blocks)

    def encode_values(self, values: Values) -> Codes:
        return self._encode(values, values)

    def decode(self, codes: Codes) -> Keys:
        numbers = codes.data.view(codes.scale.dtype)
        each = codes.scale.repeat_interleave(numbers.shape[2] // codes.scale.shape[2], 2)
        return numbers * each

    def _encode(self, tensor: Tensor, blocks: Tensor) -> Codes:
        scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).clamp(min=2**-20).log2().floor())
        numbers = (blocks / scale).view(tensor.shape)
        return Codes(numbers.view(torch.uint8), scale, None, tensor.shape[3])


# -- numbers -----------------------------------------------------------------------------------------------------------


def hadamard(size: int) -> list[list[int]]:
    """Rows of signs, by doubling."""
    if size == 1:
        return [[1]]
    half = hadamard(size // 2)
    return [row + row for row in half] + [row + [-sign for sign in row] for row in half]


def turned(tensor: Tensor) -> Tensor:
    """Every run of dimensions, as long as the largest power of two that divides them, times the matrix of unit rows."""
    size = next(size for size in (64, 32, 16, 8, 4, 2, 1) if tensor.shape[-1] % size == 0)
    matrix = torch.tensor(hadamard(size)).double() / size**0.5
    return torch.cat([run @ matrix for run in tensor.double().split(size, -1)], -1)


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [("quanto2", 2, 2), ("quanto4", 4, 4), ("quanto8", 8, 8), ("rotated2", 2, 2), ("rotated4", 4, 4), ("k8v4", 8, 4)],
)
@given(data=st.data(), group=st.sampled_from([1, 2, 8, 64]))
def test_a_number_is_off_by_half_a_step_at_most(
    name: str, key_bits: int, value_bits: int, data: st.DataObject, group: int
) -> None:
    """A step is the range of a channel in a group of tokens (keys), or of a token's run of channels (values).

    Of what is encoded: the numbers themselves, or each head's after a Hadamard rotation.
    """
    quantizer, given_keys = QUANTIZERS.create(name, group=group), data.draw(tensors(group))
    turn = (lambda tensor: tensor) if name.startswith("quanto") else turned
    keys = turn(given_keys)
    for encode, bits, grouped in (
        (quantizer.encode_keys, key_bits, keys.unflatten(2, (-1, group)).movedim(3, -1)),
        (quantizer.encode_values, value_bits, keys.unsqueeze(-2) if group == 64 else None),
    ):
        if grouped is None:
            continue
        found = quantizer.decode(encode(given_keys))
        assert found.shape == given_keys.shape and found.dtype == given_keys.dtype
        spread = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)).expand(grouped.shape)
        spread = (
            spread.movedim(-1, 3).reshape(keys.shape) if encode == quantizer.encode_keys else spread.view(keys.shape)
        )
        largest = given_keys.abs().amax(-1, keepdim=True) if turn is turned else keys.abs()
        allowed = spread / (2**bits - 1) / 2 + largest * 1e-5 + spread * 1e-5
        assert ((turn(found) - keys).abs() <= allowed).all()


@pytest.mark.parametrize(("name", "key_bits", "value_bits"), [("rotated2", 2, 2), ("rotated4", 4, 4), ("k8v4", 8, 4)])
@pytest.mark.parametrize("dim", [8, 12])
def test_rotated_codes_are_their_formula(name: str, key_bits: int, value_bits: int, dim: int) -> None:
    """Plain loops: x H is rounded to whole steps from the smallest of its group, and turned back."""
    quantizer, group = QUANTIZERS.create(name, group=16), 16
    given = torch.randn(1, 2, 32, dim, generator=strategies.generator(5))
    numbers, size = turned(given), dim & -dim
    signs = hadamard(size)

    def rounded(values: list[float], bits: int) -> list[float]:
        low, step = min(values), (max(values) - min(values)) / (2**bits - 1)
        return [low + step * round((value - low) / step) for value in values]

    def back(row: list[float]) -> list[float]:
        runs = [row[start : start + size] for start in range(0, dim, size)]
        return [sum(a * b for a, b in zip(run, line, strict=True)) / size**0.5 for run in runs for line in signs]

    keys, values = torch.zeros_like(numbers), torch.zeros_like(numbers)
    part = next(part for part in range(min(dim, group), 0, -1) if dim % part == 0 and group % part == 0)
    for head in range(2):
        for start in range(0, 32, group):
            for channel in range(dim):
                column = numbers[0, head, start : start + group, channel].tolist()
                keys[0, head, start : start + group, channel] = torch.tensor(rounded(column, key_bits))
        for token in range(32):
            for start in range(0, dim, part):
                run = numbers[0, head, token, start : start + part].tolist()
                values[0, head, token, start : start + part] = torch.tensor(rounded(run, value_bits))
    for encoded, expected in ((quantizer.encode_keys(given), keys), (quantizer.encode_values(given), values)):
        wanted = torch.tensor([[[back(row) for row in head] for head in expected[0].tolist()]])
        torch.testing.assert_close(quantizer.decode(encoded), wanted.float(), rtol=0, atol=2e-5)


def test_rotation_evens_out_what_a_few_channels_hold() -> None:
    """Of values in which two channels outweigh all others, four bits lose less than half as much, in as many bytes."""
    values = torch.randn(1, 2, 128, 64, generator=strategies.generator(0))
    values[..., (3, 40)] *= 20
    lost, size = [], []
    for name in ("quanto4", "rotated4"):
        quantizer = QUANTIZERS.create(name)
        codes = quantizer.encode_values(values)
        lost.append(float((quantizer.decode(codes) - values).square().sum()))
        size.append(codes.nbytes)
    assert lost[1] < 0.5 * lost[0]
    assert size[1] == size[0]


@given(data=st.data(), group=st.sampled_from([1, 2, 8, 64]))
def test_fp8_keeps_three_bits_of_mantissa(data: st.DataObject, group: int) -> None:
    """The error is at most 1/16 of a number, or half a step of the smallest exponent of its block."""
    quantizer, keys = QUANTIZERS.create("fp8", group=group), data.draw(tensors(group))
    largest = keys.unflatten(2, (-1, group)).abs().amax((3, 4), keepdim=True)
    smallest = (largest / 448 * 2.0**-10).expand(-1, -1, -1, group, keys.shape[3]).reshape(keys.shape)
    for encode in (quantizer.encode_keys, quantizer.encode_values):
        error = (quantizer.decode(encode(keys)) - keys).abs()
        assert (error <= keys.abs() / 16 * (1 + 1e-5) + smallest * (1 + 1e-5)).all()


@pytest.mark.parametrize(("name", "bits"), [("quanto2", 2), ("quanto4", 4)])
@given(data=st.data())
def test_codes_are_packed_as_quanto_packs_them(name: str, bits: int, data: st.DataObject) -> None:
    """Quanto's own operator unpacks the bytes into the codes that give the numbers back."""
    from optimum.quanto.library import unpack  # noqa: F401

    quantizer, keys = QUANTIZERS.create(name, group=4), data.draw(tensors(4))
    codes = quantizer.encode_keys(keys)
    assert codes.data.dtype == torch.uint8
    assert codes.data.shape[-1] == -(-keys.shape[3] * bits // 8)
    numbers = torch.ops.quanto.unpack(codes.data.movedim(-1, 0), bits).movedim(0, -1)[..., : keys.shape[3]].float()
    wanted = numbers * codes.scale.repeat_interleave(4, 2) - codes.shift.repeat_interleave(4, 2)
    torch.testing.assert_close(quantizer.decode(codes), wanted, rtol=1e-5, atol=1e-6 * float(keys.abs().max()))


# -- the store ---------------------------------------------------------------------------------------------------------


@names
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=strategies.seeds)
def test_later_groups_leave_older_ones_alone(name: str, counts: list[int], seed: int) -> None:
    """Whatever comes, what was quantized stays bit for bit what it was, and its bytes are counted."""
    store, g, seen = QuantizedStore(QUANTIZERS.create(name, group=4, residual=3), 0), strategies.generator(seed), 0
    packed_before: list[Tensor] = []
    for new in counts:
        keys, values = (torch.randn(2, 2, new, 8, generator=g) for _ in range(2))
        store.append(keys, values, seen - store.packed)
        seen += new
        before = store.nbytes
        store.pack(np.array([[seen - store.packed]] * 2))
        assert store.packed == max(0, seen - 3) // 4 * 4
        assert store.nbytes <= before
        packed = [tensor[:, :, : store.packed] for tensor in _every_slot(store)]
        for old, now in zip(packed_before, packed, strict=False):
            assert torch.equal(old, now[:, :, : old.shape[2]])
        packed_before = packed


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 1.0, "evictor": None, "allocator": "uniform"},
        {"budget": Budget(tokens=30), "scorer": "attention", "allocator": "prefix"},
        {"budget": Budget(tokens=30), "scorer": "attention", "evictor": {"name": "topk", "granularity": "head"}},
        {"budget": 0.5, "scorer": "attention", "evictor": {"name": "topk", "decode": "none"}},
    ],
    ids=["everything", "prefix", "heads", "grows"],
)
@strategies.examples(6)
@given(
    lengths=st.lists(st.integers(35, 70), min_size=1, max_size=2),
    forwards=st.lists(st.sampled_from([1, 1, 1, 9]), max_size=14),
    swap=st.booleans(),
    seed=strategies.seeds,
)
def test_a_quantizer_that_loses_nothing_changes_nothing(
    family: str, fields: dict[str, Any], lengths: list[int], forwards: list[int], swap: bool, seed: int
) -> None:
    """Logits and columns are those of the same policies without a quantizer, through turns, padding and beams.

    But for layers whose fixed point comes to lie among quantized tokens (prompts shorter than the budget, layers that a
    turn shrinks): what is quantized stays.
    """
    model = tiny.model(family)
    config = CompressionConfig(**fields)
    if config.allocator.name == "prefix":  # whose layers turns may shrink
        forwards = [1] * len(forwards)
    lossless = config.model_copy(update={"quantizer": Lossless(group=4, residual=26)})
    plain, packed = CompressedCache(model, config), CompressedCache(model, lossless)
    valid = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = tiny.token_ids(len(lengths), max(lengths), seed)
    for number, tokens in enumerate([0, *forwards]):
        if number:
            ids = tiny.token_ids(len(lengths), tokens, seed + number)
            valid = torch.cat([valid, torch.ones_like(ids, dtype=torch.bool)], 1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": valid.long(), "position_ids": positions}
        with torch.no_grad():
            wanted, found = (model(**inputs, **tiny.with_cache(cache)).logits for cache in (plain, packed))
        torch.testing.assert_close(found[:, -1], wanted[:, -1], rtol=0, atol=1e-4)
        assert held(plain) == held(packed)
        if swap:
            for cache in (plain, packed):
                cache.reorder_cache(torch.arange(len(lengths)).flip(0))
            valid = valid.flip(0)
    for layer, lengths_held in zip(packed.layers, packed.report().layer_lengths, strict=True):
        assert layer.store.packed or min(lengths_held) <= 30  # a group that is old enough goes with the next step


def _every_slot(store: QuantizedStore) -> tuple[Tensor, Tensor]:
    keys, values = zip(*store.blocks(store.capacity), strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


@names
def test_generation_runs_and_bytes_fall(name: str) -> None:
    """Greedy, beams and assisted-style rollback run on a quantized cache, which holds less than full precision."""
    model, ids = tiny.model("llama"), tiny.token_ids(2, 120, seed=3)
    for beams in (1, 3):
        cache = CompressedCache(model, "prefixkv", budget=0.8, quantizer={"name": name, "group": 8, "residual": 25})
        settings_ = GenerationConfig(
            max_new_tokens=20, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        model.generate(input_ids=ids, **tiny.with_cache(cache), generation_config=settings_)
        report = cache.report()
        assert report.kv_bytes < 0.85 * report.retention * report.full_kv_bytes
    cache = CompressedCache(model, "full", quantizer={"name": name, "group": 8, "residual": 8})
    with torch.no_grad():
        model(ids, **tiny.with_cache(cache))
        model(tiny.token_ids(2, 5, seed=4), **tiny.with_cache(cache))
    cache.crop(-90)  # into what is quantized
    assert cache.get_seq_length() == 35
    assert [layer.store.packed for layer in cache.layers] == [35] * 3
    with torch.no_grad():
        model(tiny.token_ids(2, 5, seed=5), **tiny.with_cache(cache))
    assert cache.report().layer_lengths == [[40, 40]] * 3


def test_a_budget_in_bytes_counts_quantized_bytes() -> None:
    """Four bits hold more tokens in the same bytes, and the bytes stay within the budget."""
    model, ids = tiny.model("llama"), tiny.token_ids(1, 400, seed=3)
    lengths = []
    for quantizer in (None, {"name": "quanto4", "group": 8, "residual": 25}):
        cache = CompressedCache(model, "uniform", budget="64KiB", quantizer=quantizer)
        with torch.no_grad():
            model(ids, **tiny.with_cache(cache))
            for number in range(20):
                assert cache.report().kv_bytes <= 64 * 1024
                model(tiny.token_ids(1, 1, seed=number), **tiny.with_cache(cache))
        lengths.append(cache.report().layer_lengths[0][0])
    assert lengths[1] > 1.5 * lengths[0]


@pytest.mark.parametrize(
    "evictor",
    [
        "streaming",
        {"name": "topk", "decode": "oldest"},
        {"name": "topk", "decode": "lowest_score"},
        {"name": "topk", "distance": 80},
    ],
    ids=str,
)
def test_what_decoding_frees_must_not_be_quantized(evictor: Any) -> None:
    """Single slots of a group cannot be freed, so a rule that would is refused with a way out."""
    with pytest.raises(ConfigError, match=r"quantizer quanto: .*residual of 64.*fixed_point"):
        CompressionConfig(scorer="attention", evictor=evictor, quantizer="quanto4")
    CompressionConfig(
        scorer="attention", evictor={"name": "topk", "distance": 80}, quantizer={"name": "quanto4", "residual": 80}
    )
