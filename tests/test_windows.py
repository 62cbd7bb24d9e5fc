"""Models all of whose layers slide: served as full attention up to where the window ends, and refused beyond."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvcompress import CompressedCache
from kvcompress.errors import UnsupportedModeError
from tests import families, tiny

WINDOW = 40
every_family = pytest.mark.parametrize("name", families.WINDOWED)


def filled(name: str, tokens: int, budget: float = 0.5) -> CompressedCache:
    """A cache that has read so many tokens of two rows."""
    cache = CompressedCache(tiny.model(name), "prefixkv", budget=budget)
    with torch.no_grad():
        tiny.model(name)(tiny.token_ids(2, tokens, seed=1), **tiny.with_cache(cache))
    return cache


@every_family
@torch.no_grad()
def test_a_window_is_full_attention_up_to_its_end(name: str) -> None:
    """To the last token that sees the first one; each gives what the model gives with its own cache."""
    cache = CompressedCache(tiny.model(name), "prefixkv", budget=1.0)
    other = DynamicCache(config=tiny.untouched(name).config)
    assert cache.window == WINDOW and not cache._state.own
    for tokens in (WINDOW - 2, 1, 1):
        ids = tiny.token_ids(2, tokens, seed=tokens)
        found = tiny.model(name)(ids, **tiny.with_cache(cache)).logits
        wanted = tiny.untouched(name)(ids, **tiny.with_cache(other)).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@every_family
@pytest.mark.parametrize(("seen", "new"), [(0, WINDOW + 1), (WINDOW, 1), (WINDOW - 3, 4)])
@torch.no_grad()
def test_a_forward_beyond_the_window_is_refused_and_changes_nothing(name: str, seen: int, new: int) -> None:
    """By the whole model and by its decoder; what is left of the window can still be used."""
    model = tiny.model(name)
    cache = filled(name, seen) if seen else CompressedCache(model, "prefixkv", budget=0.5)
    before = copy.deepcopy(cache)
    for module in (model, model.model):
        with pytest.raises(UnsupportedModeError, match=rf"window of 40 tokens.*{seen} were seen, and {new} come"):
            module(tiny.token_ids(2, new, seed=2), **tiny.with_cache(cache))
    assert cache.get_seq_length() == seen
    if seen:
        assert cache.report() == before.report()
    if seen < WINDOW:
        ids = tiny.token_ids(2, min(3, WINDOW - seen), seed=3)
        found, wanted = (model(ids, **tiny.with_cache(one)).logits for one in (cache, before))
        assert torch.equal(found, wanted)


@every_family
def test_a_turn_that_may_go_beyond_the_window_is_refused_before_it_is_read(name: str) -> None:
    """A shorter one is generated, to the last token that the window has room for."""
    model, inputs = tiny.model(name), tiny.inputs(name, 30, seed=4)
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    with pytest.raises(UnsupportedModeError, match=r"the prompt has 30 and 12 are to come: lower max_new_tokens"):
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=12)
    assert cache.get_seq_length() == 0
    model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=11, do_sample=False)
    assert cache.get_seq_length() == WINDOW


@every_family
@torch.no_grad()
def test_the_advice_in_the_refusal_gives_the_model_full_attention(name: str) -> None:
    """Its code makes a model that is served beyond, and agrees with the one of windows within."""
    model, ids = tiny.model(name), tiny.token_ids(1, WINDOW + 5, seed=5)
    with pytest.raises(UnsupportedModeError) as refusal:
        model(ids, **tiny.with_cache(CompressedCache(model, "full")))
    advice = re.search(r", set (config\..*?)\. DynamicCache goes on", str(refusal.value))
    assert advice is not None
    config: Any = copy.deepcopy(model.config)
    config._attn_implementation = None
    exec(advice[1], {"config": config})
    opened = type(model)(config).eval()
    opened.load_state_dict(model.state_dict())
    cache = CompressedCache(opened, "full")
    assert cache.window is None
    found = opened(ids, **tiny.with_cache(cache)).logits[:, :WINDOW]
    torch.testing.assert_close(found, tiny.untouched(name)(ids).logits[:, :WINDOW], rtol=0, atol=1e-5)


@torch.no_grad()
def test_steps_that_a_user_compiles_are_refused_since_nobody_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mistral, windows"
    cache = filled(name, 6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UnsupportedModeError, match="Where layers slide or sum up, none are compiled"):
        tiny.model(name)(tiny.token_ids(2, 1, seed=6), **tiny.with_cache(cache))
