"""What each allocator, statistic and evictor promises beyond the laws that all of its kind share."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import ALLOCATORS, EVICTORS, CompressedCache, CompressionConfig
from kvcompress.cache.ranking import _rank_by_rank
from kvcompress.errors import ConfigError, PolicyError
from kvcompress.policies.allocators.apportionment import apportion
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, SelectionContext
from kvcompress.policies.statistics import STATISTICS
from tests import strategies, tiny
from tests.reference import Reference, held
from tests.strategies import AllocationInput, Scripted, allocation_inputs, examples, selection_contexts

# -- apportionment -----------------------------------------------------------------------------------------------------


def largest_remainders(weights: list[Any], total: int, floor: list[int], capacity: list[int]) -> list[int]:
    """Quotas by filling layers up to the next bound in turn, then the largest remainders, in exact numbers."""
    scale = max(map(Fraction, weights))
    exact = [max(Fraction(weight), scale * Fraction(1, 2**40)) if scale else Fraction(1) for weight in weights]
    layers = range(len(weights))

    def quotas(multiplier: Fraction) -> list[Fraction]:
        return [min(max(multiplier * exact[i], Fraction(floor[i])), Fraction(capacity[i])) for i in layers]

    total, reached = min(total, sum(capacity)), Fraction(0)
    if total <= sum(floor):
        return list(floor)
    for bound in sorted({Fraction(count[i]) / exact[i] for i in layers for count in (floor, capacity)}):
        if sum(quotas(bound)) >= total:  # linear in between
            before, after = sum(quotas(reached)), sum(quotas(bound))
            reached += (bound - reached) * (total - before) / (after - before) if after > before else 0
            break
        reached = bound
    quota = quotas(reached)
    budget = [math.floor(each) for each in quota]
    order = sorted(layers, key=lambda i: (budget[i] - quota[i], i))
    for layer in order[: total - sum(budget)]:
        budget[layer] += 1
    return budget


@given(given=allocation_inputs(max_tokens=20), data=st.data())
def test_slots_are_apportioned_by_largest_remainders(given: AllocationInput, data: st.DataObject) -> None:
    """Within floors and capacities, budgets are those of exact arithmetic, ties to earlier layers."""
    layers, batch = given.floor.shape
    weight = torch.tensor([[data.draw(st.integers(0, 8)) for _ in range(batch)] for _ in range(layers)]).double()
    most, least = given.capacity.sum(0), given.floor.sum(0)
    total = torch.minimum(torch.maximum(given.total, least), most)
    budget = apportion(weight, total, given.floor, given.capacity)
    for row in range(batch):
        columns = [tensor[:, row].tolist() for tensor in (weight, given.floor, given.capacity)]
        assert budget[:, row].tolist() == largest_remainders(columns[0], int(total[row]), *columns[1:])


@pytest.mark.parametrize("weights", [[1e-300, 1.0], [1e300, 5e-324], [5e-324, 0.0], [math.pi * 1e200, 1e-12]])
def test_weights_of_any_size_are_apportioned(weights: list[float]) -> None:
    """Whatever the weights, the lighter layer fills up once the heavier is full."""
    weight = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    none, most = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 1000)
    heavy = int(weight.argmax())
    for total in (1, 999, 1000, 1500, 2000):
        budget = apportion(weight, torch.tensor([total]), none, most)
        assert int(budget[heavy]) == min(total, 1000) and int(budget.sum()) == total


# -- profile -----------------------------------------------------------------------------------------------------------

retentions = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), min_size=1, max_size=6)


def implied(retention: list[float], capacity: Tensor) -> list[list[int]]:
    return [
        [math.floor(share * count + 0.5) for count in row]
        for share, row in zip(retention, capacity.tolist(), strict=True)
    ]


@given(retention=retentions, tokens=st.integers(0, 4000), batch=st.integers(1, 3), seed=strategies.seeds)
def test_a_profile_is_reproduced_to_the_token(retention: list[float], tokens: int, batch: int, seed: int) -> None:
    """With the total that it asks for, every layer gets its retention times its tokens, rounded to the nearest."""
    capacity = torch.randint(0, tokens + 1, (len(retention), batch), generator=strategies.generator(seed))
    wanted = torch.tensor(implied(retention, capacity))
    profile = ALLOCATORS.create("profile", retention=retention)
    importance = torch.zeros(len(retention), batch, tokens)
    assert profile.allocate(importance, wanted.sum(0), torch.zeros_like(capacity), capacity).tolist() == wanted.tolist()


def test_a_profile_is_reproduced_where_proportions_alone_would_not() -> None:
    """Rescaled to 103 slots, the largest remainders would give 0, 1, 1 and 101."""
    profile, capacity = (
        ALLOCATORS.create("profile", retention=[0.6, 0.6, 0.6, 0.1002]),
        torch.tensor([[1, 1, 1, 1000]]).T,
    )
    budget = profile.allocate(torch.zeros(4, 1, 1000), torch.tensor([103]), torch.zeros_like(capacity), capacity)
    assert budget[:, 0].tolist() == [1, 1, 1, 100]
    weight = torch.tensor([[0.6, 0.6, 0.6, 100.2]], dtype=torch.float64).T
    assert apportion(weight, torch.tensor([103]), torch.zeros_like(capacity), capacity)[:, 0].tolist() != [1, 1, 1, 100]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_profile_comes_from_a_file(tmp_path: Path, suffix: str, keyed: bool) -> None:
    """A list or a mapping, read once: the configuration holds the numbers, not the file."""
    path, retention = tmp_path / f"profile{suffix}", [0.5, 0.25, 1]
    held = {"model": "tiny", "retention": retention} if keyed else retention
    path.write_text(json.dumps(held) if suffix == ".json" else yaml.safe_dump(held))
    config = CompressionConfig(scorer="attention", allocator={"name": "profile", "path": str(path)})
    path.unlink()
    assert config.allocator == ALLOCATORS.create("profile", retention=retention)
    config.dump(tmp_path / "config.yaml")
    assert CompressionConfig.load(tmp_path / "config.yaml") == config
    assert config.override(budget=0.5).allocator == config.allocator


@pytest.mark.parametrize(
    ("fields", "text", "says"),
    [
        ({}, None, "retention"),
        ({"retention": []}, None, "retention"),
        ({"retention": [0.5, 1.5]}, None, "retention.1"),
        ({"retention": [0.5, float("nan")]}, None, "retention.1"),
        ({"retention": 0.5}, None, "retention"),
        ({"path": "missing.json"}, None, "missing.json: cannot be read"),
        ({"path": "profile.toml"}, "", ".json, .yaml or .yml"),
        ({"path": "profile.json"}, "{", "is not valid JSON"),
        ({"path": "profile.yaml"}, "[1", "is not valid YAML"),
        ({"path": "profile.yaml"}, "model: tiny", "must hold a list"),
        ({"path": "profile.yaml"}, "retention: [0.5, much]", "retention.1"),
        ({"path": "profile.json", "retention": [0.5]}, "[0.5]", "give one"),
    ],
    ids=str,
)
def test_a_bad_profile_is_refused_when_the_configuration_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], text: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(fields["path"]).write_text(text)
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(scorer="attention", allocator={"name": "profile", **fields})
    assert says in str(caught.value) and "profile" in str(caught.value) and "\n" not in str(caught.value)


# -- the protected beside a prefix or a share -------------------------------------------------------------------------


@pytest.mark.parametrize(("protected", "wanted"), [("on_top", [5, 4]), ("floor", [7, 2])])
def test_prefix_counts_the_protected_as_told(protected: str, wanted: list[int]) -> None:
    """On top of the prefix, as the released code of PrefixKV does with its two, or as a part of it."""
    importance = torch.tensor(
        [
            [0.535, 0.199, 0.659, 0.657, 0.233, 0.425, 0.207, 0.63],
            [0.002, 0.381, 0.391, 0.028, 0.001, 0.0, 0.008, 0.002],
        ]
    ).unsqueeze(1)
    floor, capacity = torch.full((2, 1), 2), torch.full((2, 1), 8)
    prefix = ALLOCATORS.create("prefix", protected=protected)
    assert prefix.allocate(importance, torch.tensor([9]), floor, capacity)[:, 0].tolist() == wanted


@given(
    tokens=st.integers(8, 60),
    layers=st.integers(1, 6),
    forgotten=st.floats(0.0, 0.9),
    protected=st.integers(0, 4),
    seed=strategies.seeds,
)
def test_prefix_on_top_is_the_released_search(
    tokens: int, layers: int, forgotten: float, protected: int, seed: int
) -> None:
    """For any threshold of the released code, what it forgets leaves the same layer sizes, without its tolerance."""
    mass = torch.rand(layers, tokens, generator=strategies.generator(seed), dtype=torch.float64).square()
    kept = []
    for layer in mass.tolist():
        ranked = sorted(layer, reverse=True)
        held, ranks = 0.0, 0
        while held < (1 - forgotten) * sum(layer) and ranks < tokens:  # the shortest prefix that holds so much
            held += ranked[ranks]
            ranks += 1
        kept.append(tokens - max(0, tokens - ranks - protected))
    floor, capacity = torch.full((layers, 1), protected), torch.full((layers, 1), tokens)
    prefix = ALLOCATORS.create("prefix", protected="on_top")
    budget = prefix.allocate(mass.unsqueeze(1), torch.tensor([sum(kept)]), floor, capacity)
    assert budget[:, 0].tolist() == kept


@given(given=allocation_inputs(), tau=st.sampled_from([0.5, 1.0, 2.0]))
def test_entropy_on_top_shares_out_what_the_protected_leave(given: AllocationInput, tau: float) -> None:
    """Each layer has its window, and of the rest what is in proportion to its preference, as far as it has slots."""
    budget = given.by(ALLOCATORS.create("entropy", tau1=tau, protected="on_top"))
    spread, shift = (given.statistics[f"attention_{name}"].tolist() for name in ("entropy", "variance"))
    for row, total in enumerate(given.total.tolist()):
        preference = [h[row] ** (1 / tau) * v[row] for h, v in zip(spread, shift, strict=True)]
        floor, capacity = given.floor[:, row].tolist(), given.capacity[:, row].tolist()
        room = [most - least for least, most in zip(floor, capacity, strict=True)]
        rest = max(0, min(total, sum(capacity)) - sum(floor))
        above = largest_remainders(preference, rest, [0] * len(floor), room)
        assert budget[:, row].tolist() == [least + more for least, more in zip(floor, above, strict=True)]


@given(tokens=st.integers(80, 4000), preference=st.lists(st.floats(0.1, 1.0), min_size=2, max_size=20))
def test_entropy_on_top_is_near_the_real_numbers_of_the_released_code(tokens: int, preference: list[float]) -> None:
    """With room in every layer: the window of 32, and preference / sum of preferences of what all windows leave."""
    layers, window = len(preference), 32
    mean = window + (tokens - window) // (12 * layers)
    statistics = {
        "attention_entropy": torch.tensor(preference, dtype=torch.float64).unsqueeze(1),
        "attention_variance": torch.ones(layers, 1, dtype=torch.float64),
    }
    allocate = ALLOCATORS.create("entropy", protected="on_top").allocate
    budget = allocate(
        torch.zeros(layers, 1, tokens),
        torch.tensor([mean * layers]),
        torch.full((layers, 1), window),
        torch.full((layers, 1), tokens),
        AllocationContext(statistics=statistics),
    )
    wanted = [window + one / sum(preference) * (mean - window) * layers for one in preference]
    assert all(abs(found - real) < 1 + 1e-3 for found, real in zip(budget[:, 0].tolist(), wanted, strict=True))


# -- pyramid -----------------------------------------------------------------------------------------------------------


@example(layers=20, tokens=3791, protected=27, share=0.3, beta=79.0)
@given(
    layers=st.integers(1, 40),
    tokens=st.integers(1, 4000),
    protected=st.integers(0, 40),
    share=st.floats(0, 1),
    beta=st.floats(1, 100),
)
def test_a_pyramid_falls_along_the_line_of_the_paper(
    layers: int, tokens: int, protected: int, share: float, beta: float
) -> None:
    """Budgets never rise, and lie within a token of the published line wherever no layer is full."""
    protected = min(protected, tokens)
    total = max(layers * protected, int(share * layers * tokens))
    floor, capacity = torch.full((layers, 1), protected), torch.full((layers, 1), tokens)
    pyramid = ALLOCATORS.create("pyramid", beta=beta)
    budget = pyramid.allocate(torch.zeros(layers, 1, tokens), torch.tensor([total]), floor, capacity)[:, 0].tolist()
    assert budget == sorted(budget, reverse=True)
    if layers == 1:
        return
    free = Fraction(total - layers * protected)  # the paper counts the protected window apart
    last = free / (Fraction(beta) * layers)
    first = 2 * free / layers - last
    line = [protected + first - (first - last) * layer / (layers - 1) for layer in range(layers)]
    above = largest_remainders(
        [each - protected for each in line], int(free), [0] * layers, [tokens - protected] * layers
    )
    assert budget == [protected + more for more in above]
    if line[0] <= tokens:
        assert all(abs(found - wanted) < 1 for found, wanted in zip(budget, line, strict=True))


# -- statistics and what reads them ------------------------------------------------------------------------------------

SEEN: list[AllocationContext] = []


class Spy(Allocator):
    """Takes down what it is shown, and gives everything."""

    name: ClassVar[str] = "spy"
    needs: ClassVar[tuple[str, ...]] = tuple(STATISTICS)

    def allocate(self, importance, total, floor, capacity, context=None):
        SEEN.append(context)
        return ALLOCATORS.create("uniform").allocate(importance, total, floor, capacity)


def attention_rows(weights: Tensor, last: int) -> list[list[list[float]]]:
    """Dense attention of one row as lists [heads][queries][tokens that the query sees]."""
    columns = weights.shape[-1]
    heads = []
    for head in weights.tolist():
        queries = range(max(0, len(head) - last), len(head))
        heads.append([head[q][: columns - len(head) + q + 1] for q in queries])
    return heads


def plain_sparsity(weights: Tensor, after_image: int | None) -> float:
    entries = negligible = 0
    for head in attention_rows(weights, min(64, after_image or 64)):
        for query in head:
            entries += len(query)
            negligible += sum(value < 0.01 * max(query) for value in query)
    return negligible / entries


def plain_entropy_and_variance(weights: Tensor) -> tuple[float, float]:
    heads, columns = attention_rows(weights, 32), weights.shape[-1]
    before = columns - len(heads[0]) or columns
    entropies, variances = [], []
    for head in heads:
        padded = [(query + [0.0] * columns)[:before] for query in head]
        entropies += [-sum(p * math.log(p) for p in query if p) for query in padded]
        variance = 0.0
        for token in zip(*padded, strict=True):
            mean = sum(token) / len(token)
            variance += sum((p - mean) ** 2 for p in token) / len(token)
        variances.append(variance)
    return sum(entropies) / len(entropies), sum(variances) / len(variances)


@pytest.mark.parametrize("name", ["llama", "llava"])
@examples(6)
@given(lengths=st.lists(st.integers(2, 90), min_size=1, max_size=3), more=st.integers(2, 40), seed=strategies.seeds)
def test_statistics_are_those_of_dense_attention(name: str, lengths: list[int], more: int, seed: int) -> None:
    """In a padded batch, after the prompt and after a second turn, each as plain loops over the softmax give it."""
    model, rows, longest = tiny.model(name), len(lengths), max(lengths)
    inputs = tiny.inputs(name, longest, seed, rows)
    ids = inputs["input_ids"]
    padding = [min(longest - length, longest // 2) for length in lengths]  # never the image
    inputs["attention_mask"] = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    config = CompressionConfig(budget=1.0, scorer="attention", allocator=Spy())
    cache, dense = CompressedCache(model, config), Reference(name)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, more, dtype=torch.long)], 1)
    turn = {
        "input_ids": tiny.token_ids(rows, more, seed + 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1)[:, -more:],
    }
    is_image = torch.cat([ids == tiny.IMAGE_TOKEN, torch.zeros(rows, more, dtype=torch.bool)], 1)
    for step in (inputs, turn):
        SEEN.clear()
        visible = held(cache) if step is turn else []
        with torch.no_grad():
            model(**step, **tiny.with_cache(cache))
        dense.run(step, visible)
        (context,) = SEEN
        for layer, module in enumerate(dense.layers):
            for row in range(rows):
                start, columns = padding[row], module.weights.shape[-1]
                first_query = max(0, start - (columns - module.weights.shape[2]))
                weights = module.weights[row, :, first_query:, start:]
                images = is_image[row, :columns].nonzero().flatten().tolist()
                after = columns - 1 - images[-1] if images else None
                wanted = (plain_sparsity(weights, after), *plain_entropy_and_variance(weights))
                names = ("attention_sparsity", "attention_entropy", "attention_variance")
                found = [float(context.statistics[statistic][layer, row]) for statistic in names]
                # Two probabilities may lie so close to the threshold of sparsity that rounding decides.
                counted = min(64, weights.shape[1], after or 64)
                entries = weights.shape[0] * sum(range(weights.shape[2] - counted + 1, weights.shape[2] + 1))
                assert found[0] == pytest.approx(wanted[0], abs=2.5 / entries)
                assert found[1:] == pytest.approx(wanted[1:], abs=1e-4)


@given(given=allocation_inputs())
def test_sparsity_is_the_published_formula(given: AllocationInput) -> None:
    """Budgets are total x (1 - sparsity) / sum of (1 - sparsity), within the bounds, by largest remainders."""
    budget = given.by(ALLOCATORS.create("sparsity"))
    for row, total in enumerate(given.total.tolist()):
        density = [Fraction(1 - value) for value in given.statistics["attention_sparsity"][:, row].double().tolist()]
        floor, capacity = given.floor[:, row].tolist(), given.capacity[:, row].tolist()
        assert budget[:, row].tolist() == largest_remainders(density, total, floor, capacity)


@given(tokens=st.integers(50, 4000), sparsity=st.lists(st.floats(0, 0.9), min_size=2, max_size=20))
def test_sparsity_is_near_the_real_numbers_of_the_paper(tokens: int, sparsity: list[float]) -> None:
    """Away from all bounds, no budget is a token off the paper's fraction."""
    layers = len(sparsity)
    total = layers * tokens // 20
    context = AllocationContext(statistics={"attention_sparsity": torch.tensor(sparsity).unsqueeze(1)})
    none, most = torch.zeros(layers, 1, dtype=torch.long), torch.full((layers, 1), tokens)
    allocate = ALLOCATORS.create("sparsity").allocate
    budget = allocate(torch.zeros(layers, 1, tokens), torch.tensor([total]), none, most, context)[:, 0].tolist()
    wanted = [total * (1 - value) / sum(1 - other for other in sparsity) for value in sparsity]
    assert all(abs(found - real) < 1 + 1e-3 for found, real in zip(budget, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "statistic", "sign"),
    [("sparsity", "attention_sparsity", -1), ("entropy", "attention_entropy", 1), ("entropy", "attention_variance", 1)],
)
@given(given=allocation_inputs(), data=st.data())
def test_a_layer_of_a_larger_statistic_gets_no_less(
    name: str, statistic: str, sign: int, given: AllocationInput, data: st.DataObject
) -> None:
    """Raising one layer's entropy, variance or density takes nothing from it."""
    layer = data.draw(st.integers(0, given.floor.shape[0] - 1))
    values = given.statistics[statistic].clone()
    values[layer] = (values[layer] + sign * data.draw(st.floats(0, 1))).clamp(0, 1)
    changed = replace(given, statistics={**given.statistics, statistic: values})
    allocator = ALLOCATORS.create(name)
    gained = changed.by(allocator) - given.by(allocator)
    zero = (given.statistics["attention_entropy"] * given.statistics["attention_variance"]).amax(0) == 0
    if name == "entropy":
        gained = gained[:, ~zero]  # where no layer had any preference, all were equal
    assert (gained[layer] >= 0).all()


@given(given=allocation_inputs(), tau1=st.sampled_from([0.5, 1.0, 2.0]), tau2=st.sampled_from([0.5, 1.0, 4.0]))
def test_entropy_is_the_published_preference(given: AllocationInput, tau1: float, tau2: float) -> None:
    """Budgets are in proportion to H^(1/tau1) V^(1/tau2), within the bounds, by largest remainders."""
    budget = given.by(ALLOCATORS.create("entropy", tau1=tau1, tau2=tau2))
    spread, shift = (given.statistics[f"attention_{name}"].tolist() for name in ("entropy", "variance"))
    for row, total in enumerate(given.total.tolist()):
        preference = [h[row] ** (1 / tau1) * v[row] ** (1 / tau2) for h, v in zip(spread, shift, strict=True)]
        floor, capacity = given.floor[:, row].tolist(), given.capacity[:, row].tolist()
        assert budget[:, row].tolist() == largest_remainders(preference, total, floor, capacity)


@pytest.mark.parametrize(
    ("spread", "shift", "tau1", "tau2", "wanted"),
    [
        ([1, 4, 9], [5, 5, 5], 2.0, 1.0, [10, 20, 30]),
        ([5, 5, 5], [1, 4, 9], 1.0, 2.0, [10, 20, 30]),
        ([1, 2, 3], [5, 5, 5], 1.0, 9.0, [10, 20, 30]),
        ([1, 4, 1], [1, 4, 1], 2.0, 0.5, [2, 56, 2]),  # 1 : 2 x 16 : 1, as far as it goes
        ([0, 0, 0], [1, 2, 3], 1.0, 1.0, [20, 20, 20]),
    ],
)
def test_temperatures_weaken_spread_and_shift(
    spread: list[float], shift: list[float], tau1: float, tau2: float, wanted: list[int]
) -> None:
    statistics = {
        "attention_entropy": torch.tensor(spread, dtype=torch.float32).unsqueeze(1),
        "attention_variance": torch.tensor(shift, dtype=torch.float32).unsqueeze(1),
    }
    none, most = torch.zeros(3, 1, dtype=torch.long), torch.full((3, 1), 60)
    allocate = ALLOCATORS.create("entropy", tau1=tau1, tau2=tau2).allocate
    budget = allocate(torch.zeros(3, 1, 60), torch.tensor([60]), none, most, AllocationContext(statistics=statistics))
    assert budget[:, 0].tolist() == wanted


def test_an_unknown_statistic_is_refused_when_the_configuration_is_built() -> None:
    class Needy(Spy):
        name = "needy"
        needs = ("attention_sparsity", "attention_colour")

    with pytest.raises(ConfigError, match=r"needy: needs the statistic 'attention_colour'.*known: attention_entropy"):
        CompressionConfig(scorer="attention", allocator=Needy())
    with pytest.raises(ConfigError, match="attention_colour"):
        CompressionConfig.preset("full", allocator=Needy())


@pytest.mark.parametrize("name", ["sparsity", "entropy"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "passes|pass context"),
        (torch.zeros(3), r"\[layers, batch\]"),
        (torch.tensor([[0.0], [0.1], [-1.0]]), "layer 2"),
    ],
    ids=["missing", "shape", "negative"],
)
def test_a_missing_or_wrong_statistic_is_refused_by_name(name: str, value: Tensor | None, says: str) -> None:
    allocator = ALLOCATORS.create(name)
    counts = torch.full((3, 1), 5)
    known = {} if value is None else dict.fromkeys(allocator.needs, value)
    with pytest.raises(PolicyError, match=f"allocator {name}.*({says})"):
        allocator.allocate(
            torch.zeros(3, 1, 5), torch.tensor([6]), counts - 5, counts, AllocationContext(statistics=known)
        )


# -- heads that hold different tokens ----------------------------------------------------------------------------------


@given(layer=selection_contexts())
def test_heads_that_hold_different_tokens_are_compared_rank_by_rank(layer: SelectionContext) -> None:
    """The best tokens of all heads count as one, at the place of the first head's, and so on."""
    heads = layer.importance.shape[1]
    index = layer.index.expand(-1, heads, -1)
    found = _rank_by_rank(layer.importance, index)[:, 0]
    for row in range(len(found)):
        held = index[row] >= 0
        ranked = [layer.importance[row, head][held[head]].sort(descending=True).values for head in range(heads)]
        first = layer.importance[row, 0].masked_fill(~held[0], -1.0)
        order = first.argsort(descending=True, stable=True)[: int(held[0].sum())]
        assert torch.equal(found[row][order], torch.stack(ranked).mean(0))


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "head"])
@given(layer=selection_contexts(), length=st.integers(1, 9))
def test_chunks_are_kept_by_their_sum(granularity: str, layer: SelectionContext, length: int) -> None:
    """Plain lists: cut a row's tokens into runs, rank runs by sum, and take tokens run by run until it is enough."""
    evictor = EVICTORS.create("chunk", granularity=granularity, length=length)
    # Whole numbers, so that sums are exact.
    layer = replace(layer, importance=(layer.importance * 8).round() * 6)
    mask = evictor.select(layer)
    score = layer.importance if granularity == "head" else layer.importance.mean(1, keepdim=True)
    for row in range(mask.shape[0]):
        for one in range(mask.shape[1]):
            own = one if layer.valid.shape[1] > 1 else 0
            scores = score[row, one if score.shape[1] > 1 else 0].tolist()
            index = layer.index[row, own].tolist()
            slots = sorted((s for s in range(len(index)) if index[s] >= 0), key=lambda s: index[s])
            runs = [slots[start : start + length] for start in range(0, len(slots), length)]
            runs.sort(key=lambda run: -sum(scores[s] for s in run))
            ranked = [slot for run in runs for slot in sorted(run, key=lambda s: -scores[s])]
            ranked.sort(key=lambda s: not layer.protected[row, own, s])
            budget = int(layer.budget[row])
            assert set(mask[row, one].nonzero().flatten().tolist()) == set(ranked[:budget])


def test_a_chunk_of_one_token_is_topk() -> None:
    """With runs of a single token, a running cache holds what top-k holds."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 60, seed=3, batch=2)
    found = []
    for evictor in ("topk", {"name": "chunk", "length": 1}):
        cache = CompressedCache(model, "prefixkv", evictor=evictor, scorer=Scripted(), budget=0.3)
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=5)
        found.append(held(cache))
    assert found[0] == found[1]
