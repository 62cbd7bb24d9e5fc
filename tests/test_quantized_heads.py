"""Heads with budgets of their own are quantized, each in its own number of whole groups, and no memory beyond that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from kvcompress import Budget, CompressedCache, CompressionConfig
from kvcompress.cache import coder
from kvcompress.cache.layer import CompressedLayer
from kvcompress.testing.running import forwards, require_masked, with_budget
from tests import strategies, tiny
from tests.operations import Operations
from tests.reference import Reference, held
from tests.strategies import examples
from tests.test_heads import BY_HEAD, every_allocator, of_heads, padded
from tests.test_physical_equals_masked import budgets, schedules
from tests.test_quantized_rows import run
from tests.test_quantizers import Lossless

FOUR_BITS = {"name": "quanto4", "group": 4, "residual": 7}
NEAR = {"name": "topk", "distance": 3}  # frees among the last slots alone


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Attention decodes a few slots at a time, so that a handful of tokens already makes several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "_BLOCK", 8)
        yield


def coded(cache: CompressedCache) -> list[list[list[int]]]:
    """Quantized tokens of every layer, row and head."""
    return [[] if layer.store.coded is None else layer.store.coded.tolist() for layer in cache.layers]


@every_allocator
@pytest.mark.parametrize("decode", ["fixed_point", "none"])
@examples(3)
@given(
    budget=budgets,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    schedule=schedules,
    group=st.sampled_from([1, 2, 4]),
    seed=strategies.seeds,
)
def test_every_forward_equals_masked_attention(
    allocator: dict[str, Any],
    decode: str,
    budget: Any,
    lengths: list[int],
    schedule: list[int],
    group: int,
    seed: int,
) -> None:
    """Prompt, decode steps and turns of a left-padded batch, with codes that lose nothing."""
    lossless = Lossless(group=group, residual=5 if decode == "fixed_point" else 1)
    config = of_heads(allocator, evictor={**NEAR, "decode": decode}, quantizer=lossless)
    cache = CompressedCache(tiny.model("llama"), with_budget(config, budget))
    schedule = [*schedule, 1, 1, 1, 1, 1]
    require_masked(
        Reference("llama"), cache, forwards(tiny.model("llama"), cache, padded(lengths, seed), schedule, seed)
    )


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_equals_masked_attention(name: str) -> None:
    """With grouped and ungrouped heads, and with images in the prompt; heads differ in what is quantized."""
    config = of_heads(BY_HEAD["headprefix"], budget=0.6, evictor=NEAR, quantizer=Lossless(group=2, residual=5))
    cache = CompressedCache(tiny.model(name), config)
    steps = forwards(tiny.model(name), cache, tiny.inputs(name, 40, seed=1), [1, 1, 4, 1, 1, 1], seed=2)
    require_masked(Reference(name), cache, steps)
    assert any(len({*row}) > 1 or len(row) == 1 for layer in coded(cache) for row in layer)


@torch.no_grad()
@pytest.mark.parametrize(("skew", "quantizer"), [(10, "quanto4"), (100, "fp8"), (10, "k8v4")])
def test_heads_hold_their_sum_and_no_more(skew: int, quantizer: str) -> None:
    """Of heads of which one keeps `skew` times what the others keep, codes and the rest take what they take alone."""
    layers, heads, tokens, residual, group = 3, 2, 400, 16, 8
    shares = [0.5 / skew] * layers * heads
    shares[::heads] = [0.5] * layers
    profile = {"name": "profile", "retention": shares, "heads": heads}
    small = {"name": quantizer, "group": group, "residual": residual}
    config = of_heads(profile, budget=sum(shares) / len(shares), evictor=NEAR, quantizer=small)
    model, prompt = tiny.model("llama"), tiny.inputs("llama", tokens, seed=3, batch=2)
    cache = CompressedCache(model, config)
    model(**prompt, **tiny.with_cache(cache))
    said, slot = cache.report(), 2 * 8 * 4  # bytes of a key and a value of one head
    lengths = [200, 200 // skew]
    assert said.head_lengths == [[lengths] * 2] * layers
    packed = [max(0, length - residual) // group * group for length in lengths]
    assert coded(cache) == [[packed] * 2] * layers
    store = cache.layers[0].store
    of_group = sum(codes.nbytes for codes in store._group_of_zeros(1))
    exact = sum(max(1, length - count) for length, count in zip(lengths, packed, strict=True))
    assert said.kv_bytes == layers * 2 * (exact * slot + sum(packed) // group * of_group)
    for step in range(20):  # what is generated comes out of the same memory
        model(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(cache))
    now = cache.report()
    assert now.kv_bytes <= said.kv_bytes + layers * 2 * heads * 2 * group * slot
    assert now.retention == pytest.approx(said.retention, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", ["quanto2", "fp8"])
def test_evicted_codes_give_their_bytes_back(name: str) -> None:
    """A turn that evicts quantized tokens of every head leaves no more bytes than what is left takes."""
    config = of_heads(BY_HEAD["headprefix"], budget=50, evictor=NEAR, quantizer={**FOUR_BITS, "name": name})
    cache, fresh, model = *(CompressedCache(tiny.model("llama"), config) for _ in range(2)), tiny.model("llama")
    model(**padded([90, 70], seed=1), **tiny.with_cache(cache))
    before = torch.tensor(coded(cache))
    model(tiny.token_ids(2, 60, seed=2), **tiny.with_cache(cache))
    model(**padded([150, 130], seed=2), **tiny.with_cache(fresh))
    after = torch.tensor(coded(cache))
    assert (after % 4 > 0).any() and (after != before).any()  # what is left of groups, and groups that came
    now, first = cache.report(), fresh.report()
    assert now.kv_bytes < 1.3 * first.kv_bytes and now.retention == pytest.approx(first.retention, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("allocator", [BY_HEAD["headprefix on top"], BY_HEAD["adakv of prefix"]], ids=["one", "other"])
def test_a_saved_cache_goes_on_as_if_it_had_not_been(allocator: dict[str, Any], tmp_path: Path) -> None:
    """Codes come back bit for bit; rows can be taken, repeated and dropped, drafts taken back."""
    model, prompt = tiny.model("llama"), padded([60, 41], seed=4)
    config = of_heads(allocator, budget=0.6, evictor=NEAR, quantizer=FOUR_BITS)
    cache = CompressedCache(model, config)
    model(**prompt, position_ids=(prompt["attention_mask"].cumsum(1) - 1).clamp(min=0), **tiny.with_cache(cache))
    model(tiny.token_ids(2, 6, 9), **tiny.with_cache(cache))  # a turn, which evicts quantized tokens
    for seed in range(3):
        model(tiny.token_ids(2, 1, seed), **tiny.with_cache(cache))
    cache.save(tmp_path / "saved")
    loaded = CompressedCache.load(model, tmp_path / "saved")
    assert loaded.report() == cache.report()
    for one, wanted in zip(loaded.layers, cache.layers, strict=True):
        for found, buffer in zip(one.store.buffers(), wanted.store.buffers(), strict=True):
            assert torch.equal(found, buffer)
    other = copy.deepcopy(cache)
    for one in (cache, loaded, other):  # a draft that is taken back
        one.activate_past_recording()
        model(tiny.token_ids(2, 3, seed=20), **tiny.with_cache(one))
        one.crop(-3)
    swapped = copy.deepcopy(cache)
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    alone = copy.deepcopy(cache)
    alone.batch_select_indices(torch.tensor([1]))
    assert alone.report().kv_bytes < cache.report().kv_bytes
    for seed in range(5, 14):
        ids = tiny.token_ids(2, 1, seed)
        wanted = model(ids, **tiny.with_cache(cache)).logits
        for one in (loaded, other):
            assert torch.equal(model(ids, **tiny.with_cache(one)).logits, wanted)
        for one, rows in ((swapped, [1, 0, 1]), (alone, [1])):
            found = model(ids[rows], **tiny.with_cache(one)).logits
            torch.testing.assert_close(found, wanted[rows], rtol=0, atol=1e-5)
    lengths = torch.tensor(cache.report().head_lengths)
    assert torch.tensor(swapped.report().head_lengths).equal(lengths[:, [1, 0, 1]])


@pytest.mark.parametrize("wrong", ["slots", "scale_rows", "packed_rows"])
def test_codes_that_do_not_fit_together_are_not_taken_over(wrong: str) -> None:
    """What a file says of where codes are is checked before anything reads them there."""
    layer = CompressedCache(tiny.model("llama"), of_heads(BY_HEAD["adakv"], evictor=NEAR, quantizer=FOUR_BITS)).layers[
        0
    ]
    store, g = layer.store, strategies.generator(0)
    store.append(*(torch.randn(1, 2, 30, 8, generator=g) for _ in range(2)), 0)
    store.pack(np.array([[30, 20]]))
    order = torch.arange(16).expand(1, 2, -1)
    store.take(order[..., :8] + store.packed, np.array([[8, 8]]), order[..., 1:], np.array([[15, 11]]))
    saved = store.saved(8)
    layer.forget(layer.sequence)
    layer.store.restore(saved)
    assert layer.store.packed_rows.tolist() == [[15, 11]]
    keys, values = saved["packed"]
    if wrong == "packed_rows":
        saved["packed_rows"] = saved["packed_rows"] + 8
    else:
        off = {"slots": {"slots": keys.slots + 1}, "scale_rows": {"scale_rows": keys.scale_rows + 99}}[wrong]
        saved["packed"] = (dataclasses.replace(keys, **off), values)
    with pytest.raises(ValueError, match="codes"):
        layer.store.restore(saved)


@pytest.mark.parametrize(("allocator", "decode"), [("headprefix", "fixed_point"), ("adakv", "none")])
def test_a_row_of_a_padded_batch_is_quantized_as_it_is_alone(allocator: str, decode: str) -> None:
    """The same groups of every head at the same steps, so the same logits and the same columns."""
    lengths, steps = [70, 51, 30], (1, 1, 9, 1, 1, 8, *[1] * 11)
    lossless = Lossless(group=4, residual=7)  # which no rounding sends elsewhere
    config = of_heads(BY_HEAD[allocator], budget=0.7, evictor={**NEAR, "decode": decode}, quantizer=lossless)
    batch = CompressedCache(tiny.model("llama"), config)
    found = run(batch, lengths, seed=3, steps=steps)
    for row, length in enumerate(lengths):
        alone = CompressedCache(tiny.model("llama"), config)
        wanted = run(alone, [length], seed=3, steps=steps)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=0, atol=1e-4)
        assert [layer[row] for layer in coded(batch)] == [layer[0] for layer in coded(alone)]
        for layer, own in zip(held(batch), held(alone), strict=True):
            assert [[column - (70 - length) for column in columns] for columns in layer[row]] == own[0]


@torch.no_grad()
def test_heads_are_quantized_together_once_in_a_group_of_steps() -> None:
    """Although every head comes to have a group at a step of its own, other steps do nothing on the host."""
    quantizer = {"name": "quanto4", "group": 8, "residual": 9}
    cache = CompressedCache(
        tiny.model("llama"),
        of_heads(BY_HEAD["adakv"], budget=0.6, evictor={**NEAR, "decode": "none"}, quantizer=quantizer),
    )
    model, at = tiny.model("llama"), []
    model(**padded([70, 51], seed=1), **tiny.with_cache(cache))
    with mock.patch.object(CompressedLayer, "pack", autospec=True, side_effect=CompressedLayer.pack) as pack:
        for step in range(33):
            before = pack.call_count
            model(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(cache))
            at += [step] * (pack.call_count > before)
    assert at == [8, 16, 24, 32]
    assert max(layer.store.capacity for layer in cache.layers) <= 9 + 2 * 8 + 1


@torch.no_grad()
def test_a_decode_step_waits_for_nothing() -> None:
    """Between the steps that quantize, whatever heads hold in codes, and in full precision."""
    config = of_heads(BY_HEAD["headprefix"], budget=0.6, evictor=NEAR, quantizer=FOUR_BITS)
    cache, model = CompressedCache(tiny.model("llama"), config), tiny.model("llama")
    model(**padded([70, 51], seed=1), **tiny.with_cache(cache))
    assert all(max(map(max, layer)) > 0 for layer in coded(cache))
    for step in range(3):
        with Operations() as counted:
            model(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(cache))
        assert counted.syncs == 0


@pytest.mark.parametrize(("name", "beams"), [("quanto4", 1), ("fp8", 3)])
def test_generation_runs_and_bytes_fall(name: str, beams: int) -> None:
    """Greedy and beams run on a cache that holds less than full precision."""
    model, ids = tiny.model("llama"), tiny.token_ids(2, 120, seed=3)
    quantizer = {"name": name, "group": 8, "residual": 8}
    cache = CompressedCache(model, of_heads(BY_HEAD["headprefix"], budget=0.8, evictor=NEAR, quantizer=quantizer))
    settings = GenerationConfig(max_new_tokens=20, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(input_ids=ids, **tiny.with_cache(cache), generation_config=settings)
    report = cache.report()
    assert report.kv_bytes < 0.85 * report.retention * report.full_kv_bytes


@torch.no_grad()
def test_tokens_are_taken_back_out_of_codes() -> None:
    """Each head loses the same tokens as without a quantizer, and goes on as if it had none."""
    evictor = {"name": "topk", "decode": "none"}
    config = of_heads(BY_HEAD["adakv"], budget=Budget(fraction=0.8, recent=50), scorer="key_norm", evictor=evictor)
    lossless = config.model_copy(update={"quantizer": Lossless(group=4, residual=5)})
    model, caches = tiny.model("llama"), [CompressedCache(tiny.model("llama"), one) for one in (config, lossless)]
    for cache in caches:
        model(tiny.token_ids(2, 120, seed=3), **tiny.with_cache(cache))
    before = torch.tensor(coded(caches[1]))
    for cache in caches:
        cache.crop(-40)
    lengths, after = torch.tensor(caches[1].report().head_lengths), torch.tensor(coded(caches[1]))
    assert len(lengths.unique()) > 1 and (after < before).all() and after.equal(lengths)
    for seed, tokens in enumerate([1, 1, 7, 1, 1, 1, 1, 1]):
        wanted, found = (model(tiny.token_ids(2, tokens, seed), **tiny.with_cache(one)).logits for one in caches)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert held(caches[0]) == held(caches[1])


@pytest.mark.parametrize("skewed", [False, True])
def test_a_budget_in_bytes_counts_quantized_bytes(skewed: bool) -> None:
    """Four bits hold more tokens in the same bytes, and the bytes stay within the budget, whatever heads get."""
    model, ids, lengths = tiny.model("llama"), tiny.token_ids(1, 500, seed=3), []
    allocator = BY_HEAD["headprefix"]
    if skewed:
        allocator = {"name": "profile", "retention": [0.5, 0.05] * 3, "heads": 2}
    for quantizer in (None, {"name": "quanto4", "group": 8, "residual": 25}):
        cache = CompressedCache(model, of_heads(allocator, budget="64KiB", quantizer=quantizer))
        with torch.no_grad():
            model(ids, **tiny.with_cache(cache))
            for number in range(20):
                assert cache.report().kv_bytes <= 64 * 1024
                model(tiny.token_ids(1, 1, seed=number), **tiny.with_cache(cache))
        lengths.append(sum(row[0] for row in cache.report().layer_lengths))
    assert lengths[1] > 1.4 * lengths[0]


def test_what_decoding_frees_must_not_be_quantized() -> None:
    """As for layers: a rule that frees single slots beyond the residual is refused, one within it is not."""
    with pytest.raises(ValueError, match=r"quantizer quanto: .*residual of 64.*fixed_point"):
        of_heads(BY_HEAD["adakv"], evictor={"name": "topk", "decode": "oldest"}, quantizer="quanto4")
    assert CompressionConfig.preset("headprefix", quantizer="quanto4").quantizer is not None
