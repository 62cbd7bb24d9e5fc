"""Programs under benchmarks/: kvpress side by side, and long answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from benchmarks import long_answers, peer, peer_kvpress
from kvcompress import CompressedCache
from kvcompress.evaluation import LoadedModel
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.perplexity import continuation_losses, continuation_perplexity
from tests import checkpoints, tiny

CONTEXT, QUESTION = tiny.token_ids(1, 90, seed=1)[0].tolist(), tiny.token_ids(1, 9, seed=2)[0].tolist()


def loaded(name: str = "llama") -> LoadedModel:
    return LoadedModel(name, tiny.model(name), checkpoints.text_tokenizer())


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # kvpress asks for a release that knows no other
def test_both_sides_are_the_same_program_where_nothing_is_compressed() -> None:
    asked = {"context": CONTEXT, "question": QUESTION, "new_tokens": 8}
    ours = peer.own_answers(loaded(), CONTEXT, QUESTION, None, 8)
    assert ours == peer_kvpress.answer(tiny.untouched("llama"), None, asked) and len(ours) == 8


@pytest.mark.parametrize("method", peer.METHODS)
def test_a_method_keeps_as_many_tokens_of_every_layer_as_kvpress_and_all_that_come_later(method: str) -> None:
    cache = CompressedCache(tiny.model("llama"), peer.config_of(method, 67))
    tiny.model("llama")(torch.tensor([CONTEXT]), **tiny.with_cache(cache))
    assert {length for rows in cache.report().layer_lengths for length in rows} == {67}
    for token in QUESTION:
        tiny.model("llama")(torch.tensor([[token]]), **tiny.with_cache(cache))
    assert {length for rows in cache.report().layer_lengths for length in rows} == {67 + len(QUESTION)}


def test_context_and_question_are_tokenized_as_a_document_does() -> None:
    sample = Sample("a", "Rome.\n\nWhy?", "So", context="Rome.", answer_prefix="It")
    pair = LoadedModel("text", checkpoints.text_model(), checkpoints.text_tokenizer())
    context, question = (pair.tokenizer.decode(ids) for ids in peer.encoded(pair, sample))
    assert (context, question) == ("U:Rome.\n\n", "Why?\nA:It")


def test_a_loss_is_that_of_one_forward_and_perplexity_is_of_their_mean() -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(2, 30, seed=3)
    make = partial(DynamicCache, config=model.config)
    losses = continuation_losses(model, make, ids, 20)
    logits = tiny.untouched("llama")(ids).logits[:, 19:-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 20:, None]).squeeze(2)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-4, rtol=1e-4)
    assert continuation_perplexity(model, make, ids, 20) == pytest.approx(float(losses.mean().exp()))


@pytest.mark.parametrize("rule", long_answers.RULES)
def test_a_long_answer_stays_within_its_tokens_and_has_as_many_as_asked_for(rule: str) -> None:
    one, ids = loaded(), tiny.token_ids(2, 80, seed=4)
    make = partial(CompressedCache, one.model, long_answers.config_of(rule, 40))
    caches: list[CompressedCache] = []

    def kept() -> CompressedCache:
        caches.append(make())
        return caches[-1]

    row = long_answers.measured(one, kept, ids, 60)
    assert [len(row[name]) for name in ("all", "first", "last", "distinct", "texts")] == [2] * 5
    assert [cache.report().tokens_seen for cache in caches] == [79, 79]  # the last token is foretold, or chosen
    assert all(max(map(max, cache.report().layer_lengths)) <= 40 for cache in caches)
    whole = long_answers.measured(one, partial(CompressedCache, one.model, "full"), ids, 60)
    assert row["all"] != whole["all"]
