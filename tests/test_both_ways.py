"""Models whose tokens attend to others after them while a prompt is read: the cache takes the mask that they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError
from kvcompress.kernels import attend_blocks, attention_mass, attention_probabilities
from kvcompress.testing.running import require_masked
from tests import tiny
from tests.reference import Reference, recorded
from tests.test_reconstruction import Tokenizer
from tests.vision import FAMILIES, IMAGE

BOTH = {"gemma3": 1, "paligemma": 0, "paligemma2": 1}  # and the first layer that is compressed
every_family = pytest.mark.parametrize("name", BOTH)


def eager(name: str, inputs: dict[str, Any]) -> list[Tensor]:
    """Probabilities of the model's own eager attention, those of padded queries left out, `[batch, heads, ...]`."""
    plain = tiny.build(name)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        found = plain(**inputs, output_attentions=True).attentions
    return [one * inputs["attention_mask"][:, None, :, None] for one in found]


# -- scores ------------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("queries", ["all", "window:9", "stride:3"])
def test_scores_are_sums_of_the_probabilities_that_the_model_gives(name: str, queries: str) -> None:
    """In a padded batch with images, whichever queries count."""
    model, inputs = tiny.model(name), FAMILIES[name].two_rows()
    cache = CompressedCache(model, "uniform", budget=1.0, scorer={"name": "attention", "queries": queries})
    with torch.no_grad():
        model(**inputs, **tiny.with_cache(cache))
    ranked = cache.ranked()
    last = {"all": slice(None), "window:9": slice(-9, None), "stride:3": None}[queries]
    for number in range(BOTH[name], 3):
        weights = eager(name, inputs)[number]
        if last is None:  # one of the last three of a row, and every third before it
            sums = [3 * weights.flip(2)[:, :, offset::3].sum(2) for offset in range(3)]
        else:
            sums = [weights[:, :, last].sum(2)]
        wanted = [one.unflatten(1, (1, -1)).mean(2) for one in sums]
        index, scores = ranked[number - BOTH[name]]
        for row, own in enumerate(inputs["attention_mask"].bool()):
            given = scores[row][:, index[row, 0] >= 0]
            assert min(float((given - one[row][:, own]).abs().max()) for one in wanted) < 1e-5


@every_family
def test_means_are_over_the_queries_that_saw_a_token(name: str) -> None:
    """Those before it too, if they did; in a padded batch, and after a row was taken out and tokens were taken back."""
    model, inputs = tiny.model(name), FAMILIES[name].two_rows()
    cache = CompressedCache(model, "uniform", budget=1.0, scorer={"name": "attention", "reduce": "mean"})
    with torch.no_grad():
        model(**inputs, **tiny.with_cache(cache))
    weights = eager(name, inputs)[2]
    means = (weights.sum(2) / (weights > 0).sum(2).clamp(min=1)).unflatten(1, (1, -1)).mean(2)
    index, importance = cache.ranked()[-1]
    for row in range(2):
        own = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(importance[row][:, index[row, 0] >= 0], means[row][:, own], rtol=0, atol=1e-5)
    cache.reset()
    cache.activate_past_recording()
    with torch.no_grad():
        model(**inputs, **tiny.with_cache(cache))
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-2)
    left = weights[1, :, :-2, :-2]
    means = (left.sum(1) / (left > 0).sum(1).clamp(min=1)).unflatten(0, (1, -1)).mean(1)
    index, importance = cache.ranked()[-1]
    own = inputs["attention_mask"][1, :-2].bool()
    torch.testing.assert_close(importance[0][:, index[0, 0] >= 0], means[:, own], rtol=0, atol=1e-5)


# -- a prompt in pieces ------------------------------------------------------------------------------------------------


def in_chunks(model: Any, cache: Any, inputs: dict[str, Any], sizes: list[int]) -> Tensor:
    """Logits of the last column, of a prompt whose features are made at once and read so many columns at a time."""
    first, ids, mask = 0, inputs["input_ids"], inputs["attention_mask"]
    features = iter(
        model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output.flatten(0, 1)
    )
    for size in sizes:
        own = slice(first, first + size)
        marks = ids[:, own] == IMAGE
        embeds = model.get_input_embeddings()(ids[:, own].masked_fill(marks, 0))
        embeds[marks] = torch.stack([next(features) for _ in range(int(marks.sum()))]) if marks.any() else embeds[marks]
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, own]
        more = {"token_type_ids": inputs["token_type_ids"]}
        found: Tensor = model(
            inputs_embeds=embeds, attention_mask=mask[:, : own.stop], position_ids=at, **more, **tiny.with_cache(cache)
        ).logits
        first += size
    return found[:, -1]


@torch.no_grad()
def test_an_image_that_is_read_in_two_forwards_attends_as_with_a_dynamic_cache() -> None:
    """Each part of it sees all of itself and what came before, with room for all."""
    family = FAMILIES["gemma3"]
    inputs = family.prompt([[4, ("image", (1, 1, 1)), 7]])
    sizes = [11, 3, inputs["input_ids"].shape[1] - 14]
    assert inputs["input_ids"][0, 10:12].tolist() == [IMAGE, IMAGE]
    other = tiny.untouched("gemma3")
    wanted = in_chunks(other, DynamicCache(config=other.config), inputs, sizes)
    model = tiny.model("gemma3")
    found = in_chunks(model, CompressedCache(model, "uniform", budget=1.0), inputs, sizes)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_of_a_later_turn_attends_both_ways_to_itself() -> None:
    """At a budget of 0.3, each forward is that of a whole cache with the rest hidden; types cover all columns."""
    family, model = FAMILIES["gemma3"], tiny.model("gemma3")
    image = ("image", (1, 1, 1))
    inputs = family.prompt([[9, image, 6, image, 3], [6, image, 5, image, 4]])
    first, second = (inputs["input_ids"][:, at] for at in (slice(0, 8), slice(8, None)))
    assert not (first == IMAGE).any()
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    with recorded(model, cache) as steps:
        for ids, more in ((first, {}), (second, {name: inputs[name] for name in ("pixel_values", "token_type_ids")})):
            mask = inputs["attention_mask"][:, : int(cache.get_seq_length()) + ids.shape[1]]
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            model(input_ids=ids, attention_mask=mask, position_ids=at, **more, **tiny.with_cache(cache))
    require_masked(Reference("gemma3"), cache, steps)
    with pytest.raises(
        CacheStateError, match=r"token_type_ids: .* these are 3; they must cover the \d+ tokens seen and"
    ):
        model(first[:, :3], token_type_ids=torch.zeros(2, 3).long(), **tiny.with_cache(cache))


# -- assisted decoding -------------------------------------------------------------------------------------------------


@every_family
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(name: str) -> None:
    """Forwards that may be undone score what stays of them, images that attend both ways included."""
    model = tiny.model(name)
    row = [5, ("image", FAMILIES[name].sizes[0]), 6]
    inputs, settings = FAMILIES[name].prompt([row]), {"max_new_tokens": 6, "do_sample": False}
    caches = [CompressedCache(model, "h2o", budget=1.0) for _ in range(2)]
    plain, looked = (
        model.generate(**inputs, **tiny.with_cache(cache), **settings, **more)
        for cache, more in zip(caches, ({}, {"prompt_lookup_num_tokens": 2}), strict=True)
    )
    assert torch.equal(plain, looked)


# -- masks -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_served_where_each_token_sees_all_up_to_some_column() -> None:
    """As the model itself attends with it; any other is refused with the reason, and nothing has changed."""
    model, ids = tiny.model("llama"), tiny.token_ids(2, 9, seed=3)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, 2:6, 2:6] = True
    mask[1, :, :, :2] = False
    cache = CompressedCache(model, "prefixkv", budget=1.0)
    found = model(ids, attention_mask=mask, **tiny.with_cache(cache)).logits
    wanted = tiny.untouched("llama")(ids, attention_mask=mask, **tiny.with_cache(DynamicCache())).logits
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1, 2:], wanted[1, 2:], rtol=0, atol=1e-5)
    cache.reset()
    mask[0, :, 7, 3] = False
    with pytest.raises(UnsupportedModelError, match="some tokens do not see all that came before them"):
        model(ids, attention_mask=mask, **tiny.with_cache(cache))
    assert cache.get_seq_length() == 0
    model(ids, **tiny.with_cache(cache))


@torch.no_grad()
def test_a_prompt_that_attends_both_ways_wants_its_types() -> None:
    """Without them transformers attends both ways or not, by whether a row has padding."""
    model, inputs = tiny.model("paligemma"), FAMILIES["paligemma"].two_rows()
    del inputs["token_type_ids"]
    with pytest.raises(UnsupportedModelError, match=r"attends to tokens before and after each.*token_type_ids"):
        model(**inputs, **tiny.with_cache(CompressedCache(model, "prefixkv")))


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_a_reducer_is_refused_where_other_layers_slide(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"reducer: layers 0 of .* slide or sum up, and count every token"):
        CompressedCache(tiny.model(name), "full", reducer="lightkv")


@every_family
def test_repetition_is_refused_with_types(name: str) -> None:
    cache = CompressedCache(tiny.model(name), "uniform", scorer="kvzip", budget=0.5)
    with pytest.raises(UnsupportedModeError, match=r"token_type_ids: .*cannot be repeated.*than 'kvzip'"):
        cache.score_by_reconstruction(Tokenizer(), FAMILIES[name].two_rows())


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_and_its_mass_are_those_of_the_formula(
    past: int, padded: bool, sets: int, softcap: float | None
) -> None:
    """Over more queries than are written out at a time; what a query sees ends at its own token or later."""
    generator, queries = torch.Generator().manual_seed(past), 150
    draw = lambda heads, tokens: torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float32)  # noqa: E731
    query, keys, values = draw(4, queries), draw(2, past + queries), draw(2, past + queries)
    own = torch.arange(queries).expand(2, -1)
    last = own.clone()
    last[0, 3:60], last[0, 100:140], last[1, 20:149] = 59, 139, 148
    valid = torch.ones(2, sets, past + queries, dtype=torch.bool)
    if padded:
        valid[0, 0, : min(past, 2)], valid[1, :, past : past + 7] = False, False
    columns = torch.arange(past + queries)
    visible = (columns <= (last + past)[:, None, :, None]) & valid.repeat_interleave(4 // sets, 1).unsqueeze(2)
    logits = query @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    wanted = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    given = valid if padded or sets > 1 else None
    output, lse = attend_blocks(query, [(keys, values)], past, 0.4, given, True, softcap, last)
    real = valid[:, :1, past:, None]
    torch.testing.assert_close(output * real, wanted @ values.repeat_interleave(2, 1) * real, rtol=0, atol=2e-5)
    if given is not None and sets == 1:
        given = given[:, 0]
    wanted = wanted * (real if sets == 1 else valid.repeat_interleave(2, 1)[:, :, past:, None])
    mass = attention_mass(query, keys, lse, 0.4, valid=given, softcap=softcap, start=4, last_seen=last)
    torch.testing.assert_close(mass, wanted[:, :, 4:].sum(2).unflatten(1, (2, 2)).sum(2), rtol=0, atol=2e-4)
    found = attention_probabilities(query, keys, lse, 0.4, 70, given, softcap, last)
    torch.testing.assert_close(found, wanted[:, :, -70:], rtol=0, atol=2e-5)
