"""Batches: each row of a padded batch keeps what it keeps alone, and gets the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import REDUCERS, Budget, CompressedCache, CompressionConfig
from tests import reference, strategies, tiny
from tests.reference import Held
from tests.strategies import Scripted, examples

# Each configuration goes one of two ways through a batch, in a longer search both.
some_configs, other_configs = (
    pytest.mark.parametrize("config", strategies.configs() if strategies.THOROUGH else strategies.configs()[half::2])
    for half in (0, 1)
)
budgets = st.sampled_from([0.1, 0.3, 0.5, 0.8, 4, 9, 15])


def with_budget(config: CompressionConfig, budget: Any) -> CompressionConfig:
    """The configuration with a drawn budget, unless it evicts nothing."""
    if config.evictor is None:
        return config
    return config.model_copy(update={"budget": Budget.parse(budget, default=config.budget)})


def blurred(config: CompressionConfig, seed: int) -> CompressionConfig:
    """The configuration with noise of up to 1e-5 on every score."""
    source = strategies.generator(seed)
    original = type(config.scorer)

    class Blurred(original):
        def score(self, layer):
            score = super().score(layer)
            noise = (torch.rand(score.shape, generator=source) - 0.5) * 2e-5
            return (score + noise).clamp(min=0.0) if self.mass else score + noise

    return config.model_copy(update={"scorer": Blurred(**dict(config.scorer))})


@dataclass
class Outcome:
    """What one row got: per forward, the indices of its tokens that every layer and head held after it, and logits."""

    held: list[list[list[list[int]]]] = field(default_factory=list)  # [forwards][layers][sets][tokens]
    logits: list[Tensor] = field(default_factory=list)  # at the row's last token
    tokens: list[int] = field(default_factory=list)

    def same_columns(self, other: Outcome) -> bool:
        """Whether the same tokens were held after every forward."""
        return self.held == other.held


def of_row(held: Held, row: int, valid: list[bool]) -> list[list[list[int]]]:
    """Columns of one row, counted from its own start."""
    index = {column: number for number, column in enumerate(c for c, is_token in enumerate(valid) if is_token)}
    # Heads that hold the same are written once, however they are stored.
    layers = [[[index[column] for column in columns] for columns in layer[row]] for layer in held]
    return [sets[:1] if all(columns == sets[0] for columns in sets) else sets for sets in layers]


def agree(found: Outcome, alone: Outcome, again: Callable[[], list[Outcome]]) -> None:
    """Asserts the law, but for a row that noise of 1e-5 on its scores, or on its logits, sends elsewhere.

    Args:
        found: what the row got in the batch.
        alone: what it got alone.
        again: what it got alone with noise on its scores; looked at only if something differs.
    """
    tokens = list(zip(found.tokens, alone.tokens, strict=True))
    if not found.same_columns(alone) or any(a != b for a, b in tokens):
        first = next((number for number, (a, b) in enumerate(tokens) if a != b), None)
        gap = 1.0
        if first is not None:
            best = alone.logits[first].topk(2).values
            gap = float(best[0] - best[1])
        near = gap < 1e-4 or any(not other.same_columns(alone) for other in again())
        event("near tie" if near else "no tie")
        assume(not near)
    assert found.held == alone.held
    assert found.tokens == alone.tokens
    torch.testing.assert_close(found.logits, alone.logits, rtol=0, atol=2e-5)


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

        agree(found, alone, again)


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
        agree(found, generated("llama", single, row)[0], list)


# -- plain forwards ----------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn, rows: int) -> list[list[tuple[int, bool]]]:
    """Forwards as (tokens, padded on the left) per row: a prompt, decode steps, and turns of two tokens or more."""
    later = st.lists(st.sampled_from([st.just(1), st.integers(2, 6)]), min_size=1, max_size=6)
    sizes = [st.integers(1, 24), *draw(later)]
    return [[(draw(size), draw(st.booleans())) for _ in range(rows)] for size in sizes]


def talked(config: CompressionConfig, ids: list[list[Tensor]], sides: list[list[bool]]) -> list[Outcome]:
    """Plain forwards of padded batches.

    Args:
        config: the policies.
        ids: tokens per forward and row; images among them are made up from the row's ids.
        sides: whether a row's padding comes first, likewise.
    """
    name, rows = model_for(config), range(len(ids[0]))
    model = tiny.model(name)
    cache, valid = CompressedCache(model, config), torch.zeros(len(ids[0]), 0, dtype=torch.bool)
    outcomes = [Outcome() for _ in rows]
    for tokens, lefts in zip(ids, sides, strict=True):
        longest = max(len(row) for row in tokens)
        new = torch.zeros(len(tokens), longest, dtype=torch.long)
        new_valid = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row in rows:
            start = longest - len(tokens[row]) if lefts[row] else 0
            new[row, start : start + len(tokens[row])] = tokens[row]
            new_valid[row, start : start + len(tokens[row])] = True
        valid = torch.cat([valid, new_valid], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -longest:]
        images = [
            tiny.images(name, int((row == tiny.IMAGE_TOKEN).sum()) // tiny.image_tokens(name), seed=int(row.sum()))
            for row in tokens
            if tiny.IMAGE_TOKEN in row
        ]
        seen = {"pixel_values": torch.cat([image["pixel_values"] for image in images])} if images else {}
        with torch.no_grad():
            logits = model(
                new, attention_mask=valid.long(), position_ids=positions, **tiny.with_cache(cache), **seen
            ).logits
        for row in rows:
            last = int(new_valid[row].nonzero()[-1])
            outcomes[row].logits.append(logits[row, last])
            outcomes[row].held.append(of_row(reference.held(cache), row, valid[row].tolist()))
    return outcomes


def with_images(ids: Tensor, number: int) -> Tensor:
    """A row with so many images in its midst, and text between them."""
    image = torch.tensor([tiny.IMAGE_TOKEN] * tiny.image_tokens("llava_36") + [7])
    return torch.cat([ids[: len(ids) // 2], *[image] * number, ids[len(ids) // 2 :]])


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
    together = talked(config, ids, [[left for _, left in forward] for forward in plan])
    for row, found in enumerate(together):
        own, no_padding = [[forward[row]] for forward in ids], [[False]] * len(ids)
        (alone,) = talked(config, own, no_padding)

        def again(own: list[list[Tensor]] = own, no_padding: list[list[bool]] = no_padding) -> list[Outcome]:
            if config.scorer is None:
                return []
            return [talked(blurred(config, number), own, no_padding)[0] for number in range(4)]

        agree(found, alone, again)


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
    together = talked(config, ids, [[left for _, left in forward] for forward in plan])
    for row, found in enumerate(together):
        (alone,) = talked(config, [[forward[row]] for forward in ids], [[False]] * len(ids))
        assert found.held == alone.held
        torch.testing.assert_close(found.logits, alone.logits, rtol=0, atol=2e-5)
