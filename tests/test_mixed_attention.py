"""Layers that slide or sum up stay transformers' own: every operation on the cache reaches them, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import base, shape
from tests import tiny
from tests.test_reconstruction import Tokenizer

SLIDES, SUMS = "gemma3_text", "lfm2"
every_kind = pytest.mark.parametrize("name", [SLIDES, SUMS])
TOKENS = 20  # more than twice the window


def filled(name: str, budget: float = 1.0, batch: int = 2) -> CompressedCache:
    """A cache that has read a prompt; its first row has padding."""
    cache, inputs = CompressedCache(tiny.model(name), "prefixkv", budget=budget), tiny.inputs(name, TOKENS, 1, batch)
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        tiny.model(name)(**inputs, **tiny.with_cache(cache))
    return cache


def goes_on(cache: CompressedCache, name: str, rows: list[int] | None = None, tokens: int = TOKENS) -> Tensor:
    """Logits of three tokens more."""
    mask = torch.ones(2, tokens + 3, dtype=torch.int64)
    mask[0, :3] = 0
    mask = mask if rows is None else mask[rows]
    ids = tiny.token_ids(2, 3, seed=9)
    with torch.no_grad():
        ids = ids if rows is None else ids[rows]
        found: Tensor = tiny.model(name)(ids, attention_mask=mask, **tiny.with_cache(cache)).logits
    return found


@every_kind
def test_only_layers_that_attend_to_everything_are_compressed_and_reported(name: str) -> None:
    """The budget is a share of their tokens; what the others hold is in the bytes, and a note says so."""
    cache = filled(name, budget=0.5)
    report = cache.report()
    assert report.layers == [1] and len(report.layer_lengths) == len(report.held_positions) == 1
    assert report.layer_lengths[0][1] == TOKENS // 2 and report.retention <= 0.5
    own = [cache.layers[number] for number in (0, 2)]
    known = DynamicCache(config=tiny.model(name).config).layers
    assert [type(layer) for layer in own] == [type(known[0]), type(known[2])]
    assert report.own_kv_bytes > 0 and report.kv_bytes == report.own_kv_bytes + cache.layers[1].store.nbytes
    assert report.full_kv_bytes == report.own_kv_bytes + 2 * TOKENS * cache.layers[1].store.slot_nbytes
    assert any("layers 0, 2 keep transformers' own cache" in note for note in report.notes)


@every_kind
def test_rows_are_reordered_in_every_layer(name: str) -> None:
    for operation, rows in (("reorder_cache", [1, 0]), ("batch_select_indices", [1])):
        cache, whole = filled(name), filled(name)
        getattr(cache, operation)(torch.tensor(rows))
        torch.testing.assert_close(goes_on(cache, name, rows), goes_on(whole, name)[rows], rtol=0, atol=1e-5)
    cache = filled(name)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    twice = goes_on(cache, name, [0, 0, 1, 1])
    torch.testing.assert_close(twice, goes_on(filled(name), name)[[0, 0, 1, 1]], rtol=0, atol=1e-5)


@every_kind
def test_a_reset_forgets_every_layer(name: str) -> None:
    cache = filled(name, budget=0.5)
    goes_on(cache, name)
    cache.reset()
    assert cache.report().kv_bytes == 0 and cache.get_seq_length() == 0
    fresh = CompressedCache(tiny.model(name), "prefixkv", budget=0.5)
    inputs = tiny.inputs(name, 12, seed=5)
    with torch.no_grad():
        found, wanted = (tiny.model(name)(**inputs, **tiny.with_cache(one)).logits for one in (cache, fresh))
    assert torch.equal(found, wanted)


@every_kind
def test_a_saved_cache_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    cache = filled(name, budget=0.5)
    goes_on(cache, name)
    cache.save(tmp_path / "saved")
    again = CompressedCache.load(tiny.model(name), tmp_path / "saved")
    assert again.report() == cache.report()
    assert torch.equal(goes_on(again, name, tokens=TOKENS + 3), goes_on(cache, name, tokens=TOKENS + 3))


@every_kind
def test_a_copy_goes_on_by_itself(name: str) -> None:
    cache = filled(name, budget=0.5)
    copied = copy.deepcopy(cache)
    first = goes_on(cache, name)
    assert torch.equal(goes_on(copied, name), first)


@every_kind
def test_a_forward_that_fails_anywhere_leaves_a_broken_cache(name: str) -> None:
    """Also in a layer that is not compressed, before or after those that are; a reset mends it."""
    model = tiny.build(name)
    for number in range(3):
        cache = CompressedCache(model, "prefixkv", budget=0.5)
        ids = tiny.token_ids(1, TOKENS, seed=1)
        with torch.no_grad():
            model(ids, **tiny.with_cache(cache))
            hook = model.model.layers[number].register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, :1], **tiny.with_cache(cache))
            hook.remove()
            for use in (lambda: model(ids[:, :1], **tiny.with_cache(cache)), lambda: cache.crop(-1)):  # noqa: B023
                with pytest.raises(CacheStateError, match="failed half-way"):
                    use()
            cache.reset()
            model(ids, **tiny.with_cache(cache))


def fail(*args: Any) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def test_windows_go_back_as_far_as_they_recorded() -> None:
    """Tokens are taken back in every layer, or in none with the reason."""
    cache, name = filled(SLIDES), SLIDES
    with pytest.raises(CacheStateError, match="the window of layer 0 has moved on"):
        cache.crop(-2)
    assert not cache.is_croppable
    cache.activate_past_recording()
    mask = torch.ones(2, TOKENS + 4, dtype=torch.int64)
    mask[0, :3] = 0
    tiny.model(name)(tiny.token_ids(2, 4, seed=8), attention_mask=mask, **tiny.with_cache(cache))
    assert cache.is_croppable
    cache.crop(-4)
    assert cache.get_seq_length() == TOKENS and cache.layers[0].keys.shape[2] == 8
    torch.testing.assert_close(goes_on(cache, name), goes_on(filled(name), name), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_recording_that_nobody_ends_ends_by_itself() -> None:
    """Windows keep no more than they need once a forward follows without a crop."""
    cache = filled(SLIDES, budget=0.5)
    cache.activate_past_recording()
    goes_on(cache, SLIDES)
    goes_on(cache, SLIDES, tokens=TOKENS + 3)
    assert cache.layers[0].keys.shape[2] == 8 and not cache.layers[0].record_past


def test_a_state_that_sums_up_goes_back_nowhere() -> None:
    cache = filled(SUMS)
    for _ in range(2):
        assert not cache.is_croppable
        with pytest.raises(CacheStateError, match="layer 0 keeps a state of all that was seen"):
            cache.crop(-1)
        cache.activate_past_recording()


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"prefill_chunk_size": 6}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("name", [SLIDES, "gpt_oss"])
def test_every_way_to_generate_gives_the_same_tokens(name: str, how: dict[str, Any]) -> None:
    """Beams, a prompt in chunks and drafts that are taken back, at full budget."""
    inputs = {key: value.repeat(1, 2) for key, value in tiny.inputs(name, TOKENS, seed=4).items()}
    found = []
    for model, cache in (
        (tiny.model(name), CompressedCache(tiny.model(name), "prefixkv", budget=1.0)),
        (tiny.untouched(name), DynamicCache(config=tiny.untouched(name).config)),
    ):
        settings = {**tiny.with_cache(cache), "max_new_tokens": 6, "do_sample": False, **how}
        found.append(model.generate(**inputs, **settings).tolist())
    assert found[0] == found[1]


def test_kvzip_reads_a_prompt_past_windows() -> None:
    """The repetition is taken back in every layer; where it cannot be, it is refused before the prompt is read."""
    inputs, tokenizer = tiny.inputs(SLIDES, TOKENS, seed=4), Tokenizer()
    cache = CompressedCache(tiny.model(SLIDES), "uniform", scorer="kvzip", budget=0.5)
    cache.score_by_reconstruction(tokenizer, inputs, chunk=7)
    assert cache.get_seq_length() == TOKENS and cache.layers[0].keys.shape[2] == 8
    assert cache.report().layer_lengths == [[TOKENS // 2]] and not cache.layers[0].record_past
    other = CompressedCache(tiny.model(SUMS), "uniform", scorer="kvzip", budget=0.5)
    with pytest.raises(UnsupportedModeError, match="keep a state of all that was seen"):
        other.score_by_reconstruction(tokenizer, inputs)


@every_kind
def test_a_reducer_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"reducer: layers 0, 2 of .* slide or sum up"):
        CompressedCache(tiny.model(name), "prefixkv", reducer="lightkv")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_count_in_scores(name: str) -> None:
    """Attention mass is of the probabilities that the model's own eager attention gives, sinks taken off."""
    model, plain, ids = tiny.model(name), tiny.build(name), tiny.token_ids(1, TOKENS, seed=6)
    cache = CompressedCache(model, "uniform", budget=1.0, scorer="attention")
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids, **tiny.with_cache(cache))
        wanted = plain(ids, output_attentions=True).attentions[1].sum(2).unflatten(1, (2, -1)).mean(2)
    torch.testing.assert_close(cache.layers[1].scores, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_count_where_tokens_are_quantized(name: str) -> None:
    """Prompt and decode steps stay as near to full precision as 8 bits allow, past several groups of tokens."""
    model, logits = tiny.model(name), []
    for quantizer in (None, {"name": "quanto", "bits": 8, "group": 4, "residual": 4}):
        cache = CompressedCache(model, "kivi4", quantizer=quantizer)
        steps = goes_on_from(cache, name)
        assert (cache.layers[1].store.packed > 0) == (quantizer is not None)
        logits.append(steps)
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


@torch.no_grad()
def goes_on_from(cache: CompressedCache, name: str) -> Tensor:
    """Logits of a prompt's end and of eight decode steps."""
    model, found = tiny.model(name), []
    for ids in (tiny.token_ids(1, TOKENS, seed=6), *tiny.token_ids(1, 8, seed=7).split(1, 1)):
        found.append(model(ids, **tiny.with_cache(cache)).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_model_with_caps_or_sinks_is_as_it_was_with_another_cache(name: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name, TOKENS, seed=5)
    CompressedCache(model, "prefixkv", budget=0.5)
    with torch.no_grad():
        found, wanted = (one(**inputs, use_cache=True).logits for one in (model, tiny.untouched(name)))
    assert torch.equal(found, wanted)


@every_kind
@torch.no_grad()
def test_layers_that_attend_to_everything_are_cut_in_periods(name: str) -> None:
    """And no others: what a layer before them holds is what it would hold without."""
    evictor = {"name": "every", "period": 4}
    budget = {"tokens": 10, "sink": 1, "recent": 2}
    cache = CompressedCache(tiny.model(name), "prefixkv", budget=budget, scorer="attention", evictor=evictor)
    whole, lengths = DynamicCache(config=tiny.model(name).config), []
    for past in (cache, whole):
        tiny.model(name)(**tiny.inputs(name, TOKENS, 1, 2), **tiny.with_cache(past))
        for step in range(9):
            tiny.model(name)(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(past))
            lengths += [cache.report().layer_lengths[0][0]] if past is cache else []
    assert lengths == [11, 12, 13, 10, 11, 12, 13, 10, 11]
    for mine, known in zip(_kept(cache.layers[0]), _kept(whole.layers[0]), strict=True):
        torch.testing.assert_close(mine, known, rtol=0, atol=1e-6)


def _kept(layer: Any) -> list[Tensor]:
    """What a layer of transformers remembers of what it has seen."""
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


# -- what is found out of a model once ---------------------------------------------------------------------------------


@every_kind
def test_a_cache_asks_nothing_that_earlier_ones_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers remember is asked of transformers once a model; empty layers of its own, once a cache."""
    model, made, asked = tiny.build(name), shape.own_layers, []
    for _ in range(2):  # the first makes the attention in the configuration another one
        CompressedCache(model, "prefixkv", budget=0.5)
    for module in (shape, base):
        monkeypatch.setattr(module, "own_layers", lambda decoder: asked.append(decoder) or made(decoder))
    CompressedCache(model, "prefixkv", budget=0.5)
    assert len(asked) == 1


def test_a_configuration_that_changes_in_place_is_asked_anew() -> None:
    """Of a model whose first layer slides no longer, the next cache compresses that too; and where all slide, none."""
    model = tiny.build(SLIDES)
    assert CompressedCache(model, "prefixkv", budget=0.5)._state.numbers == [1]
    kinds = model.config.layer_types
    kinds[0] = "full_attention"
    assert CompressedCache(model, "prefixkv", budget=0.5)._state.numbers == [0, 1]
    kinds[:] = ["sliding_attention"] * len(kinds)
    assert CompressedCache(model, "prefixkv", budget=0.5).window == model.config.sliding_window
