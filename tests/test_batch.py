"""Batches: each row of a padded batch keeps what it keeps alone, and gets the tokens that it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import REDUCERS, Budget, CompressedCache, CompressionConfig
from kvcompress.testing.models import with_images
from kvcompress.testing.running import (
    Outcome,
    blurred,
    of_row,
    require_agreement,
    require_rows_alone,
    talked,
    with_budget,
)
from tests import reference, strategies, tiny
from tests.strategies import Scripted, examples

# Each configuration goes one of two ways through a batch, in a longer search both.
some_configs, other_configs = (
    pytest.mark.parametrize("config", strategies.configs() if strategies.THOROUGH else strategies.configs()[half::2])
    for half in (0, 1)
)
budgets = st.sampled_from([0.1, 0.3, 0.5, 0.8, 4, 9, 15])


# -- generate ----------------------------------------------------------------------------------------------------------


def generated(name: str, config: CompressionConfig, inputs: dict[str, Any]) -> list[Outcome]:
    """Greedy tokens of every row, with what was held before each forward and at the end."""
    model, mask = tiny.model(name), inputs["attention_mask"]
    cache = CompressedCache(model, config)
    with reference.recorded(model, cache) as steps:
        output = model.generate(
            **inputs,
            **tiny.with_cache(cache),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    states = [step.held for step in steps[1:]] + [reference.held(cache)]
    outcomes = []
    for row in range(mask.shape[0]):
        valid = mask[row].bool().tolist() + [True] * len(steps)
        held = [of_row(state, row, valid) for state in states]
        logits = [step[row] for step in output.logits]
        outcomes.append(Outcome(held, logits, output.sequences[row, mask.shape[1] :].tolist()))
    return outcomes


def left_padded(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of different lengths as one batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)

    def pad(key: str) -> Tensor:
        return torch.cat([torch.nn.functional.pad(row[key], (longest - row[key].shape[1], 0)) for row in rows])

    images = {key: [row[key] for row in rows if key in row] for key in ("pixel_values", "image_sizes")}
    images = {key: torch.cat(tensors) for key, tensors in images.items() if tensors}
    return {"input_ids": pad("input_ids"), "attention_mask": pad("attention_mask"), **images}


def model_for(config: CompressionConfig) -> str:
    """A model with images where a reducer wants some."""
    return "llama" if config.reducer is None else "llava_36"


def check_generate(name: str, config: CompressionConfig, rows: list[dict[str, Any]]) -> None:
    together = generated(name, config, left_padded(name, rows))
    for row, found in zip(rows, together, strict=True):
        (alone,) = generated(name, config, row)

        def again(row: dict[str, Any] = row) -> list[Outcome]:
            if config.scorer is None:
                return []
            return [generated(name, blurred(config, number), row)[0] for number in range(4)]

        require_agreement(found, alone, again)


@some_configs
@examples(3)
@given(budget=budgets, lengths=st.lists(st.integers(1, 30), min_size=2, max_size=4), seed=strategies.seeds)
def test_a_left_padded_row_generates_as_alone(
    config: CompressionConfig, budget: Any, lengths: list[int], seed: int
) -> None:
    """Through `generate`, after every forward, for every other preset and policy; with an image for reducers."""
    name = model_for(config)
    rows = [tiny.inputs(name, tokens, seed + number) for number, tokens in enumerate(lengths)]
    check_generate(name, with_budget(config, budget), rows)


@pytest.mark.parametrize("name", ["llama_mha", "qwen2", "llava", "llava_next"])
@examples(3)
@given(budget=budgets, lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), seed=strategies.seeds)
def test_a_left_padded_row_of_any_model_generates_as_alone(
    name: str, budget: Any, lengths: list[int], seed: int
) -> None:
    """With other heads, and with an image in every row."""
    rows = [tiny.inputs(name, tokens, seed + number) for number, tokens in enumerate(lengths)]
    check_generate(name, CompressionConfig.preset("prefixkv", budget=budget), rows)


@pytest.mark.parametrize("reducer", REDUCERS.names())
@pytest.mark.parametrize("name", tiny.LARGE_IMAGE_MODELS)
def test_a_left_padded_row_with_any_images_generates_as_alone(name: str, reducer: str) -> None:
    """Rows with an image at their start, with several and with none lose what they lose alone."""
    rows = [tiny.prompt(name, parts, seed=3) for parts in ([0, 9], [4], [2, 0, 1, 0, 5], [1, 0, 30])]
    policy = strategies.policy(REDUCERS, reducer)
    check_generate(name, CompressionConfig.preset("prefixkv", budget=0.6, reducer=policy), rows)


@examples(10)
@given(slots=st.integers(3, 40), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), seed=strategies.seeds)
def test_bytes_are_split_equally_over_rows(slots: int, lengths: list[int], seed: int) -> None:
    """A batch with so many times the bytes gives each row what it keeps alone."""
    rows = [tiny.inputs("llama", tokens, seed + number) for number, tokens in enumerate(lengths)]
    # The tiny LLaMA: 2 heads x (8 + 8) numbers x 4 bytes a slot.
    batch, single = (
        CompressionConfig.preset("uniform", budget=Budget(bytes=128 * slots * count), scorer=Scripted(seed=seed))
        for count in (len(rows), 1)
    )
    together = generated("llama", batch, left_padded("llama", rows))
    for row, found in zip(rows, together, strict=True):
        require_agreement(found, generated("llama", single, row)[0], list)


# -- plain forwards ----------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn, rows: int) -> list[list[tuple[int, bool]]]:
    """Forwards as (tokens, padded on the left) per row: a prompt, decode steps, and turns of two tokens or more."""
    later = st.lists(st.sampled_from([st.just(1), st.integers(2, 6)]), min_size=1, max_size=6)
    sizes = [st.integers(1, 24), *draw(later)]
    return [[(draw(size), draw(st.booleans())) for _ in range(rows)] for size in sizes]


def images_of(ids: Tensor) -> dict[str, Any]:
    """Random pixels for the images among a row's ids."""
    number = int((ids == tiny.IMAGE_TOKEN).sum()) // tiny.image_tokens("llava_36")
    return tiny.images("llava_36", number, seed=int(ids.sum())) if number else {}


@other_configs
@examples(3)
@given(budget=budgets, data=st.data(), rows=st.integers(2, 3), seed=strategies.seeds)
def test_a_row_padded_on_any_side_is_as_alone(
    config: CompressionConfig, budget: Any, data: st.DataObject, rows: int, seed: int
) -> None:
    """In plain forwards, prompts and turns padded on the left or right give logits and columns of the row alone."""
    config = with_budget(config, budget)
    plan = data.draw(conversations(rows))
    ids = [
        [tiny.token_ids(1, count, seed + 10 * number + row)[0] for row, (count, _) in enumerate(forward)]
        for number, forward in enumerate(plan)
    ]
    if config.reducer is not None:
        ids[0] = [with_images(row, data.draw(st.integers(0, 2))) for row in ids[0]]
    sides = [[left for _, left in forward] for forward in plan]
    require_rows_alone(tiny.model(model_for(config)), config, ids, sides, images_of)


@pytest.mark.parametrize("allocator", strategies.allocators(), ids=strategies.label)
@examples(4)
@given(budget=budgets, data=st.data(), rows=st.integers(2, 3), seed=strategies.seeds)
def test_without_rounding_a_row_keeps_exactly_what_it_keeps_alone(
    allocator: Any, budget: Any, data: st.DataObject, rows: int, seed: int
) -> None:
    """With scores that do not depend on the batch there is no tie to except."""
    config = strategies.config_with(allocator, scorer=Scripted(seed=seed))
    config = with_budget(config, budget)
    plan = data.draw(conversations(rows))
    ids = [[tiny.token_ids(1, count, seed + row)[0] for row, (count, _) in enumerate(forward)] for forward in plan]
    model = tiny.model(model_for(config))
    together = talked(model, config, ids, [[left for _, left in forward] for forward in plan])
    for row, found in enumerate(together):
        (alone,) = talked(model, config, [[forward[row]] for forward in ids], [[False]] * len(ids))
        assert found.held == alone.held
        torch.testing.assert_close(found.logits, alone.logits, rtol=0, atol=2e-5)
