"""A row gets what it would get alone: whatever rows are dropped, stay silent, or lie beside it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress
from kvcompress import CompressedCache, CompressionConfig, compressing
from kvcompress.config.presets import PRESETS
from kvcompress.errors import CacheStateError, UnsupportedModeError
from tests import tiny

LONG, SHORT = 150, 90  # more than a quantizer's residual
FIELDS: dict[str, dict[str, Any]] = {
    name: {} if CompressionConfig.preset(name).evictor is None else {"budget": 0.9}
    for name in PRESETS
    if name != "auto" and CompressionConfig.preset(name).reducer is None
}


def tokens(count: int, seed: int, batch: int = 1) -> Tensor:
    ids: Tensor = tiny.inputs("llama", count, seed=seed, batch=batch)["input_ids"]
    return ids


def turn(cache: CompressedCache, mask: Tensor, ids: Tensor, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of each row's last token after one forward, and the mask of everything so far."""
    mask = torch.cat([mask, torch.ones_like(ids) if new is None else new], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        output = tiny.model("llama")(ids, attention_mask=mask, position_ids=places, **tiny.with_cache(cache))
    return output.logits[:, -1], mask


def two_rows(cache: CompressedCache) -> tuple[Tensor, Tensor]:
    """Lets a cache read two rows, of which the first is the short one."""
    ids, mask = tokens(LONG, 0, batch=2), torch.ones(2, LONG, dtype=torch.long)
    mask[0, : LONG - SHORT] = 0
    turn(cache, ids[:, :0], ids, mask)
    return ids, mask


@pytest.mark.parametrize("preset", FIELDS)
@pytest.mark.parametrize("index", [[0], [0, 0]], ids=["dropped", "replaced"])
def test_a_row_goes_on_without_the_longest_as_alone(preset: str, index: list[int], tmp_path: Path) -> None:
    """Also from a folder."""
    made = [CompressedCache(tiny.model("llama"), preset, **FIELDS[preset]) for _ in range(2)]
    ids, mask = two_rows(made[0])
    turn(made[1], ids[:1, :0], ids[:1, -SHORT:])
    made[0].batch_select_indices(torch.tensor(index))
    made[0].save(tmp_path / "rows")
    said, own = tokens(3, 5), torch.ones(1, SHORT, dtype=torch.long)
    expected, _ = turn(made[1], own, said)
    for cache in (CompressedCache.load(tiny.model("llama"), tmp_path / "rows"), made[0]):
        found, _ = turn(cache, mask[index], said.expand(len(index), -1))
        torch.testing.assert_close(found, expected.expand_as(found), atol=2e-5, rtol=1e-4)
        assert [row[0] for row in cache.report().layer_lengths] == [row[0] for row in made[1].report().layer_lengths]


@pytest.mark.parametrize("decoded", [0, 3])
@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("tova", {"budget": 20}),
        ("snapkv", {"budget": 40, "evictor": {"name": "topk", "decode": "lowest_score"}}),
        ("uniform", {"budget": 20, "evictor": {"name": "topk", "decode": "lowest_score"}}),
        ("uniform", {"budget": 20, "scorer": "kvzip", "evictor": {"name": "topk", "decode": "lowest_score"}}),
    ],
)
def test_a_row_that_says_nothing_keeps_its_scores(preset: str, fields: dict[str, Any], decoded: int) -> None:
    both, alone = (CompressedCache(tiny.model("llama"), preset, **fields) for _ in range(2))
    ids = tokens(60, 0, batch=2)
    mask, own = turn(both, ids[:, :0], ids)[1], turn(alone, ids[:1, :0], ids[:1])[1]
    for number in range(decoded):
        said = tokens(1, 20 + number, batch=2)
        mask, own = turn(both, mask, said)[1], turn(alone, own, said[:1])[1]
    _, mask = turn(both, mask, tokens(6, 7, batch=2), torch.tensor([[0] * 6, [1] * 6]))
    for number in range(8):
        said = tokens(1, 40 + number, batch=2)
        (found, mask), (expected, own) = turn(both, mask, said), turn(alone, own, said[:1])
        torch.testing.assert_close(found[:1], expected, atol=2e-5, rtol=1e-4)


def test_layer_sizes_of_a_row_do_not_depend_on_heads_of_others() -> None:
    """One whose heads hold the same tokens is ranked by their mean, whatever heads of other rows hold."""
    fields = {"budget": 110, "evictor": {"name": "topk", "granularity": "head", "decode": "oldest"}}
    both, alone = (CompressedCache(tiny.model("llama"), "prefixkv", **fields) for _ in range(2))
    ids, mask = two_rows(both)
    turn(alone, ids[:1, :0], ids[:1, -SHORT:])
    said = tokens(40, 5, batch=2)
    turn(both, mask, said)
    turn(alone, torch.ones(1, SHORT, dtype=torch.long), said[:1])
    assert [row[0] for row in both.report().layer_lengths] == [row[0] for row in alone.report().layer_lengths]


# -- recording the past ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["tova", "defensive", "snapkv"])
def test_a_prompt_that_was_recorded_is_scored_as_any_other(scorer: str) -> None:
    evictor = {"name": "topk", "granularity": "head", "decode": "oldest"}
    plain, recorded = (
        CompressedCache(tiny.model("llama"), "tova", budget=34, scorer=scorer, evictor=evictor) for _ in range(2)
    )
    recorded.activate_past_recording()
    for cache in (plain, recorded):
        turn(cache, tokens(0, 0), tokens(60, 0))
    recorded.crop(0)
    assert recorded.report().held_positions == plain.report().held_positions


def test_generating_with_an_assistant_leaves_no_recording_behind(tmp_path: Path) -> None:
    model, cache, ids = tiny.model("llama"), CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5), tokens(60, 0)
    how: dict[str, Any] = {"do_sample": False, **tiny.with_cache(cache)}
    output = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=3, **how)
    assert not cache.is_recording_past(0)
    model.generate(torch.cat([output, tokens(40, 1)], 1), max_new_tokens=1, **how)
    assert cache.report().retention <= 0.5
    cache.save(tmp_path / "saved")


def test_what_stops_an_assisted_turn_is_what_is_raised() -> None:
    """Though the cache is broken by then, and its recording cannot be ended."""
    model = tiny.build("gemma3_text")
    cache, layer = CompressedCache(model, "full"), model.model.layers[0]

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    handle = layer.mlp.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        model.generate(tokens(60, 0), max_new_tokens=4, prompt_lookup_num_tokens=3, **tiny.with_cache(cache))
    handle.remove()
    cache.reset()
    model.generate(tokens(60, 0), max_new_tokens=4, **tiny.with_cache(cache))


def test_a_recording_that_was_asked_for_goes_on_after_generating() -> None:
    model, cache = tiny.model("llama"), CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    cache.activate_past_recording()
    model.generate(tokens(60, 0), max_new_tokens=1, do_sample=False, **tiny.with_cache(cache))
    assert cache.is_recording_past(0)


def test_bytes_are_shared_anew_while_the_past_is_recorded() -> None:
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget="8KiB")
    cache.activate_past_recording()
    _, mask = turn(cache, tokens(0, 0), tokens(120, 0))
    cache.crop(0)
    cache.batch_repeat_interleave(4)
    assert cache.report().kv_bytes <= 8 * 1024 and cache.is_recording_past(0)
    turn(cache, mask.expand(4, -1), tokens(1, 3, batch=4))
    cache.crop(-1)  # which is what a recording is for
    assert cache.report().tokens_seen == 120


# -- of whom it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["auto", "prefixkv", "full"])
def test_a_cache_of_another_model_is_refused_by_generate(preset: str) -> None:
    """Before a policy looks at the prompt, and with the other model as it was."""
    CompressedCache(tiny.model("llama"), "full")  # whose `generate` looks at caches from here on
    cache = CompressedCache(tiny.model("llava"), preset)
    with pytest.raises(CacheStateError, match="made for another model than this LlamaForCausalLM"):
        tiny.model("llama").generate(tokens(200, 0), max_new_tokens=2, **tiny.with_cache(cache))
    assert cache.report().tokens_seen == 0


def test_attention_that_was_switched_is_named_before_the_mask_is_read() -> None:
    model = tiny.build("llama")
    cache = CompressedCache(model, budget=0.3)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModeError, match="its attention was switched to 'eager'"):
        model.generate(tokens(200, 0), max_new_tokens=2, **tiny.with_cache(cache))


def test_a_block_that_is_left_in_another_thread_is_left() -> None:
    model = tiny.build("llama")
    block = compressing(model, "streaming", budget=0.2)
    opening = threading.Thread(target=block.__enter__)
    opening.start()
    opening.join()
    block.__exit__(None, None, None)
    output = model.generate(tokens(40, 0), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert not isinstance(output.past_key_values, CompressedCache)
    kvcompress.restore(model)
