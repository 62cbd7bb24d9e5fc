"""What a turn of `generate` begins with: the whole conversation, padded on the left, in every row a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError, UnsupportedModeError
from tests import tiny
from tests.test_reconstruction import Tokenizer

pytestmark = pytest.mark.quick
SEEN = 21  # of a prompt of 20, two tokens, the last of which was not read
HOW: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}


def first_turn(rows: int = 1, **how: Any) -> tuple[Any, CompressedCache, Tensor]:
    model = tiny.model("llama")
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    inputs = tiny.inputs("llama", 20, seed=1, batch=rows)
    return model, cache, model.generate(**inputs, **tiny.with_cache(cache), **{**HOW, **how})


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 12, SEEN, SEEN + 1, 2 * SEEN])
def test_the_ids_of_a_new_turn_alone_are_refused(tokens: int, masked: bool, how: dict[str, Any]) -> None:
    model, cache, said = first_turn(**how)
    assert cache.get_seq_length() == SEEN
    before, new = cache.report(), tiny.token_ids(1, tokens, seed=2)
    mask = {"attention_mask": torch.ones_like(new)} if masked else {}
    with pytest.raises(CacheStateError, match=r"the whole conversation, or call reset\(\)"):
        model.generate(new, **mask, **tiny.with_cache(cache), **{**HOW, **how})
    assert cache.report() == before
    try:
        model.generate(torch.cat([said, new], 1), **tiny.with_cache(cache), **{**HOW, **how})
    except CacheStateError as error:  # older releases read the conversation from its start
        assert "prefill_chunk_size" in str(error) and "prefill_chunk_size" in how and tiny.CACHE == "past_key_values"
        assert cache.report() == before
        model.generate(torch.cat([said, new], 1), **tiny.with_cache(cache), **HOW)
    assert cache.get_seq_length() == SEEN + 1 + tokens + 1


def test_a_turn_that_failed_before_it_began_leaves_nothing_behind() -> None:
    model, cache, said = first_turn()
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(torch.cat([said, said], 1), no_such_argument=1, **tiny.with_cache(cache), **HOW)
    with torch.no_grad():
        model(tiny.token_ids(1, 4, seed=5), **tiny.with_cache(cache))
    assert cache.get_seq_length() == SEEN + 4


def test_the_ids_of_a_new_turn_with_the_mask_of_all_are_taken() -> None:
    new = tiny.token_ids(1, 5, seed=2)
    answers = []
    for whole in (True, False):
        model, cache, said = first_turn()
        mask = torch.ones(1, SEEN + 6, dtype=torch.long)
        ids = torch.cat([said, new], 1) if whole else torch.cat([said[:, -1:], new], 1)
        output = model.generate(ids, attention_mask=mask, **tiny.with_cache(cache), **HOW)
        answers.append((output[:, -2:].tolist(), cache.report()))
        with pytest.raises(CacheStateError, match="must cover"):
            model.generate(new, attention_mask=torch.ones(1, 6), **tiny.with_cache(cache), **HOW)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_a_turn_after_beams_or_several_answers_goes_on(how: dict[str, Any]) -> None:
    model, cache, said = first_turn(rows=2, **{**how, "num_return_sequences": next(iter(how.values()))})
    said = torch.cat([said, tiny.token_ids(1, 4, seed=3).expand(len(said), -1)], 1)
    model.generate(said, **tiny.with_cache(cache), **HOW)
    assert cache.get_seq_length() == said.shape[1] + 1


def test_other_ids_in_positions_of_padding_are_the_same_conversation() -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, seed=1, batch=2)
    inputs["attention_mask"][0, :6] = 0
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    said = model.generate(**inputs, **tiny.with_cache(cache), **HOW)
    said[0, :6] = 3
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    model.generate(said, attention_mask=mask, **tiny.with_cache(cache), **HOW)
    said[0, 6] += 1
    with pytest.raises(CacheStateError, match="the whole conversation"):
        model.generate(said, attention_mask=mask, **tiny.with_cache(cache), **HOW)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("padding", [4, 8, 19])
def test_a_batch_padded_on_the_left_comes_in_chunks(chunk: int, padding: int) -> None:
    inputs = tiny.inputs("llama", 20, seed=1, batch=2)
    inputs["attention_mask"][1, :padding] = 0
    how = {**HOW, "max_new_tokens": 4, "prefill_chunk_size": chunk}
    model, untouched = tiny.model("llama"), tiny.untouched("llama")
    found = model.generate(**inputs, **tiny.with_cache(CompressedCache(model, "full")), **how)
    assert torch.equal(found, untouched.generate(**inputs, **tiny.with_cache(DynamicCache()), **how))
    squeezed = CompressedCache(model, "prefixkv", budget=0.5)
    model.generate(**inputs, **tiny.with_cache(squeezed), **how)
    assert squeezed.report().row_tokens_seen == [23, 23 - padding]


def read_plainly(cache: CompressedCache, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        tiny.model("llama")(**inputs, **tiny.with_cache(cache))
    return inputs["input_ids"]


def recorded(cache: CompressedCache, inputs: dict[str, Any]) -> Tensor:
    cache.activate_past_recording()
    return read_plainly(cache, inputs)


def repeated(cache: CompressedCache, inputs: dict[str, Any]) -> Tensor:
    cache.score_by_reconstruction(Tokenizer(), inputs)
    return inputs["input_ids"]


def generated(cache: CompressedCache, inputs: dict[str, Any], **how: Any) -> Tensor:
    output: Tensor = tiny.model("llama").generate(**inputs, **tiny.with_cache(cache), **HOW, **how)
    return output


READ: dict[str, Callable[[CompressedCache, dict[str, Any]], Tensor]] = {
    "plainly": read_plainly,
    "recorded": recorded,
    "repeated": repeated,
    "by generate": generated,
    "in chunks": partial(generated, prefill_chunk_size=8),
    "with lookup": partial(generated, prompt_lookup_num_tokens=3),
    "with an assistant": partial(generated, assistant_model=tiny.build("llama", seed=1)),
}


@pytest.mark.parametrize("how", READ)
def test_another_conversation_is_refused_however_the_first_was_read(how: str) -> None:
    preset = "kvzip" if how == "repeated" else "prefixkv"
    cache, inputs = CompressedCache(tiny.model("llama"), preset, budget=0.5), tiny.inputs("llama", 20, seed=1)
    whole = torch.cat([READ[how](cache, inputs), tiny.token_ids(1, 4, seed=5)], 1)
    other = whole.clone()
    other[:, 3] = 3 + whole[:, 3] % 5
    assert not torch.equal(other, whole)
    with pytest.raises(CacheStateError, match="do not begin with them"):
        tiny.model("llama").generate(other, **tiny.with_cache(cache), **HOW)
    assert tiny.model("llama").generate(whole, **tiny.with_cache(cache), **HOW).shape[1] == whole.shape[1] + 2


@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny.build("llama", seed=1)}], ids=["lookup", "other"]
)
def test_assistants_are_refused_by_name_in_later_turns_and_nothing_is_lost(how: dict[str, Any]) -> None:
    """`generate` gives them the whole conversation again, whatever the cache holds."""
    model, cache, said = first_turn()
    before, more = cache.report(), torch.cat([said, tiny.token_ids(1, 5, seed=2)], 1)
    with pytest.raises(CacheStateError, match="leave out assistant_model, prompt_lookup_num_tokens and"):
        model.generate(more, **tiny.with_cache(cache), **HOW, **how)
    assert cache.report() == before
    model, other, _ = first_turn()
    outputs = [model.generate(more, **tiny.with_cache(given), **HOW) for given in (cache, other)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_a_row_of_padding_alone_is_refused_as_such(how: dict[str, Any]) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, seed=1, batch=3)
    inputs["attention_mask"][1] = 0
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    with pytest.raises(UnsupportedModeError, match=r"rows \[1\] are padding alone"):
        model.generate(**inputs, **tiny.with_cache(cache), **HOW, **how)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_a_batch_padded_on_the_right_is_refused_in_chunks_too(how: dict[str, Any]) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, seed=1, batch=2)
    inputs["attention_mask"][1, 15:] = 0
    with pytest.raises(UnsupportedModeError, match="pad on the left"):
        model.generate(**inputs, **tiny.with_cache(CompressedCache(model, "prefixkv")), **HOW, **how)
