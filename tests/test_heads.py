"""Budgets per head: every head of every layer holds as many tokens as it was given, and no memory beyond that."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import ALLOCATORS, Budget, CompressedCache, CompressionConfig
from kvcompress.errors import ConfigError, PolicyError
from kvcompress.kernels import attend_blocks
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import AllocationContext, LayerContext, LayerWeights
from kvcompress.testing.running import forwards, require_masked, with_budget
from tests import oracles, strategies, tiny
from tests.reference import Reference
from tests.strategies import examples
from tests.test_physical_equals_masked import budgets, schedules

BY_HEAD = {
    "headprefix": {"name": "headprefix"},
    "headprefix on top": {"name": "headprefix", "protected": "on_top"},
    "adakv": {"name": "adakv"},
    "scores": {"name": "scores"},
    "adakv of prefix": {"name": "adakv", "layers": {"name": "prefix"}, "safeguard": 0.0},
}
every_allocator = pytest.mark.parametrize("allocator", BY_HEAD.values(), ids=BY_HEAD)


def of_heads(allocator: dict[str, Any], **policies: Any) -> CompressionConfig:
    """A configuration that sizes heads by their attention mass."""
    return CompressionConfig(**{"scorer": "attention", "evictor": "topk", "allocator": allocator, **policies})


def padded(lengths: list[int], seed: int, name: str = "llama") -> dict[str, Tensor]:
    """A prompt of rows with so many tokens, padding first."""
    prompt = tiny.inputs(name, max(lengths), seed, len(lengths))
    prompt["attention_mask"] = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return prompt


@every_allocator
@pytest.mark.parametrize("decode", ["fixed_point", "oldest", "lowest_score", "none"])
@examples(4)
@given(
    budget=budgets,
    recent=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    schedule=schedules,
    seed=strategies.seeds,
)
def test_every_forward_equals_masked_attention(
    allocator: dict[str, Any],
    decode: str,
    budget: Any,
    recent: int,
    lengths: list[int],
    schedule: list[int],
    seed: int,
) -> None:
    """Prompt, decode steps and turns of a left-padded batch: each head attends over what it holds, and stores that."""
    config = of_heads(allocator, evictor={"name": "topk", "decode": decode, "distance": 3})
    cache = CompressedCache(tiny.model("llama"), with_budget(config, budget, recent=recent))
    require_masked(
        Reference("llama"), cache, forwards(tiny.model("llama"), cache, padded(lengths, seed), [*schedule, 1, 1], seed)
    )


@torch.no_grad()
@every_allocator
def test_heads_may_hold_nothing(allocator: dict[str, Any]) -> None:
    """A budget of no tokens leaves every head empty until the next token comes."""
    model = tiny.model("llama")
    cache = CompressedCache(model, of_heads(allocator, budget=Budget(fraction=0.1, sink=0, recent=0)))
    model(tiny.token_ids(2, 1, seed=1), **tiny.with_cache(cache))
    assert cache.report().head_lengths == [[[0, 0]] * 2] * 3
    for seed in range(12):
        assert model(tiny.token_ids(2, 1, seed), **tiny.with_cache(cache)).logits.isfinite().all()
    model(tiny.token_ids(2, 9, seed=13), **tiny.with_cache(cache))
    assert sum(sum(sum(row) for row in layer) for layer in cache.report().head_lengths) == 2 * 2 * int(0.1 * 22 * 3)


EVICTORS = ["topk", "chunk", "critical", "streaming"]


@pytest.mark.parametrize("evictor", EVICTORS)
@examples(3)
@given(budget=budgets, lengths=st.lists(st.integers(1, 24), min_size=1, max_size=2), seed=strategies.seeds)
def test_every_evictor_selects_for_heads(evictor: str, budget: Any, lengths: list[int], seed: int) -> None:
    """An evictor sees each head as a row, so that it need not know of budgets per head."""
    cache = CompressedCache(tiny.model("llama"), with_budget(of_heads(BY_HEAD["headprefix"], evictor=evictor), budget))
    require_masked(
        Reference("llama"), cache, forwards(tiny.model("llama"), cache, padded(lengths, seed), [1, 3, 1, 1], seed)
    )


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_equals_masked_attention(name: str) -> None:
    """With grouped and ungrouped heads, and with images in the prompt."""
    cache = CompressedCache(tiny.model(name), of_heads(BY_HEAD["adakv"], budget=0.4))
    require_masked(
        Reference(name), cache, forwards(tiny.model(name), cache, tiny.inputs(name, 20, seed=1), [1, 1, 4, 1], seed=2)
    )


@torch.no_grad()
@pytest.mark.parametrize("skew", [10, 100])
def test_heads_hold_their_sum_and_no_more(skew: int) -> None:
    """Of heads of which one keeps `skew` times what the others keep, a layer stores the sum, a slot more for each."""
    layers, heads, tokens = 3, 2, 400
    shares = [0.5 / skew] * layers * heads
    shares[::heads] = [0.5] * layers
    config = of_heads({"name": "profile", "retention": shares, "heads": heads}, budget=sum(shares) / len(shares))
    model, prompt = tiny.model("llama"), tiny.inputs("llama", tokens, seed=3, batch=2)
    cache = CompressedCache(model, config)
    model(**prompt, **tiny.with_cache(cache))
    said, slot = cache.report(), 2 * 8 * 4  # bytes of a key and a value of one head
    assert said.head_lengths == [[[200, 200 // skew]] * 2] * layers
    assert said.kv_bytes == layers * 2 * (200 + 200 // skew + heads) * slot
    assert said.layer_lengths == [[round((200 + 200 // skew) / 2)] * 2] * layers
    for step in range(20):  # what is generated comes out of the same memory
        model(tiny.token_ids(2, 1, seed=step), **tiny.with_cache(cache))
    now = cache.report()
    assert now.kv_bytes <= 1.2 * said.kv_bytes and now.retention == pytest.approx(said.retention, abs=0.01)


def uneven_layer(scorer: Scorer, seed: int) -> LayerContext:
    """Two rows whose heads hold 9 and 4, and 7 and 2 older tokens, right after five new ones, and three."""
    g, heads, width = strategies.generator(seed), 2, 8
    held, new, fresh = torch.tensor([[9, 4], [7, 2]]), 5, torch.tensor([5, 3])
    place = torch.arange(9)
    older = (place * 2).expand(2, heads, -1).masked_fill(place >= held.unsqueeze(-1), -1)
    late = (torch.arange(new) - (new - fresh[:, None]))[:, None].expand(-1, heads, -1)
    index = torch.cat([older, torch.where(late >= 0, late + 30, -1)], 2)
    query = torch.randn(2, 2 * heads, new, width, generator=g)
    keys, values = (torch.randn(2, heads, 9 + new, width, generator=g) for _ in range(2))
    valid = index >= 0
    _, lse = attend_blocks(query, [(keys, values)], 9, 0.35, valid, True)
    weights = LayerWeights(torch.randn(16, 2 * heads * width, generator=g), 0.5 ** torch.arange(width // 2))
    seen = 30 + fresh
    lse = lse if scorer.reads_attention else None
    return LayerContext(0, query, keys, values, lse, 0.35, index, seen, valid, weights=weights, heads_part=True)


def head_alone(layer: LayerContext, head: int) -> LayerContext:
    """One key/value head of a layer as a layer of its own."""
    of_queries, columns = slice(2 * head, 2 * head + 2), slice(16 * head, 16 * head + 16)
    weights = replace(layer.weights, output=layer.weights.output[:, columns])
    own = {name: getattr(layer, name)[:, head : head + 1] for name in ("keys", "values", "index", "valid")}
    lse = None if layer.lse is None else layer.lse[:, of_queries]
    return replace(layer, query=layer.query[:, of_queries], lse=lse, weights=weights, **own)


OVER_ALL_HEADS = ("leverage", "random")  # by design: standardised over the heads of a layer, drawn by a head's number


@pytest.mark.parametrize("scorer", strategies.scorers(), ids=strategies.label)
@examples(4)
@given(seed=strategies.seeds)
def test_a_head_is_scored_by_what_it_holds(scorer: Scorer, seed: int) -> None:
    """Of heads that hold different numbers of tokens, each is scored as if the layer had no other head."""
    layer = uneven_layer(scorer, seed)
    found = scorer.score(layer)
    assert found.shape == layer.index.shape and found.isfinite().all()
    if scorer.name in OVER_ALL_HEADS or (scorer.name == "defensive" and scorer.projected):
        return
    for head in range(2):
        alone = head_alone(layer, head)
        wanted = scorer.score(alone)[:, 0]
        torch.testing.assert_close(found[:, head][alone.valid[:, 0]], wanted[alone.valid[:, 0]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@every_allocator
def test_a_saved_cache_goes_on_as_if_it_had_not_been(allocator: dict[str, Any], tmp_path: Path) -> None:
    """What heads hold is kept with their numbers; rows can be taken, repeated and dropped, drafts taken back."""
    model, prompt = tiny.model("llama"), padded([21, 13], seed=4)
    cache = CompressedCache(model, of_heads(allocator, budget=0.4))
    model(**prompt, position_ids=(prompt["attention_mask"].cumsum(1) - 1).clamp(min=0), **tiny.with_cache(cache))
    for seed in range(3):
        model(tiny.token_ids(2, 1, seed), **tiny.with_cache(cache))
    cache.save(tmp_path / "saved")
    loaded = CompressedCache.load(model, tmp_path / "saved")
    assert loaded.report() == cache.report()
    other = copy.deepcopy(cache)
    for one in (cache, loaded, other):  # a draft that is taken back
        one.activate_past_recording()
        model(tiny.token_ids(2, 3, seed=20), **tiny.with_cache(one))
        one.crop(-3)
    swapped = copy.deepcopy(cache)
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    for seed in range(5, 9):
        ids = tiny.token_ids(2, 1, seed)
        wanted = model(ids, **tiny.with_cache(cache)).logits
        for one in (loaded, other):
            torch.testing.assert_close(model(ids, **tiny.with_cache(one)).logits, wanted, rtol=0, atol=1e-5)
        found = model(ids[[1, 0, 1]], **tiny.with_cache(swapped)).logits
        torch.testing.assert_close(found, wanted[[1, 0, 1]], rtol=0, atol=1e-5)
    lengths = torch.tensor(cache.report().head_lengths)
    assert lengths.shape == (3, 2, 2) and torch.tensor(swapped.report().head_lengths).equal(lengths[:, [1, 0, 1]])


@examples(10)
@given(given=strategies.allocation_inputs(kinds=st.just("random"), min_tokens=2), seed=strategies.seeds)
def test_headprefix_leaves_no_head_worse_than_it_must(given: strategies.AllocationInput, seed: int) -> None:
    """No other sizes with the same total give the head that retains least a larger share of its mass."""
    layers, batch = given.floor.shape
    importance = torch.stack([given.importance, given.importance.flip(-1).square()], 2)  # two heads that differ
    capacity, floor = (torch.stack([counts, counts], 2) for counts in (given.capacity, given.capacity * 0))
    total = given.total.clamp(min=0).minimum(capacity.sum((0, 2)))
    budget = ALLOCATORS.create("headprefix").allocate(importance, total, floor, capacity)
    assert budget.shape == (layers, batch, 2) and budget.sum((0, 2)).tolist() == total.tolist()
    retained = retained_mass(importance, budget)
    g = strategies.generator(seed)
    for _ in range(20):  # moves of a few slots between heads
        other = budget.clone().flatten()
        give, take = torch.randperm(other.numel(), generator=g)[:2].tolist() if other.numel() > 1 else (0, 0)
        moved = min(int(other[give]), int(capacity.flatten()[take] - other[take]), 2)
        other[give] -= moved
        other[take] += moved
        other = other.view(budget.shape)
        same_row = other.sum((0, 2)) == total
        worst, before = (share.amin((0, 2)) for share in (retained_mass(importance, other), retained))
        assert (worst[same_row] <= before[same_row] + 1e-6).all()


def retained_mass(importance: Tensor, budget: Tensor) -> Tensor:
    """Share of its mass that each head's best slots hold."""
    ranked = importance.sort(-1, descending=True).values
    kept = torch.arange(ranked.shape[-1]) < budget.unsqueeze(-1)
    return (ranked * kept).sum(-1) / ranked.sum(-1).clamp(min=1e-30)


def test_one_head_per_layer_is_prefix() -> None:
    """With one head each, heads are layers."""
    importance, floor = torch.rand(4, 2, 9, generator=strategies.generator(1)), torch.ones(4, 2, dtype=torch.long)
    asked = importance, torch.tensor([17, 20]), floor, floor * 9
    budgets = [ALLOCATORS.create(name).allocate(*asked) for name in ("prefix", "headprefix")]
    assert budgets[0].equal(budgets[1])


@pytest.mark.parametrize("protected", ["floor", "on_top"])
@pytest.mark.parametrize("even", [0.0, 0.4, 1.0])
@examples(12)
@given(given=strategies.allocation_inputs(kinds=st.just("dyadic"), max_tokens=16))
def test_headprefix_ranks_the_heads_of_all_layers_together(
    even: float, protected: str, given: strategies.AllocationInput
) -> None:
    """With exact shares, as brute force has it: an even part for every head first, then ranks by layer, head, rank."""
    asked = given.with_heads()
    headprefix = ALLOCATORS.create("headprefix", even=even, protected=protected)
    budget = headprefix.allocate(asked.importance, asked.total, asked.floor, asked.capacity)
    for row, total in enumerate(asked.total.tolist()):
        masses = asked.importance[:, row].flatten(0, 1).tolist()
        floor, capacity = asked.floor[:, row].flatten().tolist(), asked.capacity[:, row].flatten().tolist()
        wanted = oracles.prefix_budgets(masses, total, floor, capacity, protected, even)
        assert budget[:, row].flatten().tolist() == wanted


def test_adakv_gives_a_layer_to_its_highest_scores() -> None:
    """By hand: four slots of a layer after one for each head in safety, and what is protected in any case."""
    importance = torch.tensor([[9.0, 8.0, 7.0, 1.5, 1.0], [6.0, 2.0, 1.0, 0.5, 0.1]]).view(1, 1, 2, 5)
    total, none, five = torch.tensor([6]), torch.zeros(1, 1, 2, dtype=torch.long), torch.full((1, 1, 2), 5)
    adakv = ALLOCATORS.create("adakv", safeguard=0.0)
    assert adakv.allocate(importance, total, none, five).tolist() == [[[4, 2]]]
    assert adakv.allocate(importance, torch.tensor([4]), none, five).tolist() == [[[3, 1]]]
    assert adakv.allocate(importance, torch.tensor([2]), none, five).tolist() == [[[2, 0]]]
    half = ALLOCATORS.create("adakv", safeguard=0.9)
    assert half.allocate(importance, torch.tensor([4]), none, five).tolist() == [[[3, 1]]]
    protected = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    protected[..., 1, 3:] = True
    said = adakv.allocate(importance, torch.tensor([4]), none, five, AllocationContext(protected=protected))
    assert said.tolist() == [[[2, 2]]]


@examples(20)
@given(given=strategies.allocation_inputs(kinds=st.just("random")), safeguard=st.sampled_from([0.0, 0.5]))
def test_scores_keep_the_highest_wherever_they_are(given: strategies.AllocationInput, safeguard: float) -> None:
    """By one sorted list of the scores of all heads of all layers, after what each head has in any case."""
    importance = torch.stack([given.importance, given.importance.flip(-1) * 3], 2)  # two heads that differ
    floor, capacity = (torch.stack([counts, counts], 2) for counts in (given.floor, given.capacity))
    total = torch.minimum(torch.maximum(given.total, floor.sum((0, 2))), capacity.sum((0, 2)))
    budget = ALLOCATORS.create("scores", safeguard=safeguard).allocate(importance, total, floor, capacity)
    for row, slots in enumerate(total.tolist()):
        heads = [head for layer in importance[:, row] for head in layer.sort(-1, descending=True).values.tolist()]
        least, most = floor[:, row].flatten().tolist(), capacity[:, row].flatten().tolist()
        even = int(safeguard * slots / len(heads))
        safe = [max(low, min(high, even)) for low, high in zip(least, most, strict=True)]
        safe = safe if sum(safe) <= slots else least
        loose = sorted(
            ((-score, unit) for unit, head in enumerate(heads) for score in head[safe[unit] : most[unit]]),
        )
        wanted = [kept + sum(unit == own for _, own in loose[: slots - sum(safe)]) for unit, kept in enumerate(safe)]
        assert budget[:, row].flatten().tolist() == wanted


def test_scores_put_the_protected_before_all_others() -> None:
    """By hand: two of a head whose scores are low stand for two slots, whatever the other head's scores."""
    importance = torch.tensor([[[[5.0, 4.0, 3.0, 2.0, 1.0], [0.1] * 5]]])
    none, five, protected = torch.zeros(1, 1, 2, dtype=torch.long), torch.full((1, 1, 2), 5), importance < 0
    allocate, total = ALLOCATORS.create("scores").allocate, torch.tensor([4])
    assert allocate(importance, total, none, five, AllocationContext(protected=protected)).tolist() == [[[4, 0]]]
    protected[..., 1, 3:] = True
    assert allocate(importance, total, none, five, AllocationContext(protected=protected)).tolist() == [[[2, 2]]]


def test_duo_fills_retrieval_heads_in_the_order_of_their_gates() -> None:
    """By hand: every head streams, then the highest gate is filled, and the next as far as the total goes."""
    duo = ALLOCATORS.create("duo", gates=[[0.1, 0.9], [0.5, 0.2]], streaming=2)
    floor, capacity = torch.ones(2, 1, 2, dtype=torch.long), torch.full((2, 1, 2), 10)
    for total, wanted in (
        (4, [[1, 1], [1, 1]]),
        (12, [[3, 3], [3, 3]]),
        (19, [[3, 10], [3, 3]]),
        (22, [[3, 10], [6, 3]]),
    ):
        found = duo.allocate(torch.zeros(2, 1, 2, 10), torch.tensor([total]), floor, capacity)
        assert found[:, 0].tolist() == wanted, total


LAYERS, HEADS = "layers 4 instead of 3", "kv_heads 3 instead of 2"
GATES = "the gates are of {} layers with {} heads, the model has 3 with 2"
OF_ANOTHER_MODEL: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "duo", "gates": [[0.5]] * 4}, f"allocator duo: .*{LAYERS}", GATES.format(4, 1)),
    ({"name": "duo", "gates": [[0.5] * 3] * 3}, f"allocator duo: .*{HEADS}", GATES.format(3, 3)),
    ({"name": "duo", "gates": [[0.5] * 3] * 4}, f"allocator duo: .*{LAYERS}, {HEADS}", GATES.format(4, 3)),
    ({"name": "profile", "retention": [0.5] * 4}, f"profile: .*{LAYERS}", "has 4 layers, the model has 3"),
    ({"name": "profile", "retentions": [[0.5] * 4]}, f"profile: .*{LAYERS}", "has 4 layers, the model has 3"),
    (
        {"name": "profile", "retention": [0.5] * 9, "heads": 3},
        f"profile: .*{HEADS}",
        "has 3 layers of 3 heads, the model has 3 of 2",
    ),
    (
        {"name": "profile", "retentions": [[0.5] * 8], "heads": 2},
        f"profile: .*{LAYERS}",
        "has 4 layers of 2 heads, the model has 3 of 2",
    ),
]


@pytest.mark.parametrize(
    ("allocator", "says", "late"), OF_ANOTHER_MODEL, ids=[str(one) for one, *_ in OF_ANOTHER_MODEL]
)
def test_sizes_of_another_model_are_refused_when_the_cache_is_made(
    allocator: dict[str, Any], says: str, late: str
) -> None:
    """And by the allocator itself, whoever calls it."""
    model, config = tiny.build("llama"), of_heads(allocator, budget=0.5, evictor="streaming")
    with pytest.raises(ConfigError, match=rf"{says}.*;"):
        CompressedCache(model, config)
    assert model.config._attn_implementation == "sdpa"  # untouched
    capacity = torch.full((3, 1, 2) if config.allocator.by_head else (3, 1), 10)
    with pytest.raises(PolicyError, match=late):
        config.allocator.allocate(torch.zeros(*capacity.shape, 10), torch.tensor([15]), 0 * capacity, capacity)


@pytest.mark.parametrize(
    "allocator",
    [
        {"name": "duo", "gates": [[0.5]] * 3},
        {"name": "duo", "gates": [[0.5, 0.1]] * 3},
        {"name": "profile", "retention": [0.5] * 3},
        {"name": "profile", "retentions": [[0.5] * 6], "heads": 2},
    ],
    ids=str,
)
def test_sizes_of_this_model_are_taken(allocator: dict[str, Any]) -> None:
    cache = CompressedCache(tiny.model("llama"), of_heads(allocator, budget=0.5, evictor="streaming"))
    tiny.model("llama")(tiny.token_ids(1, 9, seed=1), **tiny.with_cache(cache))
    assert cache.report().retention <= 0.5


def test_a_part_of_another_model_is_refused_when_the_cache_is_made() -> None:
    layers = {"name": "profile", "retention": [0.5] * 4}
    with pytest.raises(ConfigError, match=f"profile: .*{LAYERS}"):
        CompressedCache(tiny.model("llama"), "prefixkv", allocator={"name": "adakv", "layers": layers})
