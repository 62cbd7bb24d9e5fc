"""Reducers in whole models: against a decoder run by hand, in every way of running a model, and wrong uses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import REDUCERS, CompressedCache, CompressionConfig, KVCompressError, restore
from kvcompress.errors import CacheStateError, ConfigError, PolicyError, UnsupportedModeError, UnsupportedModelError
from kvcompress.policies.base import Allocator, Reducer
from kvcompress.policies.context import Reduced, ReductionContext
from tests import strategies, tiny
from tests.reduction_oracle import Place, PlainLightKV

LIGHT = {"name": "lightkv", "windows": [2, 1]}  # after 1 and 2 of 3 layers
every_reducer = pytest.mark.parametrize("reducer", [LIGHT, *(n for n in REDUCERS.names() if n != "lightkv")], ids=str)
every_model = pytest.mark.parametrize("name", tiny.LARGE_IMAGE_MODELS)


def embedded(name: str, inputs: dict[str, Any]) -> Tensor:
    """What goes into the decoder of a model that kvcompress never met."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"])

    model = tiny.untouched(name)
    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    model(**inputs)
    hook.remove()
    return found[0]


def layout(name: str, ids: Tensor) -> tuple[list[Place], list[tuple[int, int]]]:
    """Places of a row's tokens, image by image in raster order, and the sizes of its grids."""
    side = tiny.image_side(name) // 4
    image: list[Place] = [(0, row, column) for row in range(side) for column in range(side)]
    sizes = [(side, side)]
    if "next" in name:
        for row in range(2 * side):
            image += [*((1, row, column) for column in range(2 * side)), None]
        sizes.append((2 * side, 2 * side))
    places: list[Place] = []
    count = 0
    for token in ids.tolist():
        number, within = divmod(count, len(image))
        place = image[within] if token == tiny.IMAGE_TOKEN else None
        places.append(place and (place[0] + number * len(sizes), *place[1:]))
        count += token == tiny.IMAGE_TOKEN
    return places, sizes * (count // len(image))


@pytest.mark.parametrize(
    ("name", "parts", "reducer"),
    [
        ("llava_36", [4, 0, 5], {}),
        ("llava_36", [0, 3, 0, 2], {"softmax": "queries"}),
        ("llava_next_36", [3, 0, 4], {"positions": "contiguous"}),
        ("llava_deep", [2, 0, 9], {"after": [1, 3, 4], "windows": [2, 2, 1]}),
        ("llava_deep", [5, 0, 1, 0, 6], {"after": [2, 3, 5], "windows": [1, 2, 1], "positions": "contiguous"}),
        ("llava_deep", [4, 0, 6], {"after": [1, 3, 4], "windows": [2, 2, 1], "positions": "per_layer"}),
        ("llava_deep", [7, 0, 4], {"rho": 0.3, "windows": [2, 1, 1], "after": [1, 2, 5]}),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_model_with_lightkv_is_the_decoder_run_by_hand(name: str, parts: list[int], reducer: dict[str, Any]) -> None:
    """Logits of the tokens that go on, keys and columns of every layer, and decode steps after the whole prompt."""
    model, inputs = tiny.model(name), tiny.prompt(name, parts, seed=1)
    cache = CompressedCache(model, "full", reducer={**LIGHT, **reducer})
    policy = cache.config.reducer
    ids = inputs["input_ids"][0]
    places, sizes = layout(name, ids)
    points = policy.acts_after(len(cache.layers))
    plain = PlainLightKV(
        tiny.untouched(name),
        places,
        (ids == tiny.IMAGE_TOKEN).tolist(),
        sizes,
        dict(zip(points, policy.windows, strict=True)),
        policy.rho,
        policy.positions != "original",
        policy.positions == "per_layer",
        over=policy.softmax,
    )
    found = model(**inputs, **tiny.with_cache(cache)).logits[0]
    columns, wanted = plain.prefill(embedded(name, inputs))
    assert len(columns) < len(plain.columns[0]), "nothing was merged"
    torch.testing.assert_close(found[columns], wanted, rtol=0, atol=1e-4)
    for layer, own in enumerate(plain.columns):
        assert cache.report().positions(layer, 0) == own
    assert cache.report().layer_tokens == [[len(own)] for own in plain.columns]
    removed = sorted(set(range(len(ids))) - set(columns))
    assert torch.equal(found[removed], model.lm_head(torch.zeros(len(removed), 32)))
    for token in (5, 17, 40):
        step = model(torch.tensor([[token]]), **tiny.with_cache(cache)).logits[0, -1]
        torch.testing.assert_close(step, plain.decode(token), rtol=0, atol=1e-4)
    for layer, stored in enumerate(cache.layers):
        torch.testing.assert_close(stored.keys, plain.cache.layers[layer].keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(stored.values, plain.cache.layers[layer].values, rtol=0, atol=1e-4)


# -- identity ----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "reducer",
    [
        {**LIGHT, "rho": 0.0},
        {**LIGHT, "rho": 0.0, "positions": "contiguous"},
        {"name": "tome", "rho": 0.0},
        {"name": "fastv", "drop": 0.0},
        {"name": "pyramiddrop", "keep_shares": [1, 1, 1]},
        {"name": "random", "keep_shares": [1, 1, 1]},
        {"name": "uniform_grid", "keep_shares": [1, 1, 1]},
        {"name": "random", "keep_shares": [1, 1], "after": [0, 1]},
        {"name": "divprune", "drop": 0.0},
        {"name": "cdpruner", "drop": 0.0},
    ],
    ids=str,
)
@torch.no_grad()
def test_reducing_nothing_changes_no_bit(name: str, reducer: dict[str, Any]) -> None:
    """Logits, keys and values of a prompt, and of decode steps."""
    model, inputs = tiny.model(name), tiny.prompt(name, [4, 0, 5], seed=2)
    caches = CompressedCache(model, "full"), CompressedCache(model, "full", reducer=reducer)
    for given in (inputs, *({"input_ids": tiny.token_ids(1, n, n)} for n in (1, 1, 4))):
        assert torch.equal(*(model(**given, **tiny.with_cache(cache)).logits for cache in caches))
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(*(layer.keys for layer in layers)) and torch.equal(*(layer.values for layer in layers))
    without, report = (cache.report() for cache in caches)
    assert all(into == [list(range(len(into[0])))] for into in report.went_into.values())
    assert replace(report, went_into={}) == without


@every_reducer
@every_model
@torch.no_grad()
def test_without_an_image_nothing_happens(name: str, reducer: Any) -> None:
    model, ids = tiny.model(name), tiny.token_ids(1, 20, seed=3)
    caches = CompressedCache(model, "full"), CompressedCache(model, "full", reducer=reducer)
    assert torch.equal(*(model(ids, **tiny.with_cache(cache)).logits for cache in caches))
    assert caches[1].report().vision_retention is None


# -- text belongs to the model -----------------------------------------------------------------------------------------


class Own(Reducer):
    """A reducer whose `reduce` a test writes."""

    kind: str = ""

    def acts_after(self, layers: int) -> tuple[int, ...]:
        return (1,)

    def reduce(self, layer: ReductionContext) -> Reduced:
        own, hidden = torch.arange(layer.index.shape[1]).repeat(len(layer.index), 1), layer.hidden
        images, text = layer.is_image[0].nonzero().flatten(), (~layer.is_image[0]).nonzero().flatten()
        if self.kind == "changes":
            return Reduced(own, hidden + 1.0)
        if self.kind == "changes text":
            return Reduced(own, torch.where(layer.is_image[..., None], hidden, hidden + 1.0))
        if self.kind == "drops text":
            own[0, text[0]] = -1
        if self.kind == "into removed":
            own[0, images[0]], own[0, images[1]] = images[1], -1
        if self.kind == "outside":
            own[0, images[0]] = own.shape[1]
        if self.kind == "short":
            return Reduced(own[:, :-1], hidden[:, :-1])
        if self.kind == "dtype":
            return Reduced(own, hidden.half())
        if self.kind == "raises":
            raise ArithmeticError("in a reducer")
        return Reduced(own, hidden)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REDUCERS, "_policies", dict(REDUCERS._policies))
    REDUCERS.register("own")(Own)


@pytest.fixture
def model() -> Iterator[Any]:
    """A model that must answer as a fresh one does, whatever the test did to it."""
    model = tiny.build("llava_36")
    yield model
    inputs = tiny.prompt("llava_36", [4, 0, 5], seed=4)
    wanted = tiny.untouched("llava_36").generate(**inputs, max_new_tokens=4, do_sample=False)
    for cache in (DynamicCache(), CompressedCache(model, "full")):
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=4, do_sample=False, **tiny.with_cache(cache)), wanted
        )
    cache = CompressedCache(model, "full", reducer=LIGHT)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, **tiny.with_cache(cache))
    assert cache.report().vision_retention < 0.9


@pytest.mark.usefixtures("own")
@torch.no_grad()
def test_a_reducer_cannot_change_text(model: Any) -> None:
    """What it returns for text is not looked at; what it returns for images is."""
    inputs = tiny.prompt("llava_36", [4, 0, 5], seed=4)
    logits = {
        kind: model(
            **inputs, **tiny.with_cache(CompressedCache(model, "full", reducer={"name": "own", "kind": kind}))
        ).logits
        for kind in ("", "changes text", "changes")
    }
    assert torch.equal(logits[""], logits["changes text"])
    assert not torch.allclose(logits[""][:, 4:], logits["changes"][:, 4:])
    assert torch.equal(logits[""][:, :4], logits["changes"][:, :4])  # text before the image sees none of it


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("drops text", "must let all text go on; it removed a text token"),
        ("into removed", r"can only become part of one that stays, or be dropped \(-1\)"),
        ("outside", r"can only become part of one that stays"),
        (
            "short",
            r"must return .* torch.float32 \(1, 45, 32\) .*; got torch.float32 \(1, 44, 32\) and torch.int64 \(1, 44\)",
        ),
        ("dtype", r"must return hidden states as torch.float32 .* got torch.float16"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_reducer_that_breaks_its_contract_is_named_with_its_layer(model: Any, kind: str, says: str) -> None:
    cache = CompressedCache(model, "full", reducer={"name": "own", "kind": kind})
    inputs = tiny.prompt("llava_36", [4, 0, 5], seed=4)
    with pytest.raises(PolicyError, match=f"reducer own: after layer 0: .*{says}"):
        model(**inputs, **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match=r"call reset\(\)"):
        model(**inputs, **tiny.with_cache(cache))


@pytest.mark.quick
@pytest.mark.parametrize("where", ["reducer", 1, 2])
@pytest.mark.usefixtures("own")
@torch.no_grad()
def test_an_exception_on_the_way_leaves_model_and_cache_usable(model: Any, where: Any) -> None:
    """In a reducer or in a layer after it: other caches work at once, this one after `reset`."""
    inputs, other = tiny.prompt("llava_36", [4, 0, 5], seed=4), CompressedCache(model, "full", reducer=LIGHT)
    wanted = model(**inputs, **tiny.with_cache(CompressedCache(model, "full", reducer=LIGHT))).logits

    def fail(*_: Any) -> None:
        raise ArithmeticError("in a layer")

    cache = CompressedCache(model, "full", reducer={"name": "own", "kind": "raises"} if where == "reducer" else LIGHT)
    hook = None if where == "reducer" else model.get_decoder().layers[where].mlp.register_forward_pre_hook(fail)
    with pytest.raises((ArithmeticError, PolicyError), match="in a "):
        model(**inputs, **tiny.with_cache(cache))
    if hook is not None:
        hook.remove()
    assert torch.equal(model(**inputs, **tiny.with_cache(other)).logits, wanted)
    with pytest.raises(CacheStateError, match=r"call reset\(\)"):
        model(**inputs, **tiny.with_cache(cache))
    cache.reset()
    if where != "reducer":
        assert torch.equal(model(**inputs, **tiny.with_cache(cache)).logits, wanted)
        model(tiny.token_ids(1, 1, 0), **tiny.with_cache(cache))


@torch.no_grad()
def test_a_forward_that_fails_before_the_decoder_leaves_the_report_right(model: Any) -> None:
    cache, inputs = CompressedCache(model, "full", reducer=LIGHT), tiny.prompt("llava_36", [4, 0, 5], seed=4)
    model(**inputs, **tiny.with_cache(cache))
    before = cache.report()
    wrong = tiny.prompt("llava_36", [0, 2], seed=5)
    del wrong["attention_mask"]
    wrong["pixel_values"] = wrong["pixel_values"][:, :, :5]
    with pytest.raises(UnsupportedModelError, match="36 image tokens, and its 1 images would have 6"):
        model(**wrong, **tiny.with_cache(cache))
    assert cache.report() == before
    model(tiny.token_ids(1, 3, 0), **tiny.with_cache(cache))
    assert cache.report().image_tokens == before.image_tokens


# -- wrong uses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [{**LIGHT, "after": [1, 3]}, {"name": "fastv", "layer": 3}], ids=str)
def test_a_layer_that_the_decoder_does_not_have_leaves_the_model_untouched(reducer: dict[str, Any]) -> None:
    model = tiny.build("llava_36")
    with pytest.raises(ConfigError, match=r"reducer \w+: .* below the 3 layers of the model's decoder; give"):
        CompressedCache(model, "full", reducer=reducer)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model.get_decoder().layers[0]._forward_pre_hooks


def test_an_image_in_a_forward_that_may_be_undone_is_refused(model: Any) -> None:
    cache, inputs = CompressedCache(model, "full", reducer=LIGHT), tiny.prompt("llava_36", [4, 0, 5], seed=4)
    with pytest.raises(UnsupportedModeError, match=r"reducer: .* generate without an assistant .* forward of its own"):
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=3, prompt_lookup_num_tokens=2)
    cache.reset()
    with torch.no_grad():  # the ways out
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=3, do_sample=False)
        cache.activate_past_recording()
        model(tiny.token_ids(1, 4, 1), **tiny.with_cache(cache))
        cache.crop(-2)
    assert cache.get_seq_length() == 45 + 2 + 2
    assert cache.report().vision_retention < 0.9


@pytest.mark.quick
@torch.no_grad()
def test_a_chunk_of_an_image_is_refused(model: Any) -> None:
    inputs = tiny.prompt("llava_36", [4, 0, 5], seed=4)
    cache = CompressedCache(model, "full", reducer=LIGHT)
    with pytest.raises(UnsupportedModelError, match=r"reducer: row 0 has 6 image tokens.*no prefill in chunks"):
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=2, prefill_chunk_size=10)
    assert cache.get_seq_length() == 0


@every_model
@torch.no_grad()
def test_more_image_tokens_than_features_are_refused(name: str) -> None:
    inputs = tiny.prompt(name, [4, 0, 5], seed=4)
    inputs["input_ids"][0, 0] = tiny.IMAGE_TOKEN
    cache = CompressedCache(tiny.model(name), "full", reducer=LIGHT)
    with pytest.raises(KVCompressError, match=r"reducer: row 0 has \d+ image tokens, and its 1 images would have"):
        tiny.model(name)(**inputs, **tiny.with_cache(cache))
    assert cache.get_seq_length() == 0


# -- ways to run a model -----------------------------------------------------------------------------------------------


def prefix(**more: Any) -> CompressionConfig:
    return CompressionConfig.preset("prefixkv", **{"budget": 0.5, **more})


@every_reducer
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)
@every_model
def test_generation_keeps_to_the_budget_of_all_tokens(name: str, how: dict[str, Any], reducer: Any) -> None:
    cache = CompressedCache(tiny.model(name), prefix(reducer=reducer))
    inputs = tiny.prompt(name, [9, 0, 60], seed=6)
    tiny.model(name).generate(**inputs, **tiny.with_cache(cache), max_new_tokens=6, **{"do_sample": False, **how})
    report = cache.report()
    assert report.tokens_seen == inputs["input_ids"].shape[1] + 5
    assert max(report.layer_tokens[2]) < report.tokens_seen
    points = cache.config.reducer.acts_after(3)
    assert all(set(tokens) == {report.tokens_seen} for tokens in report.layer_tokens[: points[0]])
    assert report.retention <= 0.5
    for row, given in zip(zip(*report.layer_lengths, strict=True), zip(*report.layer_tokens, strict=True), strict=True):
        assert min(sum(given), 0.4 * 3 * report.tokens_seen) <= sum(row) <= 0.5 * 3 * report.tokens_seen
    for lengths, budgets, given in zip(report.layer_lengths, report.layer_budgets, report.layer_tokens, strict=True):
        assert all(length <= min(pair) for length, *pair in zip(lengths, budgets, given, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("allocator", strategies.allocators(), ids=strategies.label)
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.4])
def test_layers_of_different_lengths_share_the_budget_of_all_tokens(allocator: Allocator, budget: float) -> None:
    """Nearly all tokens are the image's, so later layers get fewer than their share, which the others may use."""
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [2, 0, 3], seed=9)
    allocator = strategies.for_layers(allocator, 3)
    config = strategies.config_with(allocator, budget=budget, merger=None, quantizer=None, reducer=LIGHT)
    cache = CompressedCache(model, config)
    model(**inputs, **tiny.with_cache(cache))
    report, seen = cache.report(), inputs["input_ids"].shape[1]
    given, held = sum(map(sum, report.layer_tokens)), report.retention * 3 * seen  # of heads, their mean
    assert given < 3 * seen
    assert held == pytest.approx(min(math.floor(budget * 3 * seen + 1e-6), given), abs=1e-6)
    assert all(length <= tokens for length, tokens in zip(report.layer_lengths, report.layer_tokens, strict=True))


@torch.no_grad()
def test_beams_are_those_of_one_row_after_another() -> None:
    """Greedy search with one beam is greedy search, and two beams of a batch are those of each row."""
    name, config = "llava_36", prefix(reducer=LIGHT)
    model = tiny.model(name)
    rows = [tiny.prompt(name, [9, 0, 12], seed=7), tiny.prompt(name, [2, 0, 19], seed=8)]
    both = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    how = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    together = model.generate(**both, **tiny.with_cache(CompressedCache(model, config)), **how)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(model.generate(**row, **tiny.with_cache(CompressedCache(model, config)), **how)[0], found)


@pytest.mark.quick
@every_reducer
@torch.no_grad()
def test_turns_with_and_without_another_image(reducer: Any) -> None:
    """What a turn's image loses is its own affair: earlier images keep what they had."""
    name = "llava_36"
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), "full", reducer=reducer)
    first = tiny.prompt(name, [3, 0, 4], seed=9)
    model(**first, **tiny.with_cache(cache))
    one = cache.report()
    model(tiny.token_ids(1, 1, 1), **tiny.with_cache(cache))
    model(tiny.token_ids(1, 5, 2), **tiny.with_cache(cache))
    two = cache.report()
    assert two.layer_tokens == [[count + 6 for count in layer] for layer in one.layer_tokens]
    assert two.image_tokens == one.image_tokens
    second = tiny.prompt(name, [3, 0, 4], seed=9)
    second.pop("attention_mask")
    model(**second, **tiny.with_cache(cache))
    three = cache.report()
    assert three.image_tokens == [[2 * count for count in layer] for layer in one.image_tokens]
    for layer in range(3):
        assert three.positions(layer, 0)[: two.layer_lengths[layer][0]] == two.positions(layer, 0)
        assert three.layer_lengths[layer] == three.layer_tokens[layer] == [len(three.positions(layer, 0))]
    assert three.vision_retention == pytest.approx(sum(layer[0] for layer in one.image_tokens) / 36 / 3)
    logits = model(tiny.token_ids(1, 1, 3), **tiny.with_cache(cache)).logits
    assert logits.isfinite().all()


@every_reducer
@every_model
@torch.no_grad()
def test_the_last_token_goes_on_though_it_ends_an_image(name: str, reducer: Any) -> None:
    """The next token is read from its state."""
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), "full", reducer=reducer)
    inputs = tiny.prompt(name, [3, 0], seed=18)
    logits = model(**inputs, **tiny.with_cache(cache)).logits[0, -1]
    last = inputs["input_ids"].shape[1] - 1
    assert all(last in cache.report().positions(layer, 0) for layer in range(3))
    assert not torch.equal(logits, model.lm_head(torch.zeros(32)))
    assert cache.report().vision_retention < 0.9


@torch.no_grad()
def test_generate_takes_another_image_in_a_later_turn() -> None:
    """The whole conversation's ids, and the new image alone: as in plain calls."""
    name = "llava_next_36"
    model = tiny.model(name)
    first, second = tiny.prompt(name, [3, 0, 4], seed=19), tiny.prompt(name, [2, 0, 5], seed=20)
    plain, cache = (CompressedCache(model, prefix(reducer=LIGHT)) for _ in range(2))
    model(**first, **tiny.with_cache(plain))
    images = {key: second[key] for key in ("pixel_values", "image_sizes")}
    wanted = model(second["input_ids"], **images, **tiny.with_cache(plain)).logits[0, -1].argmax()
    model.generate(**first, **tiny.with_cache(cache), max_new_tokens=1, do_sample=False)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    how = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **images, **how, **tiny.with_cache(cache))[0, -1] == wanted
    assert cache.report() == plain.report()
    assert cache.report().image_tokens[2][0] < cache.report().image_tokens[0][0] == 2 * tiny.image_tokens(name)


@torch.no_grad()
def test_a_second_turn_is_guided_by_the_text_of_both_and_keeps_its_positions() -> None:
    """With nothing to reduce in the first turn, two turns are one prompt, but for text that comes later."""
    name, reducer = "llava_36", {**LIGHT, "after": [1], "windows": [1]}
    model, whole = tiny.model(name), tiny.prompt(name, [12, 0, 4], seed=10)
    for positions in ("original", "contiguous", "per_layer"):
        one, two = (CompressedCache(model, "full", reducer={**reducer, "positions": positions}) for _ in range(2))
        wanted = model(**whole, **tiny.with_cache(one)).logits
        ids = whole["input_ids"]
        model(ids[:, :7], **tiny.with_cache(two))
        found = model(ids[:, 7:], pixel_values=whole["pixel_values"], **tiny.with_cache(two)).logits
        torch.testing.assert_close(found, wanted[:, 7:], rtol=0, atol=1e-4)
        assert one.report().held_positions == two.report().held_positions


@torch.no_grad()
def test_layers_that_count_their_own_tokens_do_so_in_every_later_forward() -> None:
    """In a turn of several tokens as in as many decode steps, and in a row beside others as alone."""
    model, reducer = tiny.model("llava_deep"), {**LIGHT, "positions": "per_layer"}
    whole, text, more = tiny.prompt("llava_deep", [4, 0, 5], 3), tiny.token_ids(1, 20, 4), tiny.token_ids(1, 4, 5)
    logits = []
    for ids in (whole["input_ids"], text):
        cache = CompressedCache(model, "full", reducer=reducer)
        images = {"pixel_values": whole["pixel_values"]} if ids is not text else {}
        model(ids, **images, **tiny.with_cache(cache))
        stepwise = copy.deepcopy(cache)
        logits.append(model(more, **tiny.with_cache(cache)).logits)
        steps = [model(more[:, i : i + 1], **tiny.with_cache(stepwise)).logits for i in range(4)]
        torch.testing.assert_close(torch.cat(steps, 1), logits[-1], rtol=0, atol=1e-4)
        other = CompressedCache(model, "full", reducer={**reducer, "positions": "contiguous"})
        model(ids, **images, **tiny.with_cache(other))
        differs = (model(more, **tiny.with_cache(other)).logits - logits[-1]).abs().max() > 1e-2
        assert bool(differs) == bool(images)
    padding = whole["input_ids"].shape[1] - text.shape[1]
    ids = torch.cat([whole["input_ids"], torch.nn.functional.pad(text, (padding, 0))])
    mask = (torch.arange(ids.shape[1] + 4) >= torch.tensor([[0], [padding]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, first = CompressedCache(model, "full", reducer=reducer), slice(ids.shape[1])
    together = {"attention_mask": mask[:, first], "position_ids": positions[:, first], **tiny.with_cache(cache)}
    model(ids, pixel_values=whole["pixel_values"], **together)
    later = {"attention_mask": mask, "position_ids": positions[:, -4:], **tiny.with_cache(cache)}
    found = model(more.expand(2, -1), **later).logits
    torch.testing.assert_close(found, torch.cat(logits), rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_of_a_layer_are_refused_where_the_rotation_is_unknown() -> None:
    """Of one layer or of all is for the user to choose; a wrong rotation is not."""
    model = tiny.build("llava_36")
    cache = CompressedCache(model, "full", reducer={**LIGHT, "positions": "per_layer"})
    model(**tiny.prompt("llava_36", [4, 0, 5], 3), **tiny.with_cache(cache))
    rotary = model.get_decoder().rotary_emb
    known = rotary(torch.zeros(1), torch.zeros(1, 1))
    rotary.forward = lambda *args, **kwargs: known
    rotary.inv_freq = None
    with pytest.raises(UnsupportedModelError, match=r"positions='per_layer' .* choose positions='original'"):
        model(torch.tensor([[5]]), **tiny.with_cache(cache))


@torch.no_grad()
def test_one_document_many_questions() -> None:
    name, inputs = "llava_next_36", tiny.prompt("llava_next_36", [4, 0, 30], seed=11)
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), prefix(reducer=LIGHT))
    model(**inputs, **tiny.with_cache(cache))
    before = cache.report()
    answers = []
    for seed in (1, 2, 1):
        ids = torch.cat([inputs["input_ids"], tiny.token_ids(1, 5, seed)], 1)
        own = copy.deepcopy(cache)
        answers.append(
            model.generate(ids, **tiny.with_cache(own), max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
        )
        assert own.report().image_tokens == before.image_tokens
        assert own.report().retention <= 0.5
    assert torch.equal(answers[0], answers[2])
    assert cache.report() == before


@pytest.mark.quick
@torch.no_grad()
def test_caches_with_and_without_a_reducer_take_turns_and_others_are_as_ever() -> None:
    model, inputs = tiny.build("llava_36"), tiny.prompt("llava_36", [4, 0, 8], seed=12)
    steps = [inputs, {"input_ids": tiny.token_ids(1, 1, 1)}, {"input_ids": tiny.token_ids(1, 4, 2)}]
    plain = DynamicCache()
    untouched = [tiny.untouched("llava_36")(**step, **tiny.with_cache(plain)).logits for step in steps]
    configs = [prefix(), prefix(reducer=LIGHT), prefix(reducer="fastv")]
    alone = []
    for config in configs:
        cache = CompressedCache(model, config)
        alone.append([model(**step, **tiny.with_cache(cache)).logits for step in steps])
    caches, other = [CompressedCache(model, config) for config in configs], DynamicCache()
    for number, step in enumerate(steps):
        for wanted, cache in zip(alone, caches, strict=True):
            assert torch.equal(model(**step, **tiny.with_cache(cache)).logits, wanted[number])
        assert torch.equal(model(**step, **tiny.with_cache(other)).logits, untouched[number])
    restore(model)
    decoder = model.get_decoder()
    assert not model._forward_pre_hooks
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder.layers)
    assert torch.equal(model(**inputs).logits, untouched[0])
    again = CompressedCache(model, configs[1])
    assert torch.equal(model(**inputs, **tiny.with_cache(again)).logits, alone[1][0])


@pytest.mark.quick
@every_model
@torch.no_grad()
def test_logits_and_hidden_states_have_the_positions_of_the_prompt(name: str) -> None:
    """`logits_to_keep` counts them, and `output_hidden_states` gives what each layer had."""
    model, inputs = tiny.model(name), tiny.prompt(name, [4, 0, 8], seed=13)
    tokens = inputs["input_ids"].shape[1]
    cache = CompressedCache(model, "full", reducer=LIGHT)
    output = model(**inputs, **tiny.with_cache(cache), output_hidden_states=True)
    assert output.logits.shape[1] == tokens
    given = [count for (count,) in cache.report().layer_tokens]
    assert [states.shape[1] for states in output.hidden_states] == [tokens, *given[:-1], tokens]  # what layers gave
    few = model(**inputs, **tiny.with_cache(CompressedCache(model, "full", reducer=LIGHT)), logits_to_keep=3).logits
    torch.testing.assert_close(few, output.logits[:, -3:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_layers_go_to_cpu_memory_and_come_back() -> None:
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [4, 0, 8], seed=14)
    cache, twin = (CompressedCache(model, prefix(reducer=LIGHT)) for _ in range(2))
    for step in (inputs, {"input_ids": tiny.token_ids(1, 1, 1)}, {"input_ids": tiny.token_ids(1, 4, 2)}):
        assert torch.equal(*(model(**step, **tiny.with_cache(which)).logits for which in (cache, twin)))
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()


@every_reducer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_model
def test_half_precision(name: str, dtype: torch.dtype, reducer: Any) -> None:
    model, inputs = tiny.model(name, dtype), tiny.prompt(name, [4, 0, 8], seed=15)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    cache = CompressedCache(model, prefix(reducer=reducer))
    output = model.generate(
        **inputs, **tiny.with_cache(cache), max_new_tokens=3, output_logits=True, return_dict_in_generate=True
    )
    assert all(logits.isfinite().all() for logits in output.logits)
    assert cache.report().vision_retention < 0.9
    assert cache.layers[2].keys.dtype == dtype


@torch.no_grad()
def test_text_after_an_image_can_be_taken_back_and_the_image_cannot() -> None:
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [4, 0, 8], seed=16)
    cache, short = (CompressedCache(model, "full", reducer=LIGHT) for _ in range(2))
    model(**inputs, **tiny.with_cache(cache))
    before = cache.report()
    with pytest.raises(CacheStateError, match="cannot go back"):
        cache.crop(-20)
    assert cache.report() == before
    cache.crop(-3)
    for layer, now, then in zip(range(3), cache.report().layer_tokens, before.layer_tokens, strict=True):
        assert now == [then[0] - 3] == [len(cache.report().positions(layer, 0))]
    step = tiny.token_ids(1, 4, 3)
    found = model(step, **tiny.with_cache(cache)).logits
    model(**inputs, **tiny.with_cache(short))
    short.crop(-3)
    assert torch.equal(found, model(step, **tiny.with_cache(short)).logits)
    assert cache.report().image_tokens == before.image_tokens


# -- scores ------------------------------------------------------------------------------------------------------------


@every_reducer
@torch.no_grad()
def test_queries_that_scored_a_token_are_those_of_its_layer(reducer: Any) -> None:
    """Over turns with images, decode steps and text: counted from the columns that each layer was given."""
    name = "llava_36"
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), "full", scorer="attention", reducer=reducer)
    given: list[list[list[int]]] = []  # forwards that scored, layers, columns
    before: list[set[int]] = [set()] * 3
    for parts in ([3, 0, 4], [1], [5], [1], [1], [2, 0, 3], [1]):
        inputs = tiny.prompt(name, parts, seed=17)
        inputs.pop("attention_mask")
        model(**inputs, **tiny.with_cache(cache))
        now = [set(cache.report().positions(layer, 0)) for layer in range(3)]
        if inputs["input_ids"].shape[1] > 1:
            given.append([sorted(new - old) for new, old in zip(now, before, strict=True)])
        before = now
        for layer in range(3):
            columns = torch.tensor(sorted(now[layer]))[None, None]
            for last, counted in ((False, given), (True, given[-1:])):
                found = cache._state.sequence.queries_on(columns, last=last, layer=layer)[0, 0].tolist()
                wanted = [
                    max(1, sum(query >= column for forward in counted for query in forward[layer]))
                    for column in sorted(now[layer])
                ]
                assert found == wanted, (parts, layer, last)


# -- batches -----------------------------------------------------------------------------------------------------------

ROWS = [[5, 0, 7], [3, 0, 2, 0, 4], [9], [0, 6], [1, 0, 30]]


@every_reducer
@every_model
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_a_row_is_as_alone_whatever_stands_beside_it(name: str, reducer: Any, left: bool) -> None:
    """Padded on either side, with images elsewhere, several or none: columns of every layer, and logits, over turns."""
    rows = [tiny.prompt(name, parts, seed=20 + number) for number, parts in enumerate(ROWS)]
    together = Talk(name, reducer)
    together.forward(rows, left)
    talks = [Talk(name, reducer) for _ in rows]
    for talk, row in zip(talks, rows, strict=True):
        talk.forward([row], left)
    later = [{"input_ids": tiny.token_ids(1, 1 + number % 3, seed=number)} for number in range(len(rows))]
    second = [tiny.prompt(name, parts, seed=30) for parts in ([1, 0, 2], [4], [0, 0, 1], [2], [1, 0, 1])]
    for turn in (later, second, [{"input_ids": tiny.token_ids(1, 1, seed=9)}] * len(rows)):
        _compare(together, talks)
        together.forward(turn, not left)
        for talk, row in zip(talks, turn, strict=True):
            talk.forward([row], left)
    _compare(together, talks)


@torch.no_grad()
def test_rows_take_what_they_lost_along() -> None:
    """Reordered and repeated rows keep their own missing tokens; sinks are counted among those a layer got."""
    rows = [tiny.prompt("llava_36", parts, seed=40) for parts in ([0, 7], [3, 0, 2, 0, 4], [9])]
    talk = Talk("llava_36", "fastv")
    talk.forward(rows, left=True)
    sequence, before = talk.cache._state.sequence, talk.cache.report()
    held = [talk.held(row) for row in range(3)]
    for sinks in (0, 2, 5, 20, 100):
        wanted = [[sum(index < sinks for index in row[layer]) for row in held] for layer in range(3)]
        assert sequence.first_given([0, 1, 2], sinks).tolist() == wanted
        assert sequence.first_given([2, 0], sinks).tolist() == [wanted[2], wanted[0]]
    order = [2, 0, 0, 1]
    talk.cache.batch_select_indices(torch.tensor(order))
    after = talk.cache.report()
    for field in ("layer_tokens", "image_tokens", "layer_lengths"):
        assert getattr(after, field) == [[layer[row] for row in order] for layer in getattr(before, field)]
    for row, old in enumerate(order):
        assert after.positions(2, row) == before.positions(2, old)


class Talk:
    """Plain forwards of padded rows on one cache."""

    def __init__(self, name: str, reducer: Any) -> None:
        self.model = tiny.model(name)
        self.cache = CompressedCache(self.model, "full", reducer=reducer)
        self.valid: Tensor | None = None
        self.logits: list[Tensor] = []

    def forward(self, rows: list[dict[str, Any]], left: bool) -> None:
        """One forward; each row's padding on one side."""
        ids, longest = [row["input_ids"] for row in rows], max(row["input_ids"].shape[1] for row in rows)

        def pad(tensor: Tensor) -> Tensor:
            missing = longest - tensor.shape[1]
            return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing))

        new = torch.cat([pad(torch.ones_like(row)) for row in ids])
        self.valid = new if self.valid is None else torch.cat([self.valid, new], 1)
        images = {
            key: torch.cat([row[key] for row in rows if key in row])
            for key in ("pixel_values", "image_sizes")
            if any(key in row for row in rows)
        }
        self.logits = []
        logits = self.model(
            input_ids=torch.cat([pad(row) for row in ids]),
            attention_mask=self.valid,
            position_ids=(self.valid.cumsum(1) - 1).clamp(min=0)[:, -longest:],
            **tiny.with_cache(self.cache),
            **images,
        ).logits
        self.logits = [logits[row, new[row].bool()] for row in range(len(rows))]

    def held(self, row: int) -> list[list[int]]:
        """Per layer, which of a row's tokens it holds."""
        assert self.valid is not None
        index = (self.valid[row].cumsum(0) - 1).tolist()
        return [[index[column] for column in self.cache.report().positions(layer, row)] for layer in range(3)]


def _compare(together: Talk, talks: list[Talk]) -> None:
    report = together.cache.report()
    for row, talk in enumerate(talks):
        assert together.held(row) == talk.held(0), f"row {row}"
        alone = talk.cache.report()
        assert [layer[row] for layer in report.layer_tokens] == [layer[0] for layer in alone.layer_tokens]
        assert [layer[row] for layer in report.image_tokens] == [layer[0] for layer in alone.image_tokens]
        torch.testing.assert_close(together.logits[row], talk.logits[0], rtol=0, atol=2e-5)
