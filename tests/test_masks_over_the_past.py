"""A mask may hide tokens that are cached already: they are padding from then on, neither attended nor kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import Budget, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.config.presets import PRESETS
from tests import tiny
from tests.reference import Reference, held, recorded

CONFIGS = {name: CompressionConfig.preset(name) for name in PRESETS}
TEXT = [name for name, config in CONFIGS.items() if config.reducer is None]
EVICTING = [name for name in TEXT if CONFIGS[name].evictor is not None]
AS_STORED = [name for name in EVICTING if CONFIGS[name].merger is None and CONFIGS[name].quantizer is None]


def hiding(hidden: Sequence[Iterable[int]], seen: int, new: int) -> Tensor:
    """A mask over `seen` positions and `new` ones, without some positions of each row."""
    mask = torch.ones(len(hidden), seen + new, dtype=torch.long)
    for row, positions in enumerate(hidden):
        mask[row, list(positions)] = 0
    return mask


def inputs(mask: Tensor, new: int, seed: int) -> dict[str, Tensor]:
    """Random new tokens under a mask, in the positions that `generate` would give them."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
    return {"input_ids": tiny.token_ids(len(mask), new, seed), "attention_mask": mask, "position_ids": positions}


def everything(preset: str) -> CompressedCache:
    """A cache of a preset that keeps every token."""
    budget = {} if preset not in EVICTING else {"budget": 1.0}
    return CompressedCache(tiny.model("llama"), preset, **budget)


# Batches with 30 positions seen, and what a later mask hides of their rows.
HIDDEN = {
    "alike": [range(5, 15), range(5, 15)],
    "each its own": [range(5, 15), range(4), range(22, 30), range(0), (1, 4, 7, 20, 21, 29)],
}


@torch.no_grad()
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("preset", TEXT)
def test_at_full_budget_a_turn_that_hides_cached_tokens_is_that_of_dynamic_cache(
    preset: str, hidden: list[Sequence[int]]
) -> None:
    cache, reference = everything(preset), DynamicCache()
    models = ((tiny.model("llama"), cache), (tiny.untouched("llama"), reference))
    prompt = tiny.token_ids(len(hidden), 30, seed=1)
    for model, used in models:
        model(prompt, **tiny.with_cache(used))
    for new, seen in ((5, 30), (1, 35), (1, 36), (3, 37), (1, 40)):  # the mask goes on as it is
        step = inputs(hiding(hidden, seen, new), new, seed=seen)
        found, wanted = (model(**step, **tiny.with_cache(used)).logits for model, used in models)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("preset", ["full", "prefixkv", "streaming", "h2o"])
def test_a_decode_step_that_hides_cached_tokens_is_right_or_refused(preset: str, hidden: list[Sequence[int]]) -> None:
    cache, reference = everything(preset), DynamicCache()
    models = ((tiny.untouched("llama"), reference), (tiny.model("llama"), cache))
    for model, used in models:
        model(tiny.token_ids(len(hidden), 30, seed=1), **tiny.with_cache(used))
    before = cache.report()
    for seen in (30, 31):
        step = inputs(hiding(hidden, seen, 1), 1, seed=seen)
        wanted = models[0][0](**step, **tiny.with_cache(reference)).logits
        try:
            found = models[1][0](**step, **tiny.with_cache(cache)).logits
        except KVCompressError as error:
            assert "mask" in str(error) and cache.report() == before
            return
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("preset", ["full", "prefixkv", "streaming", "h2o"])
def test_a_mask_that_shows_a_hidden_token_again_is_right_or_refused(preset: str, new: int) -> None:
    cache, reference = everything(preset), DynamicCache()
    models = ((tiny.untouched("llama"), reference), (tiny.model("llama"), cache))
    first = hiding([range(6), ()], 0, 30)  # a padded prompt
    second = hiding([range(6), range(8, 12)], 30, 3)
    for step in (inputs(first, 30, seed=1), inputs(second, 3, seed=2)):
        for model, used in models:
            model(**step, **tiny.with_cache(used))
    before = cache.report()
    for shown in ([range(6), ()], [(), range(8, 12)], [range(5), range(8, 12)], [(), ()]):
        step = inputs(hiding(shown, 33, new), new, seed=3)
        wanted = models[0][0](**step, **tiny.with_cache(copy.deepcopy(reference))).logits
        attempt = copy.deepcopy(cache)
        try:
            found = models[1][0](**step, **tiny.with_cache(attempt)).logits
        except KVCompressError as error:
            assert "mask" in str(error) and attempt.report() == before
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("hidden", "budget"), list(zip(HIDDEN.values(), (0.9, 14), strict=True)), ids=HIDDEN)
@pytest.mark.parametrize("preset", AS_STORED)
@pytest.mark.filterwarnings("ignore:the budget of")
def test_under_a_budget_hidden_tokens_are_neither_attended_nor_kept(
    preset: str, hidden: list[Sequence[int]], budget: Any
) -> None:
    """Every step is masked attention over what was held and is not hidden; no hidden token is held after it."""
    model, reference, nothing = tiny.model("llama"), Reference("llama"), [()] * len(hidden)
    budget = Budget.parse(budget).model_copy(update={"sink": 2, "recent": 3})
    cache = CompressedCache(model, preset, budget=budget)
    steps = [inputs(hiding(nothing, 0, 26), 26, seed=1)]
    steps += [inputs(hiding(nothing, seen, 1), 1, seed=seen) for seen in range(26, 30)]
    steps += [inputs(hiding(hidden, 30, 5), 5, seed=30)]
    steps += [inputs(hiding(hidden, seen, 1), 1, seed=seen) for seen in range(35, 41)]
    with recorded(model, cache) as found:
        for step in steps:
            model(**step, **tiny.with_cache(cache))
            if step["attention_mask"].shape[1] > 30:
                for layer in held(cache):
                    for row, sets in enumerate(layer):
                        assert not set(hidden[row]).intersection(set().union(*sets))
    for step, ran in zip(steps, found, strict=True):
        wanted = reference.run(step, ran.held)
        for found_layer, wanted_layer in zip(ran.attention, wanted.attention, strict=True):
            torch.testing.assert_close(found_layer, wanted_layer, rtol=0, atol=2e-5)
    reference.check_stored(cache)


# -- a batch whose rows end at different times -------------------------------------------------------------------------


def conversation(cache: Any, model: Any, prompt: Tensor, follow: Tensor, ends: int | None) -> tuple[Tensor, Tensor]:
    """Two turns of `generate` on one cache; the second masks what is padding, as users write it."""
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    first = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, **how, **tiny.with_cache(cache)
    )
    ids = torch.cat([first, follow], 1)
    second = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        **tiny.with_cache(cache),
    )
    return first, second


def early_end(prompt: Tensor) -> int:
    """A token that row 0 generates third, and row 1 not at all."""
    sequences = (
        tiny.untouched("llama")
        .generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False)[
            :, prompt.shape[1] :
        ]
        .tolist()
    )
    assert sequences[0].index(sequences[0][2]) == 2 and sequences[0][2] not in sequences[1]
    return int(sequences[0][2])


@pytest.mark.parametrize("preset", TEXT)
def test_the_next_turn_after_a_row_that_ended_early_is_that_of_dynamic_cache(preset: str) -> None:
    prompt, follow = tiny.token_ids(2, 20, seed=3), tiny.token_ids(2, 9, seed=4)
    ends = early_end(prompt)
    _, wanted = conversation(DynamicCache(), tiny.untouched("llama"), prompt, follow, ends)
    first, found = conversation(everything(preset), tiny.model("llama"), prompt, follow, ends)
    assert (first[0, -4:] == 0).all() and (first[1] != 0).all()
    assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("preset", EVICTING)
def test_a_row_that_ended_early_keeps_what_it_keeps_alone(preset: str) -> None:
    """Pads that decode steps appended and the next turn's mask hides: as if the row had not been padded."""
    model, budget = tiny.model("llama"), Budget(tokens=90, sink=2, recent=3)
    prompt, answer, follow = tiny.token_ids(2, 70, seed=5), tiny.token_ids(2, 8, seed=6), tiny.token_ids(2, 48, seed=7)
    together, alone = (CompressedCache(model, preset, budget=budget) for _ in range(2))
    answered, padding = 3, range(73, 78)

    model(prompt, **tiny.with_cache(together))
    answer[0, answered:] = 0
    for number in range(8):
        model(answer[:, number : number + 1], **tiny.with_cache(together))
    mask = hiding([padding, ()], 78, 48)
    turn = {**inputs(mask, 48, seed=0), "input_ids": follow}
    found = model(**turn, **tiny.with_cache(together)).logits

    model(prompt[:1], **tiny.with_cache(alone))
    for number in range(answered):
        model(answer[:1, number : number + 1], **tiny.with_cache(alone))
    wanted = model(follow[:1], **tiny.with_cache(alone)).logits

    torch.testing.assert_close(found[:1], wanted, rtol=0, atol=2e-5)
    index = {position: number for number, position in enumerate(c for c in range(126) if c not in padding)}
    for now, then in zip(held(together), held(alone), strict=True):
        assert [[index[position] for position in positions] for positions in now[0]] == then[0]
    assert together.report().row_tokens_seen == [121, 126]
