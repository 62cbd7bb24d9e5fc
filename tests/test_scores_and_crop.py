"""Scores belong to the tokens that are there: after a crop, and when decode steps choose what leaves."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompress import ALLOCATORS, Budget, CompressedCache, CompressionConfig
from kvcompress.errors import CacheStateError, ConfigError
from kvcompress.policies.allocators.prefix import Prefix
from tests import strategies, tiny, type_checker
from tests.reference import Reference, held

# -- crop --------------------------------------------------------------------------------------------------------------


class Seeing(Prefix):
    """Takes down the importance it is shown."""

    seen: ClassVar[list[Tensor]] = []

    def allocate(self, importance: Tensor, total: Any, floor: Any, capacity: Any, context: Any = None) -> Tensor:
        self.seen.append(importance.clone())
        return super().allocate(importance, total, floor, capacity, context)


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    ALLOCATORS.register("seeing")(Seeing)
    Seeing.seen.clear()
    return Seeing.seen


def forward(cache: CompressedCache, tokens: int, seed: int, batch: int = 2, of: int | None = None) -> Tensor:
    """The first of `of` random tokens."""
    with torch.no_grad():
        ids = tiny.token_ids(batch, of or tokens, seed)[:, :tokens]
        return tiny.model("llama")(ids, **tiny.with_cache(cache)).logits


# Scores that add up, that are replaced, that read queries, that read the other keys.
SCORERS: dict[str, Any] = {
    "sum": "attention",
    "mean": {"name": "attention", "reduce": "mean"},
    "stride": {"name": "attention", "queries": "stride:2"},
    "value_aware": "value_aware",
}
REPLACED: dict[str, Any] = {
    "window": {"name": "attention", "window": 6},
    "tova": "tova",
    "snapkv": {"name": "snapkv", "window": 4},
    "lagkv": "lagkv",
    "key_diff": "key_diff",
}


@torch.no_grad()
def test_what_comes_in_place_of_cropped_tokens_has_no_score_of_theirs() -> None:
    """Scores of a key are its own, so they may be cropped; what comes after has none yet, as if it came first."""
    cache, never = (CompressedCache(tiny.model("llama"), "tova", budget=1.0, scorer="key_norm") for _ in range(2))
    forward(cache, 30, seed=1)
    cache.crop(-5)
    forward(never, 25, seed=1, of=30)
    for each in (cache, never):
        for seed in (2, 3):
            forward(each, 1, seed=seed)
    for (index, importance), (other, expected) in zip(cache.ranked(), never.ranked(), strict=True):
        assert torch.equal(index, other) and torch.allclose(importance, expected, atol=1e-5)


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "plain"])
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_after_a_crop_importance_is_as_if_the_tokens_had_never_come(
    seeing: list[Tensor], scorer: Any, recording: bool
) -> None:
    """Or the crop is refused and nothing changes; not while the past is recorded, which is there to be undone."""
    for asked, removed in ((4, 4), (4, 2), (5, 1), (4, 6)):
        cache, never = (
            CompressedCache(tiny.model("llama"), "prefixkv", budget=1.0, scorer=scorer, allocator="seeing")
            for _ in range(2)
        )
        for each in (cache, never):
            forward(each, 25, seed=1)
            forward(each, 1, seed=2)
            forward(each, 1, seed=3)
        if recording:
            if removed > asked:
                continue
            cache.activate_past_recording()
        forward(cache, asked, seed=4)
        before = cache.report()
        try:
            cache.crop(-removed)
        except CacheStateError as error:
            assert not recording and "crop" in str(error) and cache.report() == before
            continue
        if removed < asked:
            forward(never, asked - removed, seed=4, of=asked)
        elif removed > asked:
            never.crop(asked - removed)  # decode steps, which give no scores
        forward(cache, 3, seed=5)
        cache.compress()  # what is recorded waits
        found = seeing[-1]
        forward(never, 3, seed=5)
        torch.testing.assert_close(found, seeing[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scorer", REPLACED.values(), ids=REPLACED)
def test_scores_that_the_next_forward_replaces_are_right_after_a_crop(seeing: list[Tensor], scorer: Any) -> None:
    cache, never = (
        CompressedCache(tiny.model("llama"), "uniform", budget=Budget(tokens=40), scorer=scorer) for _ in range(2)
    )
    for each in (cache, never):
        forward(each, 30, seed=1)
    cache.activate_past_recording()
    forward(cache, 4, seed=2)
    cache.crop(-4)
    for each in (cache, never):
        forward(each, 20, seed=3)
        each.compress()
    assert held(cache) == held(never)


@pytest.mark.parametrize("preset", ["prefixkv", "uniform", "h2o", "tova", "vlcache", "text"])
def test_a_draft_that_is_taken_back_has_no_say_in_what_stays(preset: str) -> None:
    """Assisted decoding: tokens that are not accepted leave no trace."""
    budget = Budget(tokens=24, sink=1, recent=2)
    cache, never = (CompressedCache(tiny.model("llama"), preset, budget=budget) for _ in range(2))
    for each in (cache, never):
        forward(each, 40, seed=1)
    for draft in range(6):
        cache.activate_past_recording()
        forward(cache, 6, seed=10 + draft)
        cache.crop(-4)
        never.activate_past_recording()
        forward(never, 2, seed=10 + draft, of=6)
        never.crop(0)
    assert held(cache) == held(never)


# -- decode steps ------------------------------------------------------------------------------------------------------


def lowest(importance: Tensor, columns: list[int], steps: int) -> list[int]:
    """What is left of scored columns after so many steps that free the lowest."""
    left = list(columns)
    for _ in range(steps):
        left.remove(min(left, key=lambda column: float(importance[column])))
    return left


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_decode_steps_free_what_has_the_lowest_importance(granularity: str) -> None:
    """As a prompt's selection ranks it: with `reduce="mean"`, mass over the number of queries that saw the token."""
    model, tokens, steps = tiny.model("llama"), 24, 6
    differ = []
    for seed in range(5):
        cache = CompressedCache(
            model,
            "uniform",
            budget=Budget(tokens=tokens, sink=0, recent=1),
            scorer={"name": "attention", "reduce": "mean"},
            evictor={"name": "topk", "granularity": granularity, "decode": "lowest_score"},
        )
        ids, reference = tiny.token_ids(1, tokens, seed), Reference("llama")
        reference.run({"input_ids": ids}, [])
        mass = reference.attention_mass()
        with torch.no_grad():
            model(ids, **tiny.with_cache(cache))
            for number in range(steps):
                model(tiny.token_ids(1, 1, seed=number), **tiny.with_cache(cache))
        queries = torch.arange(tokens, 0, -1)
        for layer, (row,) in enumerate(held(cache)):
            importance = mass[layer][0] / queries
            importance = importance.mean(0, keepdim=True) if granularity == "layer" else importance
            sets = row * len(importance) if len(row) == 1 else row
            for found, own in zip(sets, importance, strict=True):
                wanted = [*lowest(own, list(range(tokens)), steps), *range(tokens, tokens + steps)]
                if found != wanted:
                    differ.append((seed, layer))
    assert not differ


def test_decode_steps_ask_the_scorer_what_its_scores_mean() -> None:
    """Whatever `importance` makes of scores: here it turns their order around."""

    class Backwards(strategies.Scripted):
        name = "backwards"

        def importance(self, score: Tensor, queries: Tensor) -> Tensor:
            return self.highest - score

    scorer = Backwards(seed=3)
    evictor = {"name": "topk", "decode": "lowest_score"}
    budget = Budget(tokens=20, sink=0, recent=1)
    cache = CompressedCache(tiny.model("llama"), "uniform", budget=budget, scorer=scorer, evictor=evictor)
    forward(cache, 20, seed=1, batch=1)
    for number in range(6):
        forward(cache, 1, seed=number, batch=1)
    for layer, (row,) in enumerate(held(cache)):
        importance = scorer.highest - scorer.table(layer, 2, 20).mean(0)
        assert row[0] == [*lowest(importance, list(range(20)), 6), *range(20, 26)]


def test_an_empty_cache_has_nothing_to_rank() -> None:
    with pytest.raises(CacheStateError, match="holds nothing yet that could be ranked; read a prompt first"):
        CompressedCache(tiny.model("llama"), "prefixkv").ranked()


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        (
            "prefixkv",
            CompressionConfig.preset("cake"),
            "allocator entropy: reads the statistics attention_entropy, att",
        ),
        (
            "cake",
            CompressionConfig.preset("vlcache"),
            "allocator sparsity: reads .* did not take for its own allocator",
        ),
        (
            "prefixkv",
            CompressionConfig.preset("snapkv", allocator={"name": "adakv", "layers": "sparsity"}),
            "allocator adakv: reads the statistics attention_sparsity .* make the cache with the allocator adakv too",
        ),
        ("streaming", CompressionConfig.preset("prefixkv"), "allocator prefix: reads importance, .* has no scorer"),
        ("prefixkv", "h2o", "config: must be a CompressionConfig, such as CompressionConfig.preset.*; got 'h2o'"),
        ("prefixkv", None, "config: must be a CompressionConfig, .*; got None"),
    ],
    ids=["statistics", "others", "part", "importance", "name", "nothing"],
)
@torch.no_grad()
def test_sizes_by_another_allocator_want_what_it_reads(own: str, other: Any, says: str) -> None:
    cache = CompressedCache(tiny.model("llama"), own, budget=0.5)
    tiny.model("llama")(**tiny.inputs("llama", 30, seed=1), **tiny.with_cache(cache))
    with type_checker.off(), pytest.raises(ConfigError, match=says):
        cache.allocation_at(other)
    assert cache.allocation_at(cache.config.override(budget=1.0)).budgets.sum() == np.sum(cache.report().layer_lengths)


@torch.no_grad()
def test_sizes_at_a_budget_in_bytes_are_those_of_a_cache_with_it() -> None:
    model, config = tiny.model("llama"), CompressionConfig.preset("prefixkv", budget="4KiB")
    cache, fitting = (CompressedCache(model, "prefixkv", budget=given) for given in (1.0, config.budget))
    for one in (cache, fitting):
        model(**tiny.inputs("llama", 30, seed=1), **tiny.with_cache(one))
    assert cache.allocation_at(config).budgets[..., 0].tolist() == fitting.report().layer_lengths


@pytest.mark.parametrize("preset", ["prefixkv", "cake", "vlcache", "adakv", "streaming"])
@torch.no_grad()
def test_sizes_are_told_while_the_past_is_recorded(preset: str) -> None:
    """As a cache that records nothing gives them, and statistics are read as scores are; nothing changes by it."""
    model, config = tiny.model("llama"), CompressionConfig.preset(preset, budget=0.7)
    recording, compressed = (CompressedCache(model, config) for _ in range(2))
    recording.activate_past_recording()
    for cache in (recording, compressed):
        model(**tiny.inputs("llama", 80, seed=1), **tiny.with_cache(cache))
    before, report = recording.report(), compressed.report()
    sizes = recording.allocation_at(config).budgets
    held = report.layer_lengths if report.head_lengths is None else report.head_lengths
    assert sizes.reshape(np.shape(held)).tolist() == held
    assert recording.report() == before
