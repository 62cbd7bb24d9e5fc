"""Selection: budgets are met to the slot, the protected survive, and decode steps evict by the rule that was chosen."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcompress import EVICTORS, Budget, CompressedCache, CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Evictor
from kvcompress.policies.context import DecodeContext, SelectionContext
from kvcompress.policies.evictors import TopK
from kvcompress.testing.running import require_protected, require_within_budget, started, stepped
from tests import oracles, strategies, tiny
from tests.operations import Operations
from tests.reference import Reference, held
from tests.strategies import Scripted, examples, generator, selection_contexts

every_evictor = pytest.mark.parametrize("evictor", strategies.evictors(), ids=strategies.label)
# The evictors whose rules the plain lists know.
known = [evictor for evictor in strategies.evictors() if evictor.name in ("topk", "streaming")]


# -- one selection -----------------------------------------------------------------------------------------------------


@every_evictor
@given(data=st.data())
def test_a_selection_never_waits_for_the_device(evictor: Evictor, data: st.DataObject) -> None:
    """Nothing that only the device knows is asked for, and a layer is sorted once, or for each of several keys."""
    layer = data.draw(selection_contexts())
    with Operations() as operations:
        evictor.select(layer)
    assert operations.syncs == 0
    sorts = {"chunk": 4, "critical": 2}.get(evictor.name, 1)
    assert operations.counts["argsort"] + operations.counts["sort"] <= sorts
    assert sorts > 1 or operations.number <= 10


@pytest.mark.parametrize("evictor", [e for e in strategies.evictors() if e.frees == "chosen"], ids=strategies.label)
@given(layer=selection_contexts(), unscored=st.sampled_from([0.0, 0.3, 1.0]), seed=strategies.seeds)
def test_a_decode_step_frees_the_lowest_score_or_the_oldest_without_one(
    evictor: Evictor, layer: SelectionContext, unscored: float, seed: int
) -> None:
    """Slots without a score are safe while one with a score may go; asks the device nothing."""
    assume(bool((layer.valid & ~layer.protected).any(-1).all()))
    nameless = torch.rand(layer.importance.shape[0], 1, layer.importance.shape[2], generator=generator(seed)) < unscored
    importance = layer.importance.masked_fill(nameless, torch.nan)
    with Operations() as operations:
        victims = evictor.victim(DecodeContext(layer.index, layer.protected, importance))
    assert operations.syncs == 0 and operations.number <= 10
    score = importance if evictor.granularity == "head" else importance.mean(1, keepdim=True)
    for row, sets in enumerate(victims.tolist()):
        for one, victim in enumerate(sets):
            own = one if layer.valid.shape[1] > 1 else 0
            scores, index = score[row, one if score.shape[1] > 1 else 0].tolist(), layer.index[row, own].tolist()
            free = [s for s in range(len(index)) if index[s] >= 0 and not layer.protected[row, own, s]]
            scored = [s for s in free if not math.isnan(scores[s])]
            expected = min(scored, key=lambda s: scores[s]) if scored else min(free, key=lambda s: index[s])
            assert victim == expected


@every_evictor
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=4), recents=st.integers(0, 40)
)
def test_what_is_pinned_is_known_for_all_rows_at_once(
    evictor: Evictor, rows: list[tuple[int, int]], recents: int
) -> None:
    """Each row as it would be alone, never more than it keeps; the paper's fixed point, or the sinks."""
    kept, sinks = (torch.tensor(position) for position in zip(*rows, strict=True))
    pinned = evictor.pinned(kept, sinks, recents)
    assert pinned.shape == kept.shape
    for (own_kept, own_sinks), found in zip(rows, pinned.tolist(), strict=True):
        expected = own_sinks
        if getattr(evictor, "decode", None) == "fixed_point":
            distance = max(25, recents)
            expected = own_kept - distance if own_kept > distance else min(own_kept // 2, max(0, own_kept - recents))
        assert found == expected


@pytest.mark.parametrize("granularity", ["layer", "head"])
@given(layer=selection_contexts())
def test_topk_keeps_the_highest_scores(granularity: str, layer: SelectionContext) -> None:
    """No slot that may go and stays scores less than one that goes; of equal slots, the one stored first stays."""
    batch, sets, slots = layer.valid.shape
    assume(sets == 1)  # heads that hold different tokens have no common slots to rank
    mask = EVICTORS.create("topk", granularity=granularity).select(layer)
    score = layer.importance if granularity == "head" else layer.importance.mean(1, keepdim=True)
    for row in range(batch):
        for kept, scores in zip(mask[row].tolist(), score[row].tolist(), strict=True):
            protected, valid = layer.protected[row, 0].tolist(), layer.valid[row, 0].tolist()
            ranked = sorted((not protected[slot], -scores[slot], slot) for slot in range(slots) if valid[slot])
            best = {slot for *_, slot in ranked[: int(layer.budget[row])]}
            assert {slot for slot in range(slots) if kept[slot]} == best


@pytest.mark.parametrize("granularity", ["layer", "head"])
@given(layer=selection_contexts(), first=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_critical_spends_a_share_by_importance_and_the_rest_by_the_product(
    granularity: str, layer: SelectionContext, first: float
) -> None:
    """Of what the protected leave, floor(first x rest) go by score, the others by (score + epsilon) x norm."""
    assume(layer.valid.shape[1] == 1)
    mask = EVICTORS.create("critical", granularity=granularity, first=first, epsilon=0.5).select(layer)
    product = (layer.importance + 0.5) * layer.value_norms
    score = layer.importance
    if granularity == "layer":
        score, product = score.mean(1, keepdim=True), product.mean(1, keepdim=True)
    for row in range(mask.shape[0]):
        for kept, scores, products in zip(mask[row].tolist(), score[row].tolist(), product[row].tolist(), strict=True):
            held = [slot for slot, valid in enumerate(layer.valid[row, 0].tolist()) if valid]
            chosen = [slot for slot in held if layer.protected[row, 0, slot]]
            rest = int(layer.budget[row]) - len(chosen)
            loose = sorted((s for s in held if s not in chosen), key=lambda s: (-scores[s], s))
            early, late = loose[: math.floor(first * rest + 1e-6)], loose[math.floor(first * rest + 1e-6) :]
            late = sorted(late, key=lambda s: -products[s])[: rest - len(early)]  # ties in the order of the scores
            assert {slot for slot, stays in enumerate(kept) if stays} == {*chosen, *early, *late}


@given(layer=selection_contexts())
def test_streaming_keeps_the_latest(layer: SelectionContext) -> None:
    """Beyond the protected, tokens that stay come after all that go."""
    mask = EVICTORS.create("streaming").select(layer)
    free = layer.valid & ~layer.protected
    gone = layer.index.masked_fill(~(free & ~mask), -1).amax(-1)
    stay = layer.index.masked_fill(~(free & mask), 10**6).amin(-1)
    assert (gone < stay).all()


@every_evictor
@given(
    recent=st.integers(0, 40),
    distance=st.integers(1, 40),
    sink=st.integers(0, 40),
)
def test_recents_past_the_reach_of_the_decode_rule_are_refused(
    evictor: Evictor, recent: int, distance: int, sink: int
) -> None:
    """A configuration whose decode steps would evict recents cannot be made, and the error says what to change."""
    if "distance" in type(evictor).model_fields:
        evictor = type(evictor)(**{**dict(evictor), "distance": distance})
    fields = {"budget": Budget(fraction=0.5, sink=sink, recent=recent), "scorer": Scripted(), "evictor": evictor}
    if evictor.reach is not None and recent > evictor.reach:
        with pytest.raises(ConfigError, match=f"{recent} recents"):
            CompressionConfig(**fields)
    else:
        assert CompressionConfig(**fields).budget.recent == recent


@pytest.mark.parametrize("recent", [25, 26, 60])
def test_the_fixed_point_lies_before_all_recents(recent: int) -> None:
    """It is 25 slots before the end as in the paper's code, or further where more recents are protected."""
    evictor = TopK()
    CompressionConfig(budget=Budget(fraction=0.5, recent=recent), scorer="attention", evictor=evictor)
    pinned = evictor.pinned(torch.tensor([1000]), torch.tensor([1]), recent)
    assert pinned.tolist() == [1000 - max(25, recent)]


# -- a running cache ---------------------------------------------------------------------------------------------------


@st.composite
def budgets(draw: st.DrawFn, recent: int = 5) -> Budget:
    """Fractions that are exact in binary, and numbers of tokens; with sinks and recents."""
    protected = {"sink": draw(st.integers(0, 4)), "recent": draw(st.integers(0, recent))}
    fraction = st.sampled_from([0.125, 0.25, 0.375, 0.5, 0.75, 1.0])
    amount = draw(st.one_of(st.builds(dict, fraction=fraction), st.builds(dict, tokens=st.integers(1, 24))))
    return Budget(**amount, **protected)


@every_evictor
@examples(6)
@given(
    budget=budgets(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    distance=st.integers(5, 12),
    steps=st.integers(1, 12),
    seed=strategies.seeds,
)
def test_sinks_and_recents_survive_every_step(
    evictor: Evictor, budget: Budget, lengths: list[int], distance: int, steps: int, seed: int
) -> None:
    """After the prompt and after every decode step, every layer and head holds each row's first and last tokens."""
    if "distance" in type(evictor).model_fields:
        evictor = type(evictor)(**{**dict(evictor), "distance": distance})
    cache, valid = started(
        tiny.model("llama"), strategies.config_with(evictor, budget=budget, scorer=Scripted(seed=seed)), lengths, seed
    )
    for number in range(steps + 1):
        require_protected(cache, valid)
        if number < steps:
            valid = stepped(tiny.model("llama"), cache, valid, seed + number)


@pytest.mark.parametrize("evictor", known, ids=strategies.label)
@pytest.mark.parametrize("allocator", ["uniform", "prefix"])
@examples(8)
@given(
    budget=budgets(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    forwards=st.lists(st.sampled_from([1, 1, 1, 1, 4]), min_size=1, max_size=10),
    distance=st.integers(5, 12),
    seed=strategies.seeds,
)
def test_a_running_cache_holds_what_plain_lists_hold(
    evictor: Evictor,
    allocator: str,
    budget: Budget,
    lengths: list[int],
    forwards: list[int],
    distance: int,
    seed: int,
) -> None:
    """Through a padded prompt, decode steps and turns, every layer and head holds the positions that the rules name."""
    if "distance" in type(evictor).model_fields:
        evictor = type(evictor)(**{**dict(evictor), "distance": distance})
    by_head = getattr(evictor, "granularity", "layer") == "head"
    if allocator == "prefix" and by_head:
        assume(4 not in forwards)  # how heads with different tokens are compared is not the matter here
    scorer = Scripted(seed=seed)
    config = CompressionConfig(budget=budget, scorer=scorer, allocator=allocator, evictor=evictor)
    cache, valid = started(tiny.model("llama"), config, lengths, seed)
    rows = [oracles.PlainRow(config, layers=3, heads=2, score=scorer.at) for _ in lengths]
    for row, row_valid in zip(rows, valid.tolist(), strict=True):
        row.forward(row_valid, recording=False)
    for number, tokens in enumerate([0, *forwards]):
        if tokens:
            valid = stepped(tiny.model("llama"), cache, valid, seed + number, tokens)
            for row in rows:
                row.forward([True] * tokens, recording=False)
        expected = [[row.layers[layer].held for row in rows] for layer in range(3)]
        assert alike(held(cache), expected)


def alike(found: list[list[list[list[int]]]], expected: list[list[list[list[int]]]]) -> bool:
    """Whether positions are the same, where one set may stand for all heads."""
    for found_row, expected_row in zip(chain(*found), chain(*expected), strict=True):
        heads = max(len(found_row), len(expected_row))
        if found_row * (heads // len(found_row)) != expected_row * (heads // len(expected_row)):
            return False
    return True


@pytest.mark.parametrize("evictor", strategies.bounded_evictors(), ids=strategies.label)
@examples(8)
@given(
    budget=budgets(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    forwards=st.lists(st.sampled_from([1, 1, 1, 1, 4]), min_size=1, max_size=8),
    seed=strategies.seeds,
)
def test_no_layer_holds_more_than_the_budget(
    evictor: Evictor, budget: Budget, lengths: list[int], forwards: list[int], seed: int
) -> None:
    """After every forward the layers of a row together hold at most its budget, or the protected if they are more.

    Where they are cut in periods, they grow by as many tokens in between.
    """
    cache, valid = started(
        tiny.model("llama"), strategies.config_with(evictor, budget=budget, scorer=Scripted(seed=seed)), lengths, seed
    )
    for number, tokens in enumerate([0, *forwards]):
        if tokens:
            valid = stepped(tiny.model("llama"), cache, valid, seed + number, tokens)
        require_within_budget(cache, valid, more=evictor.cuts_every or 0 if number else 0)


@pytest.mark.parametrize("kept", [40, 26, 25, 12])
def test_the_papers_fixed_point(kept: int) -> None:
    """The first kept - 25 slots stay for good, half of them if fewer are kept; the rest leave by age."""
    config = CompressionConfig.preset("prefixkv", budget=kept, scorer=Scripted(), allocator="uniform")
    cache, valid = started(tiny.model("llama"), config, [60], seed=0)
    stay = kept - 25 if kept > 25 else kept // 2
    first = cache.report().positions(0, 0)
    model = list(first)
    for number in range(60):
        valid = stepped(tiny.model("llama"), cache, valid, seed=number)
        model = [*model[:stay], *model[stay + 1 :], 60 + number]
        assert cache.report().positions(0, 0) == model
    assert model == [*first[:stay], *range(120 - (kept - stay), 120)]


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("allocator", ["uniform", "prefix"])
@examples(6)
@given(
    fraction=st.sampled_from([0.2, 0.4, 0.7]),
    prompt_tokens=st.integers(2, 30),
    forwards=st.lists(st.sampled_from([[1, 1, 1, 1], [1], [2], [6]]), max_size=5).map(lambda parts: [*chain(*parts)]),
    seed=strategies.seeds,
)
def test_the_attention_scorer_ranks_by_the_probability_that_dense_attention_gives(
    allocator: str,
    window: int | None,
    reduce: str,
    granularity: str,
    fraction: float,
    prompt_tokens: int,
    forwards: list[int],
    seed: int,
) -> None:
    """After every scoring forward, no token that went had, but for rounding, more mass than one that stayed.

    Mass is summed over the queries of all scoring forwards, or the last few of the latest; "mean" divides it by the
    number of these queries that saw the token.
    """
    scorer = {"name": "attention", "reduce": reduce, "queries": "all" if window is None else f"window:{window}"}
    evictor = {"name": "topk", "granularity": granularity, "distance": 2}
    config = CompressionConfig(budget=fraction, scorer=scorer, allocator=allocator, evictor=evictor)
    cache, dense = CompressedCache(tiny.model("llama"), config), Reference("llama")
    mass, counted = [torch.zeros(2, 0, dtype=torch.double)] * 3, torch.zeros(0)
    for number, tokens in enumerate([prompt_tokens, *forwards]):
        before, past = held(cache) if number else [[[[]]]] * 3, dense.cache.get_seq_length()
        inputs = {"input_ids": tiny.token_ids(1, tokens, seed + number)}
        with torch.no_grad():
            tiny.model("llama")(**inputs, **tiny.with_cache(cache))
        dense.run(inputs, before)
        sees = torch.cat([torch.full((past,), tokens), torch.arange(tokens, 0, -1)])
        new = dense.attention_mass(window)
        padded = [torch.cat([layer, torch.zeros(2, tokens, dtype=torch.double)], dim=1) for layer in mass]
        if number and tokens == 1:  # a decode step scores nothing
            mass, counted = padded, torch.cat([counted, torch.zeros(1)])
            continue
        if window is None:
            mass = [old + layer[0] for old, layer in zip(padded, new, strict=True)]
            counted = torch.cat([counted, torch.zeros(tokens)]) + sees
        else:
            mass, counted = [layer[0] for layer in new], sees.clamp(max=min(window, tokens))
        after, seen = held(cache), past + tokens
        for layer in range(3):
            score = mass[layer] if reduce == "sum" else mass[layer] / counted
            for head in range(2):
                rank_by = score[head] if granularity == "head" else score.mean(0)
                had, has = (set(state[layer][0][head if len(state[layer][0]) > 1 else 0]) for state in (before, after))
                had |= set(range(past, seen))
                least = min((float(rank_by[position]) for position in has - {0, seen - 1}), default=1e9)
                most = max((float(rank_by[position]) for position in had - has), default=-1e9)
                assert least >= most - 1e-4


@pytest.mark.parametrize("name", ["llama", "llama_mha"])
@pytest.mark.parametrize("quantizer", [None, {"name": "fp8", "group": 4, "residual": 8}], ids=["full", "fp8"])
@torch.no_grad()
def test_critical_is_shown_what_each_head_adds_to_the_output(name: str, quantizer: Any) -> None:
    """In every head of a real model, by dense attention and the values after each query head's part of o_proj."""
    tokens, recent = 60, 4
    evictor = {"name": "critical", "granularity": "head", "distance": 8}
    budget = Budget(tokens=20, sink=1, recent=recent)
    config = CompressionConfig(budget=budget, scorer="attention", evictor=evictor, quantizer=quantizer)
    inputs, cache, dense = tiny.inputs(name, tokens, seed=6), CompressedCache(tiny.model(name), config), Reference(name)
    tiny.model(name)(**inputs, **tiny.with_cache(cache))
    dense.run(inputs, [])
    for layer, mass in enumerate(dense.attention_mass()):
        values = dense.keys_and_values(layer)[1][0]
        parts = dense.layers[layer].o_proj.weight.unflatten(1, (-1, values.shape[2]))  # [hidden, heads, value_dim]
        group = parts.shape[1] // dense.kv_heads
        for head in range(dense.kv_heads):
            scores, own = mass[0, head].tolist(), parts[:, head * group : (head + 1) * group]
            norms = [float((own @ value).abs().sum(0).mean()) for value in values[head]]
            chosen = [0, *range(tokens - recent, tokens)]
            loose = sorted(set(range(tokens)) - set(chosen), key=lambda position: -scores[position])
            early, late = loose[:7], loose[7:]  # half of the 15 that sink and recents leave
            late = sorted(late, key=lambda position: -(scores[position] + 1e-4) * norms[position])[:8]
            assert sorted(held(cache)[layer][0][head]) == sorted([*chosen, *early, *late])
