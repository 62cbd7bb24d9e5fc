"""Decoding in periods: after so many tokens every layer is scored by the last queries and cut to its budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import Budget, CompressedCache, CompressionConfig
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError
from kvcompress.testing.running import forwards, require_masked
from tests import tiny
from tests.operations import Operations
from tests.reference import Reference, held, recorded

LAYERS, KV_HEADS, GROUP = 3, 2, 2


def config(scorer: Any = "attention", allocator: Any = "uniform", budget: Any = 10, **fields: Any) -> CompressionConfig:
    """A cut after 5 tokens, to 10."""
    budget = Budget.parse(budget, default=None).model_copy(update={"sink": 1, "recent": 2})
    evictor = {"name": "every", "period": 5, **fields.pop("evictor", {})}
    return CompressionConfig(budget=budget, scorer=scorer, allocator=allocator, evictor=evictor, **fields)


def window(name: str, queries: int = 3, **fields: Any) -> dict[str, Any]:
    return {"name": name, "window": queries, **fields}


def padded(tokens: int = 20, seed: int = 1) -> dict[str, Any]:
    """Two rows, the second with padding before it."""
    inputs = tiny.inputs("llama", tokens, seed, 2)
    inputs["attention_mask"][1, :6] = 0
    return inputs


@torch.no_grad()
def stepped(cache: CompressedCache, mask: Tensor, seed: int, columns: int = 1) -> Tensor:
    """One forward of random tokens; returns the mask for the next."""
    mask = torch.cat([mask, mask.new_ones(len(mask), columns)], 1)
    positions = (mask.cumsum(1) - 1)[:, -columns:]
    ids = tiny.token_ids(len(mask), columns, seed)
    tiny.model("llama")(ids, attention_mask=mask, position_ids=positions, **tiny.with_cache(cache))
    return mask


@torch.no_grad()
def read(cache: CompressedCache, inputs: dict[str, Any]) -> Tensor:
    """Reads a prompt; returns its mask."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tiny.model("llama")(**{**inputs, "position_ids": positions}, **tiny.with_cache(cache))
    return mask


# -- the rule, by plain loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("last", [2, None])
def test_a_cut_keeps_what_the_last_queries_look_at(last: int | None, by_head: bool) -> None:
    """Summed attention of the last queries, or of all so far where scores add up, as these queries gave it when they
    ran; the first and the last tokens among those that stay. In between nothing leaves.
    """
    scorer = "attention" if last is None else {"name": "attention", "queries": f"window:{last}"}
    evictor = {"granularity": "head" if by_head else "layer", "window": last}
    cache, inputs, seed = CompressedCache(tiny.model("llama"), config(scorer, evictor=evictor)), padded(), 40
    steps = forwards(tiny.model("llama"), cache, inputs, [1] * 13, seed)
    reference, given = Reference("llama"), []  # attention that every column got, [forward][layer][batch, kv_heads, ..]
    valid = inputs["attention_mask"].bool()
    for number, step in enumerate(steps):
        reference.run(step.inputs, step.held)
        given.append(reference.attention_mass(None if last is None else last if number == 0 else 1))
        if number in (6, 11):  # the forward before was the fifth after the prompt, or after the first cut
            before, after = steps[number - 1].held, step.held
            for layer in range(LAYERS):
                for row in range(2):
                    for head in range(KV_HEADS):
                        whole, kept = (set(h[layer][row][head if by_head else 0]) for h in (before, after))
                        whole.add(19 + number - 1)
                        first = 0 if last is None else number - last
                        score = {}
                        for column in whole:
                            heads = [head] if by_head else range(KV_HEADS)
                            score[column] = sum(
                                float(mass[layer][row, one, column])
                                for mass in given[first:number]
                                for one in heads
                                if column < mass[layer].shape[2]
                            )
                        start, end = int(valid[row].long().argmax()), 20 + number - 2
                        protected = {start, end - 1, end} & whole
                        rest = sorted(whole - protected, key=lambda c: -score[c])
                        assert kept == protected | set(rest[: 10 - len(protected)]), (number, layer, row, head)
        elif number > 1:
            for layer, sets in enumerate(steps[number - 1].held):
                assert all(
                    set(old) < set(new)
                    for a, b in zip(sets, step.held[layer], strict=True)
                    for old, new in zip(a, b, strict=True)
                )


SCORERS: list[Any] = [
    window("snapkv", kernel=3),
    window("rkv", share=0.5),
    "tova",
    "value_aware",
    window("defensive"),
    "expected_attention",
    "leverage",
    "key_norm",
]
ALLOCATORS = ["prefix", "pyramid", "adakv", "headprefix"]


@pytest.mark.parametrize(
    ("scorer", "allocator", "granularity", "budget"),
    [(scorer, "uniform", "head", 9) for scorer in SCORERS]
    + [("tova", allocator, "layer", 0.4) for allocator in ALLOCATORS]
    + [(window("snapkv", kernel=3), "adakv", "head", 9), ("attention", "prefix", "head", 0.4)],
    ids=str,
)
def test_what_is_cut_was_hidden(scorer: Any, allocator: str, granularity: str, budget: Any) -> None:
    """Every forward of padded rows, with turns among them, attends to what the layers and heads report, no more."""
    model = tiny.model("llama")
    cache = CompressedCache(model, config(scorer, allocator, budget, evictor={"granularity": granularity}))
    steps = forwards(model, cache, padded(), [1] * 6 + [3] + [1] * 6, 3)
    require_masked(Reference("llama"), cache, steps)


# -- how far layers grow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [0, 500])
@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_layers_grow_by_a_period_and_no_more(allocator: str, reserve: int) -> None:
    """They hold the budget after a cut and a token more after each step, till the period is over; buffers likewise,
    however many tokens are to come; and the report says so.
    """
    cache = CompressedCache(tiny.model("llama"), config(allocator=allocator), reserve=reserve)
    mask = read(cache, tiny.inputs("llama", 30, 2))
    slot = cache.report().full_kv_bytes // 30
    for step in range(1, 17):
        mask = stepped(cache, mask, step)
        report = cache.report()
        assert sum(map(sum, report.layer_lengths)) == (10 + step % 5) * LAYERS
        assert report.kv_bytes <= 15 * slot + (LAYERS * KV_HEADS * slot if allocator == "adakv" else 0)
    assert sum(map(sum, report.layer_budgets or [])) == 15 * LAYERS
    assert "every: layers grow by up to 5 generated tokens" in report.notes[0]
    remembered = LAYERS * KV_HEADS * GROUP * 5 * 8 * 4
    assert f"{remembered / 1024:.1f} KiB" in report.notes[0] and report.index_bytes > remembered


def test_a_share_of_what_was_seen_grows() -> None:
    """A budget that is a fraction is one of the tokens seen by the time of the cut."""
    cache = CompressedCache(tiny.model("llama"), config(budget=0.5))
    mask = read(cache, tiny.inputs("llama", 20, 2))
    for step in range(11):
        mask = stepped(cache, mask, step)
    assert cache.report().layer_lengths == [[15 + 1]] * LAYERS  # the last cut came after 30 tokens


# -- changes between two cuts ------------------------------------------------------------------------------------------


def goes_on(cache: CompressedCache, mask: Tensor, steps: int = 4) -> list[Any]:
    """What is held after each of some more steps."""
    found = []
    for step in range(steps):
        mask = stepped(cache, mask, 70 + step)
        found.append(held(cache))
    return found


@pytest.mark.parametrize(("scorer", "steps"), [("attention", 3), ("value_aware", 7)])
def test_a_saved_cache_goes_on_in_its_period(scorer: Any, steps: int, tmp_path: Path) -> None:
    """It is cut by the queries from before it was saved, and so is a copy."""
    model = tiny.model("llama")
    cache = CompressedCache(model, config(scorer))
    mask = read(cache, padded())
    for step in range(steps):
        mask = stepped(cache, mask, step)
    cache.save(tmp_path / "saved")
    loaded = CompressedCache.load(model, tmp_path / "saved")
    twin = copy.deepcopy(cache)
    expected = goes_on(cache, mask)
    assert goes_on(loaded, mask) == expected
    assert goes_on(twin, mask) == expected


@pytest.mark.parametrize("scorer", ["attention", window("rkv")], ids=str)
def test_rows_take_their_queries_with_them(scorer: Any) -> None:
    """Rows that were reordered, repeated or chosen within a period are cut as they would have been alone."""
    cache = CompressedCache(tiny.model("llama"), config(scorer))
    mask = read(cache, padded())
    for step in range(3):
        mask = stepped(cache, mask, step)
    alone = copy.deepcopy(cache)
    alone.batch_select_indices(torch.tensor([1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    mask = mask[[1, 1, 0, 0]]
    for step in range(4):
        mask = stepped(cache, mask, 50 + step)
        ids = tiny.token_ids(4, 1, 50 + step)[:1]
        own = mask[:1]
        with torch.no_grad():
            tiny.model("llama")(
                ids, attention_mask=own, position_ids=own.sum(1, keepdim=True) - 1, **tiny.with_cache(alone)
            )
        assert [layer[0] for layer in held(cache)] == [layer[0] for layer in held(alone)]


def test_tokens_taken_back_leave_no_trace() -> None:
    """After a crop within a period the cut is what it is without the detour; across a cut it is refused."""
    cache = CompressedCache(tiny.model("llama"), config(window("snapkv")))
    mask = read(cache, padded())
    for step in range(2):
        mask = stepped(cache, mask, step)
    twin = copy.deepcopy(cache)
    further = stepped(twin, stepped(twin, mask, 8), 9)
    twin.crop(-2)
    assert goes_on(twin, mask) == goes_on(cache, mask)
    assert further.shape[1] == mask.shape[1] + 2
    with pytest.raises(CacheStateError, match="crop"):
        cache.crop(-6)


def test_a_cut_waits_for_crop_while_the_past_is_recorded() -> None:
    """It comes with the crop after the step that fills the period, and is the one that would have come."""
    model = tiny.model("llama")
    recording, plain = (CompressedCache(model, config("tova")) for _ in range(2))
    inputs = padded()
    masks = [read(cache, inputs) for cache in (recording, plain)]
    recording.activate_past_recording()
    for step in range(5):
        masks = [stepped(cache, mask, step) for cache, mask in zip((recording, plain), masks, strict=True)]
        lengths = recording.report().layer_lengths
        assert lengths == [[11 + step] * 2] * LAYERS
        recording.crop(0)
    assert recording.report().layer_lengths == [[10] * 2] * LAYERS
    assert held(recording) == held(plain)


def test_beams_and_drafts_run() -> None:
    """Beam search and prompt lookup give as many tokens as asked for, with cuts among them."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, 3)
    for settings in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        cache = CompressedCache(model, config(window("snapkv")))
        with recorded(model, cache):
            out = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=17, min_new_tokens=17, **settings)
        assert out.shape[1] == 37
        assert max(max(rows) for rows in cache.report().layer_lengths) <= 15


# -- steps that nobody disturbs ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_between_cuts_ask_the_device_nothing() -> None:
    """Neither for an answer nor for more than two operations a layer and a few for all of them."""
    model, inputs = tiny.model("llama"), padded(40)
    counts = []
    for cache in (CompressedCache(model, config(window("snapkv")), reserve=20), DynamicCache(config=model.config)):
        mask, own = inputs["attention_mask"], []
        model(**inputs, **tiny.with_cache(cache))
        for step in range(9):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            with Operations() as counted:
                model(
                    tiny.token_ids(2, 1, step),
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    **tiny.with_cache(cache),
                )
            own.append(counted)
        counts.append(own)
    quiet = [one for number, one in enumerate(counts[0], 1) if number % 5]
    assert [one.syncs for one in quiet] == [0] * len(quiet)
    assert min(one.number for one in quiet) <= counts[1][-1].number + 3 * LAYERS + 15


@pytest.mark.parametrize("quantizer", [{"name": "quanto", "bits": 4}, {"name": "rotated", "bits": 4}], ids=str)
def test_quantized_layers_are_cut_too(quantizer: dict[str, Any]) -> None:
    """Codes of what stays are kept, in padded rows too, and layers stay within budget and period."""
    model = tiny.model("llama")
    small = {**quantizer, "group": 4, "residual": 4}
    cache = CompressedCache(model, config(window("snapkv"), budget=16, quantizer=small))
    mask = read(cache, padded(30))
    for step in range(17):
        mask = stepped(cache, mask, step)
        lengths = cache.report().layer_lengths
        assert lengths == [[16 + (step + 1) % 5] * 2] * LAYERS
    assert all(layer.store.packed for layer in cache._state.layers)


def test_quantized_heads_of_different_sizes_are_cut_too() -> None:
    """The layers of a row hold its budget once a period is over, whatever each head keeps as codes."""
    model = tiny.model("llama")
    small = {"name": "quanto", "bits": 4, "group": 4, "residual": 4}
    by_head = config(window("snapkv"), budget=16, quantizer=small, allocator="headprefix")
    cache = CompressedCache(model, by_head)
    mask = read(cache, padded(30))
    for step in range(18):
        mask = stepped(cache, mask, step)
        heads = torch.tensor(cache.report().head_lengths)  # layers, rows, heads
        assert (heads.sum((0, 2)) == (16 + (step + 1) % 5) * heads.shape[0] * heads.shape[2]).all()
    assert any(layer.store.packed for layer in cache._state.layers)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_window_longer_than_its_period_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"window must be at most period \(4 tokens\); got 5"):
        config(evictor={"period": 4, "window": 5})


@pytest.mark.parametrize("evictor", [{"period": 8}, {"period": 64, "window": 16}], ids=str)
def test_fewer_queries_than_a_scorer_looks_at_are_refused(evictor: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="scorer snapkv looks at its last 32 queries; raise the evictor's period"):
        config("snapkv", evictor=evictor)


def test_no_scorer_is_refused() -> None:
    with pytest.raises(ConfigError, match="evictor every: reads importance, but scorer is none"):
        config(None)


def test_steps_compiled_by_hand_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are traced: nothing would ever cut them."""
    model = tiny.model("llama")
    cache = CompressedCache(model, config(), reserve=20)
    read(cache, tiny.inputs("llama", 20, 3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad(), pytest.raises(UnsupportedModeError, match="between decode steps, which only `generate`"):
        model(tiny.token_ids(1, 1, 4), **tiny.with_cache(cache))
