"""Scorers: each does what its paper's formula says, written out here in loops or with dense matrices."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import SCORERS, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.errors import UnsupportedModelError
from kvcompress.kernels import attention_with_mask
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.policies.scorers import Attention, SnapKV
from kvcompress.policies.statistics import STATISTICS
from kvcompress.testing.importance import generator
from kvcompress.testing.layers import DIM, HIDDEN, Padded, context, contexts, padded, padded_batches, visible
from tests import strategies, tiny
from tests.operations import Operations
from tests.reference import Reference


def score_label(given: Any) -> str:
    return strategies.label(given) if isinstance(given, Scorer) else given.__name__


every_scorer = pytest.mark.parametrize("scorer", strategies.scorers(), ids=strategies.label)


def dense(layer: LayerContext) -> Tensor:
    """Probabilities `[batch, heads, queries, tokens]` of a plain softmax in float64."""
    group = layer.query.shape[1] // layer.keys.shape[1]
    logits = layer.query.double() @ layer.keys.repeat_interleave(group, 1).double().transpose(2, 3) * layer.scaling
    return logits.masked_fill(~visible(*logits.shape[2:]), -torch.inf).softmax(-1)


def group_mean(per_head: Tensor, layer: LayerContext) -> Tensor:
    return per_head.unflatten(1, (layer.keys.shape[1], -1)).mean(2)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def rotation(seed: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=generator(seed))).Q


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [one for one in strategies.scorers() if one.name != "tova"], ids=strategies.label)
@strategies.examples(6)
@given(seed=strategies.seeds)
def test_heads_that_hold_different_tokens_are_scored_as_others(scorer: Scorer, seed: int) -> None:
    """Places and images given once per head mean what they mean given once for all, but where heads share one score."""
    layer = context(seed)
    sets = {"index": layer.index.expand(2, 2, -1), "is_image": layer.is_image.expand(2, 2, -1)}
    assert torch.equal(scorer.score(dataclasses.replace(layer, **sets)), scorer.score(layer))


@pytest.mark.parametrize("name", STATISTICS)
@given(given_rows=padded_batches)
def test_a_row_of_a_padded_batch_has_the_statistics_that_it_has_alone(name: str, given_rows: Padded) -> None:
    """Over its own queries and slots."""
    found = STATISTICS[name](given_rows.batch)
    close(found, torch.cat([STATISTICS[name](alone) for alone in given_rows.alone]), 1e-5)


@pytest.mark.parametrize("scores", [*strategies.scorers(), *STATISTICS.values()], ids=score_label)
@pytest.mark.parametrize("rows", [[(0, 9), (0, 9)], [(4, 9), (4, 9)], [(0, 9), (0, 2)], [(4, 1), (2, 9)]], ids=str)
def test_scoring_never_waits_for_the_device(scores: Any, rows: list[tuple[int, int]]) -> None:
    """Padded or not, nothing that only the device knows is asked for, and how much is done does not grow with rows."""
    numbers = []
    for batch in (rows, rows * 3):
        layer = padded(3, batch, 2, 2, images=True, rotary=True).batch
        if layer.valid.all():
            layer = dataclasses.replace(layer, valid=None)
        with Operations() as operations:
            scores.score(layer) if isinstance(scores, Scorer) else scores(layer)
        assert operations.syncs == 0
        numbers.append(operations.number)
    assert numbers[0] == numbers[1]


# -- attention ---------------------------------------------------------------------------------------------------------


@given(layer=contexts, image=st.floats(0, 3), text=st.floats(0, 3), queries=st.sampled_from(["all", "window:3"]))
def test_modality_weights_are_factors(layer: LayerContext, image: float, text: float, queries: str) -> None:
    """Image slots have their mass times one weight, text slots times the other."""
    score = Attention(queries=queries, image_weight=image, text_weight=text).score(layer)
    last = 3 if queries == "window:3" else layer.query.shape[2]
    mass = group_mean(dense(layer)[:, :, -last:].sum(2), layer)
    for row, heads in enumerate(mass.tolist()):
        for slot in range(layer.keys.shape[2]):
            is_image = layer.is_image is not None and bool(layer.is_image[row, 0, slot])
            for head, scores in enumerate(heads):
                expected = scores[slot] * (image if is_image else text)
                assert float(score[row, head, slot]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@given(layer=contexts)
def test_post_vision_counts_the_queries_after_the_image(reduce: str, layer: LayerContext) -> None:
    """From the first query after the forward's last image token on, or the last one alone if there is none."""
    score = Attention(queries="post_vision", reduce=reduce).score(layer)
    queries, tokens = layer.query.shape[2], layer.keys.shape[2]
    for row, weights in enumerate(group_mean(dense(layer).flatten(2), layer).unflatten(2, (queries, tokens))):
        new = [False] * queries if layer.is_image is None else layer.is_image[row, 0, -queries:].tolist()
        counted = [q for q in range(queries) if not any(new[q:])] or [queries - 1]
        for slot in range(tokens):
            saw = [q for q in counted if q + tokens - queries >= slot]
            mass = weights[:, counted, slot].sum(1)
            close(score[row, :, slot], mass / max(1, len(saw)) if reduce == "mean" else mass)


def scores_of(cache: CompressedCache, layer: int) -> Tensor:
    return cache.layers[layer].scores


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_post_vision_on_llava_is_dense_attention_from_the_question(reduce: str, padded: bool) -> None:
    """Prompt, a turn without an image, and a prompt that ends with its image; scores are those of the last forward."""
    model = tiny.model("llava")
    prompt = tiny.inputs("llava", 10, seed=3)
    question = {"input_ids": tiny.token_ids(1, 5, seed=4)}
    cut = int((prompt["input_ids"][0] == tiny.IMAGE_TOKEN).nonzero()[-1]) + 1
    ending = {**prompt, **{key: prompt[key][:, :cut] for key in ("input_ids", "attention_mask")}}
    scorer = Attention(queries="post_vision", reduce=reduce)
    for first, counted in ((prompt, prompt["input_ids"].shape[1] - cut), (ending, 1)):
        cache, other = CompressedCache(model, CompressionConfig(budget=1.0, scorer=scorer)), Reference("llava")
        pad, rows, given_to = 0, slice(None), first
        if padded:  # beside a row that is three tokens longer, whose image comes later
            pad, rows = 3, slice(0, 1)
            longer = tiny.inputs("llava", 10 + pad, seed=5)["input_ids"][:, : first["input_ids"].shape[1] + pad]
            left = {key: torch.nn.functional.pad(first[key], (pad, 0)) for key in ("input_ids", "attention_mask")}
            given_to = {
                "input_ids": torch.cat([left["input_ids"], longer]),
                "attention_mask": torch.cat([left["attention_mask"], torch.ones_like(longer)]),
                "pixel_values": first["pixel_values"].repeat(2, 1, 1, 1),
            }
            positions = (given_to["attention_mask"].cumsum(1) - 1).clamp(min=0)
        other.run(first, [])
        tokens = first["input_ids"].shape[1]
        with torch.no_grad():
            model(**given_to, **({"position_ids": positions} if padded else {}), **tiny.with_cache(cache))
        check_dense(cache, other, rows, tokens, counted, reduce)
        if padded:
            continue
        with torch.no_grad():
            model(**question, **tiny.with_cache(cache))
        other.run(question, [[[list(range(tokens))]]] * 3)
        check_dense(cache, other, rows, tokens + 5, 5, reduce)


def check_dense(cache: CompressedCache, other: Reference, rows: slice, tokens: int, counted: int, reduce: str) -> None:
    saw = torch.arange(tokens, 0, -1).clamp(max=counted) if reduce == "mean" else 1
    for layer, mass in enumerate(other.attention_mass(counted)):
        close(scores_of(cache, layer)[rows, :, :tokens], mass / saw)


# -- snapkv, tova ------------------------------------------------------------------------------------------------------


@given(
    layer=contexts, window=st.integers(1, 8), kernel=st.sampled_from([1, 3, 5]), pool=st.sampled_from(["avg", "max"])
)
def test_snapkv_is_its_formula(layer: LayerContext, window: int, kernel: int, pool: str) -> None:
    """Mean over the last queries; before the window, the mean or most of the neighbours there, zeros beyond the end."""
    score = SnapKV(window=window, kernel=kernel, pool=pool).score(layer)
    vote = group_mean(dense(layer)[:, :, -window:].mean(2), layer)
    tokens = layer.keys.shape[2]
    for row, head in torch.cartesian_prod(*map(torch.arange, vote.shape[:2])).view(-1, 2).tolist():
        votes = vote[row, head].tolist()
        for slot in range(tokens):
            expected = votes[slot]
            if slot < tokens - window:
                around = range(slot - kernel // 2, slot + kernel // 2 + 1)
                near = [votes[i] for i in around if 0 <= i < tokens - window]
                expected = sum(near) / kernel if pool == "avg" else max(near)
            assert float(score[row, head, slot]) == pytest.approx(expected, abs=1e-5)


@given(layer=contexts, window=st.integers(1, 8), kernel=st.sampled_from([1, 3, 5]), projected=st.booleans())
def test_defensive_is_its_formula(layer: LayerContext, window: int, kernel: int, projected: bool) -> None:
    """The highest of all pooled votes of a group, at least their mean over tokens, times the share of the value."""
    score = SCORERS.create("defensive", window=window, kernel=kernel, projected=projected).score(layer)
    kv_heads, tokens = layer.keys.shape[1:3]
    votes, before = dense(layer)[:, :, -window:].unflatten(1, (kv_heads, -1)).flatten(2, 3), tokens - window
    parts = layer.weights.output.double().unflatten(1, (kv_heads, -1, DIM))  # [hidden, kv_heads, group, DIM]
    norms = torch.einsum("hkgd,bktd->bkgth", parts, layer.values.double()).abs().sum(-1).mean(2)
    for row in range(len(votes)):
        for head in range(kv_heads):
            pooled = []
            for vote in votes[row, head].tolist():
                near = [
                    [i for i in range(s - kernel // 2, s + kernel // 2 + 1) if 0 <= i < before] for s in range(before)
                ]
                means = [sum(vote[i] for i in around) / kernel for around in near]
                pooled.append([mean * sum(vote[:before]) / sum(means) for mean in means] if before > 0 else [])
            highest = [max(of_query[slot] for of_query in pooled) for slot in range(before)]
            expected = [max(own, sum(highest) / before) for own in highest]
            expected += [float(votes[row, head, :, slot].max()) for slot in range(max(0, before), tokens)]
            for slot, wanted in enumerate(expected):
                share = float(norms[row, head, slot] / norms[row, :, slot].sum()) if projected else 1.0
                assert float(score[row, head, slot]) == pytest.approx(wanted * share, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "kept"),
    [("defensive", {"window": 3}, 3), ("snapkv", {"window": 3}, 3), ("snapkv", {}, 30), ("lagkv", {"lag": 4}, 4)],
    ids=str,
)
@pytest.mark.parametrize("budget", [0.2, 0.6])
def test_the_window_is_kept(name: str, fields: dict[str, Any], kept: int, budget: float) -> None:
    """Whatever the budget, every layer holds the last tokens that a method protects."""
    config = CompressionConfig(budget=budget, scorer={"name": name, **fields})
    cache = CompressedCache(tiny.model("llama"), config)
    with torch.no_grad():
        tiny.model("llama")(**tiny.inputs("llama", 30, seed=6), **tiny.with_cache(cache))
    for layer in range(3):
        assert set(range(30 - kept, 30)) <= set(cache.report().positions(layer, 0))


@given(layer=contexts)
def test_tova_is_one_row_of_the_softmax(layer: LayerContext) -> None:
    """The last query's probabilities, averaged over all heads."""
    score = SCORERS.create("tova").score(layer)
    close(score, dense(layer)[:, :, -1].mean(1, keepdim=True).expand_as(score), 1e-5)
    close(score.sum(-1), torch.ones(score.shape[:2]))


# -- keys and values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key_norm", "key_diff"])
@given(layer=contexts, seed=strategies.seeds)
def test_turning_all_keys_changes_no_score(name: str, layer: LayerContext, seed: int) -> None:
    """Norms and angles between keys are what counts."""
    scorer = SCORERS.create(name)
    turned = dataclasses.replace(layer, keys=layer.keys @ rotation(seed))
    close(scorer.score(turned), scorer.score(layer))


@given(layer=contexts)
def test_key_norm_is_minus_the_length(layer: LayerContext) -> None:
    """Twice the key, twice as low a score."""
    score = SCORERS.create("key_norm").score(layer)
    for keys, scores in zip(layer.keys.flatten(0, 1).tolist(), score.flatten(0, 1).tolist(), strict=True):
        assert scores == pytest.approx([-math.hypot(*key) for key in keys], rel=1e-5)


@given(layer=contexts, seed=strategies.seeds)
def test_key_diff_orders_slots_by_their_mean_cosine_to_all_keys(layer: LayerContext, seed: int) -> None:
    """As the matrix of all pairs does, and however long each key is."""
    score = SCORERS.create("key_diff").score(layer)
    keys = layer.keys.double()
    pairs = torch.nn.functional.cosine_similarity(keys.unsqueeze(3), keys.unsqueeze(2), dim=-1).mean(3)
    close(score / score.norm(dim=-1, keepdim=True), -pairs / pairs.norm(dim=-1, keepdim=True), 1e-3)
    factor = torch.rand(*keys.shape[:3], 1, generator=generator(seed)) + 0.5
    close(SCORERS.create("key_diff").score(dataclasses.replace(layer, keys=layer.keys * factor)), score)


@given(
    seed=strategies.seeds,
    tokens=st.integers(1, 40),
    lag=st.integers(1, 9),
    sink=st.integers(0, 9),
    constant=st.booleans(),
)
def test_lagkv_is_its_formula(seed: int, tokens: int, lag: int, sink: int, constant: bool) -> None:
    """Each whole partition but the last has softmaxes of its spread in the next one's range; the rest rank above."""
    layer = context(seed, queries=tokens, past=0)
    if constant:  # no range at all
        layer = dataclasses.replace(layer, values=torch.ones_like(layer.values))
    score = SCORERS.create("lagkv", lag=lag, sink=sink).score(layer)
    starts = [start for start in range(sink, tokens, lag) if start + lag <= tokens]
    scored: list[int] = []
    for here, there in pairwise(starts):
        scored += range(here, here + lag)
        expected = torch.zeros(*score.shape[:2], lag, dtype=torch.double)
        for states in (layer.keys.double(), layer.values.double()):
            block, following = states[:, :, here:there], states[:, :, there : there + lag]
            low, high = following.amin(2), following.amax(2)
            scaled = torch.stack([(block[:, :, i] - low) / (high - low).clamp(min=1e-6) for i in range(lag)], 2)
            deviation = scaled - scaled.mean(-1, keepdim=True)
            expected += (deviation.square().sum(-1) / (DIM - 1)).sqrt().softmax(-1)
        close(score[..., here:there], expected, 1e-3)
    rest = [slot for slot in range(tokens) if slot not in scored]
    assert (score[..., rest] > score[..., scored].amax(-1, keepdim=True)).all() if scored else True
    late = [slot for slot in rest if slot >= sink]
    assert (score[..., late].diff(dim=-1) > 0).all()
    assert (score[..., :sink] > 3).all()


# -- expected attention ------------------------------------------------------------------------------------------------


def turn(angle: Tensor) -> Tensor:
    """The rotation of dimensions i and i + half by angle i, as a matrix."""
    half = len(angle)
    matrix = torch.zeros(2 * half, 2 * half, dtype=torch.double)
    for i, a in enumerate(angle.tolist()):
        matrix[i, i] = matrix[i + half, i + half] = math.cos(a)
        matrix[i, i + half], matrix[i + half, i] = -math.sin(a), math.sin(a)
    return matrix


def beyond_sinks(places: list[int], sink: int) -> list[int]:
    """Which of the tokens at these places are no sinks, or all where none is."""
    return [number for number, place in enumerate(places) if place >= sink] or list(range(len(places)))


def gaussian(layer: LayerContext, row: int, head: int, sink: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a head's queries, turned back by their positions, without those of sinks."""
    queries = layer.query[row, head].double()
    positions = layer.index[row, 0, -len(queries) :].tolist()
    asking = beyond_sinks(positions, sink)
    queries, positions = queries[asking], [positions[number] for number in asking]
    frequencies = layer.weights.inverse_frequencies
    if frequencies is not None:
        queries = torch.stack([turn(-p * frequencies) @ q for p, q in zip(positions, queries, strict=True)])
    mean = queries.mean(0)
    return mean, sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)


@given(layer=contexts, future=st.integers(1, 5), epsilon=st.sampled_from([0.0, 0.02]), sink=st.integers(0, 6))
def test_expected_attention_is_its_formula(layer: LayerContext, future: int, epsilon: float, sink: int) -> None:
    """With rotations as matrices, averaged over the next positions, a query head and a key at a time.

    Sinks are left out of statistics and shares, and score what the highest other slot of their head does.
    """
    score = SCORERS.create("expected_attention", future=future, epsilon=epsilon, sink=sink).score(layer)
    frequencies, s = layer.weights.inverse_frequencies, layer.scaling
    (batch, heads, _, _), kv_heads = layer.query.shape, layer.keys.shape[1]
    for row in range(batch):
        end, counted = int(layer.index[row, 0, -1]) + 1, beyond_sinks(layer.index[row, 0].tolist(), sink)
        ahead = torch.eye(DIM, dtype=torch.double)
        if frequencies is not None:
            ahead = sum(turn((end + step) * frequencies) for step in range(future)) / future
        shares = torch.zeros(kv_heads, layer.keys.shape[2], dtype=torch.double)
        for head in range(heads):
            mean, covariance = gaussian(layer, row, head, sink)
            mean, covariance = ahead @ mean, ahead @ covariance @ ahead.T
            keys = layer.keys[row, head * kv_heads // heads, counted].double()
            expected = torch.stack([(mean @ k * s + k @ covariance @ k * s * s / 2).exp() for k in keys])
            shares[head * kv_heads // heads, counted] += expected / expected.sum() / (heads // kv_heads)
        expected = (shares + epsilon) * layer.values[row].double().norm(dim=-1)
        left_out = [slot for slot in range(layer.keys.shape[2]) if slot not in counted]
        expected[:, left_out] = expected[:, counted].amax(-1, keepdim=True)
        close(score[row], expected, 1e-3)


def test_expected_attention_is_the_mean_over_sampled_queries() -> None:
    """Gaussian queries drawn at the next position give, on average, the same weights."""
    layer = context(3, batch=1, kv_heads=1, group=1, queries=12, past=4)
    layer = dataclasses.replace(layer, scaling=0.15, values=torch.ones_like(layer.values))
    score = SCORERS.create("expected_attention", future=1, sink=0).score(layer)[0, 0].double() / DIM**0.5
    mean, covariance = gaussian(layer, 0, 0, 0)
    g = generator(4)
    noise = torch.randn(400_000, DIM, generator=g, dtype=torch.double)
    drawn = mean + noise @ torch.linalg.cholesky(covariance + 1e-9 * torch.eye(DIM)).T
    at_next = drawn @ turn((int(layer.index[0, 0, -1]) + 1) * layer.weights.inverse_frequencies).T
    weights = (at_next @ layer.keys[0, 0].double().T * layer.scaling).exp().mean(0)
    torch.testing.assert_close(score, weights / weights.sum(), rtol=0.02, atol=0)


@given(seed=strategies.seeds, shift=st.integers(1, 500))
def test_expected_attention_looks_at_relative_positions(seed: int, shift: int) -> None:
    """A sequence that starts later, and is turned accordingly, scores the same."""
    layer = context(seed)
    matrix = turn(shift * layer.weights.inverse_frequencies).T.float()
    later = dataclasses.replace(
        layer, index=layer.index + shift, query=layer.query @ matrix, keys=layer.keys @ matrix, seen=layer.seen + shift
    )
    scorer = SCORERS.create("expected_attention", future=7, sink=0)
    close(scorer.score(later), scorer.score(layer), 1e-3)


# -- value aware -------------------------------------------------------------------------------------------------------


def lengths(layer: LayerContext, order: int, output: Tensor | None) -> Tensor:
    """Norm of each value after its head's part of the projection, `[batch, heads, tokens]`, or of the value itself."""
    heads, kv_heads = layer.query.shape[1], layer.keys.shape[1]
    found = torch.zeros(layer.values.shape[0], heads, layer.values.shape[2], dtype=torch.double)
    for head in range(heads):
        values = layer.values[:, head * kv_heads // heads].double()
        if output is not None:
            values = values @ output[:, head * DIM : (head + 1) * DIM].double().T
        found[:, head] = values.norm(p=order, dim=-1)
    return found


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(layer=contexts)
def test_value_aware_is_attention_times_the_projected_value(
    order: int, dtype: torch.dtype, layer: LayerContext
) -> None:
    """Each head's part of the projection applied to each value, the norms averaged over the group."""
    output = layer.weights.output.to(dtype)
    layer = dataclasses.replace(layer, weights=LayerWeights(output))
    expected = group_mean(dense(layer).sum(2), layer) * group_mean(lengths(layer, order, output), layer)
    close(SCORERS.create("value_aware", norm=f"projected_l{order}").score(layer), expected, 1e-3)


@given(
    layer=contexts,
    window=st.integers(1, 9),
    epsilon=st.sampled_from([0.0, 1e-4, 0.5]),
    reduce=st.sampled_from(["sum", "mean"]),
)
def test_value_aware_is_the_second_stage_of_criticalkv(
    layer: LayerContext, window: int, epsilon: float, reduce: str
) -> None:
    """(A + epsilon) |W v| in L1, where A is the mean attention of the last queries; or a sum of it over them."""
    scorer = SCORERS.create(
        "value_aware", queries=f"window:{window}", reduce=reduce, norm="projected_l1", epsilon=epsilon
    )
    tokens, counted = layer.keys.shape[2], min(window, layer.query.shape[2])
    saw = torch.arange(tokens, 0, -1).clamp(max=layer.query.shape[2]).expand(layer.index.shape)
    score = scorer.importance(scorer.score(layer), saw)
    attention = group_mean(dense(layer)[:, :, -counted:].sum(2), layer)
    queries = torch.arange(tokens, 0, -1).clamp(max=counted)  # that see the slot; those in the window fewer
    expected = attention / queries + epsilon if reduce == "mean" else attention + epsilon * queries
    close(score, expected * group_mean(lengths(layer, 1, layer.weights.output), layer), 1e-3)


@given(layer=contexts, window=st.integers(1, 20))
def test_value_aware_by_the_largest_value_weighs_heads_as_lava_does(layer: LayerContext, window: int) -> None:
    """Attention of the window times the largest L1 norm of the head's values before it, or of all if none is before."""
    score = SCORERS.create("value_aware", queries=f"window:{window}", norm="largest_l1").score(layer)
    counted = min(window, layer.query.shape[2])
    attention = group_mean(dense(layer)[:, :, -counted:].sum(2), layer)
    for row, head in torch.cartesian_prod(*map(torch.arange, attention.shape[:2])).view(-1, 2).tolist():
        values = layer.values[row, head].double().tolist()
        before = values[: len(values) - counted] or values
        largest = max(sum(abs(number) for number in value) for value in before)
        close(score[row, head], attention[row, head] * largest, 1e-3)


@pytest.mark.parametrize(
    "output",
    [None, torch.ones(HIDDEN * 8, 1), torch.empty(HIDDEN, 4 * DIM, device="meta")],
    ids=["none", "packed", "offloaded"],
)
def test_value_aware_takes_the_values_own_norm_where_there_is_no_projection(output: Tensor | None) -> None:
    """Without a weight, with one packed by a quantized layer, and with one that is elsewhere."""
    layer = dataclasses.replace(context(5), weights=LayerWeights(output))
    expected = group_mean(dense(layer).sum(2), layer) * layer.values.double().norm(dim=-1)
    close(SCORERS.create("value_aware").score(layer), expected)
    close(SCORERS.create("value_aware", norm="own_l2").score(context(5)), expected)


class LoRALinear(torch.nn.Module):
    """A linear layer with low-rank adapters, laid out as PEFT's."""

    def __init__(self, base: torch.nn.Linear, names: list[str], seed: int = 0) -> None:
        super().__init__()
        self.base_layer, self.active_adapters, self.merged, self.disable_adapters = base, names, False, False
        self.scaling = {name: 0.5 + number for number, name in enumerate(names)}
        g = generator(seed)

        def matrix(out: int, into: int) -> torch.nn.Linear:
            made = torch.nn.Linear(into, out, bias=False)
            made.weight.data = torch.randn(out, into, generator=g)
            return made

        out, into = base.weight.shape
        self.lora_A = torch.nn.ModuleDict({name: matrix(3, into) for name in names})
        self.lora_B = torch.nn.ModuleDict({name: matrix(out, 3) for name in names})

    @property
    def weight(self) -> Tensor:
        """That of the base layer, as PEFT has it."""
        return self.base_layer.weight

    def used(self) -> list[str]:
        return [] if self.merged or self.disable_adapters else [n for n in self.active_adapters if n in self.scaling]

    def forward(self, hidden: Tensor) -> Tensor:
        more = [self.lora_B[name](self.lora_A[name](hidden)) * self.scaling[name] for name in self.used()]
        return self.base_layer(hidden) + sum(more)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"active_adapters": ["b"]},
        {"active_adapters": ["b", "elsewhere"]},
        {"active_adapters": []},
        {"merged": True},
        {"disable_adapters": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["projected_l2", "projected_l1"])
@torch.no_grad()
def test_value_aware_reads_what_a_lora_on_the_output_projection_does(norm: str, state: dict[str, Any]) -> None:
    """Scores are those of a model whose weight is the effective one: that of the layer applied to the identity."""
    adapted, plain, inputs = tiny.build("llama"), tiny.build("llama"), tiny.inputs("llama", 20, seed=7)
    for number, (layer, other) in enumerate(zip(adapted.model.layers, plain.model.layers, strict=True)):
        layer.self_attn.o_proj = LoRALinear(layer.self_attn.o_proj, ["a", "b"], seed=number)
        for name, value in state.items():
            setattr(layer.self_attn.o_proj, name, value)
        into = other.self_attn.o_proj.weight.shape[1]
        other.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj(torch.eye(into)).T)
    scorer = {"name": "value_aware", "norm": norm}
    caches = [CompressedCache(model, "prefixkv", scorer=scorer, budget=1.0) for model in (adapted, plain)]
    for model, cache in zip((adapted, plain), caches, strict=True):
        model(**inputs, **tiny.with_cache(cache))
    for layer in range(3):
        close(scores_of(caches[0], layer), scores_of(caches[1], layer))


class Stranger(torch.nn.Module):
    """An adapter whose effect is not a weight that anybody knows."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.gain = base, torch.nn.Parameter(torch.rand(base.weight.shape[0]))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) * self.gain


class Decomposed(LoRALinear):
    """A LoRA that PEFT would compute in another way (DoRA)."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base, ["a"])
        self.use_dora = {"a": True}


@pytest.mark.parametrize("adapter", [Stranger, Decomposed])
@pytest.mark.parametrize(
    ("fields", "way_out"), [({"scorer": "value_aware"}, "own_l2"), ({"evictor": "critical"}, "another evictor")]
)
@torch.no_grad()
def test_an_adapter_whose_weight_is_unknown_is_refused_by_the_policy_that_reads_it(
    adapter: Any, fields: dict[str, Any], way_out: str
) -> None:
    """And by no other."""
    model, inputs = tiny.build("llama"), tiny.inputs("llama", 12, seed=8)
    model.model.layers[1].self_attn.o_proj = adapter(model.model.layers[1].self_attn.o_proj)
    cache = CompressedCache(model, "prefixkv", **fields)
    says = rf"{next(iter(fields))} .*: layer 1: the output projection .*merge_and_unload.*{way_out}"
    with pytest.raises(UnsupportedModelError, match=says):
        model(**inputs, **tiny.with_cache(cache))
    for scorer in ({"name": "value_aware", "norm": "own_l2"}, "attention"):
        model(**inputs, **tiny.with_cache(CompressedCache(model, "prefixkv", scorer=scorer)))


# -- leverage, mixkv, rkv ----------------------------------------------------------------------------------------------


def standardised(scores: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """By head and slot, with the mean 0 and the deviation 1 over both."""
    mean = sum(scores.values()) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores.values()) / len(scores))
    return {key: (score - mean) / max(deviation, 1e-6) for key, score in scores.items()}


@given(layer=contexts, blend=st.sampled_from([0.0, 0.35, 2.0]), chunk=st.integers(1, 9))
def test_leverage_is_its_formula(layer: LayerContext, blend: float, chunk: int) -> None:
    """Keys turned back one by one, the inverse of a matrix, and a softmax over each query's chunk."""
    score = SCORERS.create("leverage", blend=blend, chunk=chunk).score(layer)
    kv_heads, tokens = layer.keys.shape[1:3]
    past, queries = tokens - layer.query.shape[2], layer.query.shape[2]
    group, frequencies = layer.query.shape[1] // kv_heads, layer.weights.inverse_frequencies
    for row in range(len(score)):
        leverages, attention = {}, {}
        for head in range(kv_heads):
            keys = layer.keys[row, head].double().clone()
            for slot, index in enumerate(layer.index[row, 0].tolist()):
                for pair, frequency in enumerate([] if frequencies is None else frequencies.double().tolist()):
                    point = complex(keys[slot, pair], keys[slot, pair + DIM // 2])
                    point *= complex(math.cos(index * frequency), -math.sin(index * frequency))
                    keys[slot, pair], keys[slot, pair + DIM // 2] = point.real, point.imag
            x = keys - keys.mean(0)
            inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(DIM, dtype=torch.double))
            leverages |= {(head, slot): float(x[slot] @ inverse @ x[slot]) for slot in range(tokens)}
            got = [0.0] * queries
            for q in range(queries):
                last = queries - 1 - (queries - 1 - q) // chunk * chunk
                own = range(max(0, last - chunk + 1), last + 1)
                for query in layer.query[row, head * group : (head + 1) * group, q].double():
                    weights = [math.exp(float(query @ layer.keys[row, head, past + k].double())) for k in own]
                    for k, weight in zip(own, weights, strict=True):
                        got[k] += weight / sum(weights) / group
            got = [own * float(layer.values[row, head, past + k].double().norm()) for k, own in enumerate(got)]
            pooled = [sum(got[max(0, k - 1) : k + 2]) / 3 for k in range(queries)]
            attention |= {(head, past + k): own for k, own in enumerate(pooled)}
        leverages, attention = standardised(leverages), standardised(attention)
        for (head, slot), own in leverages.items():
            expected = blend * own + attention.get((head, slot), 0.0)
            assert float(score[row, head, slot]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(layer=contexts)
def test_mixkv_is_its_formula(layer: LayerContext) -> None:
    """The mean cosine of all pairs of keys decides how much diversity counts against votes and norms."""
    score = SCORERS.create("mixkv", window=2, kernel=3).score(layer)
    votes = SnapKV(window=2, kernel=3).score(layer).double()
    for row in range(len(score)):
        for head in range(score.shape[1]):
            unit = torch.nn.functional.normalize(layer.keys[row, head].double(), dim=-1)
            count, own = len(unit), votes[row, head]
            pairs = [float(unit[a] @ unit[b]) for a in range(count) for b in range(count) if a != b]
            share = min(max(sum(pairs) / max(1, len(pairs)), 0.0), 0.999)
            mean = torch.nn.functional.normalize(unit.mean(0), dim=0)
            expected = (1 - share) * own
            for weight, kind in ((1 - share, layer.values[row, head].double().norm(dim=-1)), (share, -(unit @ mean))):
                above = kind - kind.min()
                if float(above.sum()) > 0:
                    expected = expected + weight * above / above.mean() * own.mean()
            if count > 2:  # else rounding decides: two keys are as far from their mean
                close(score[row, head], expected)


@given(layer=contexts, threshold=st.sampled_from([-0.5, 0.0, 0.5]), share=st.sampled_from([0.0, 0.07, 0.5, 1.0]))
def test_rkv_is_its_formula(layer: LayerContext, threshold: float, share: float) -> None:
    """Of the cosines of a key that are above the threshold, the one with the latest token does not count."""
    score = SCORERS.create("rkv", window=2, kernel=3, threshold=threshold, share=share).score(layer)
    votes = SnapKV(window=2, kernel=3, pool="max").score(layer).double()
    tokens = layer.keys.shape[2]
    for row in range(len(score)):
        for head in range(score.shape[1]):
            unit = torch.nn.functional.normalize(layer.keys[row, head].double(), dim=-1).tolist()
            mean = [0.0] * tokens
            for one in range(tokens):
                others = [slot for slot in range(tokens) if slot != one]
                cosine = {slot: sum(a * b for a, b in zip(unit[one], unit[slot], strict=True)) for slot in others}
                copies = [slot for slot in others if cosine[slot] > threshold]
                left_out = max(copies, key=lambda slot: int(layer.index[row, 0, slot]), default=None)
                for slot in others:
                    mean[slot] += cosine[slot] / tokens if slot != left_out else 0.0
            total = sum(math.exp(own) for own in mean)
            redundancy = torch.tensor([math.exp(own) / total for own in mean])
            close(score[row, head], share * votes[row, head] - (1 - share) * redundancy)


# -- random, position --------------------------------------------------------------------------------------------------


@given(layer=contexts, other=contexts, seed=st.integers(-(2**31) + 1, 2**31 - 1))
def test_noise_depends_on_seed_layer_head_and_token_alone(layer: LayerContext, other: LayerContext, seed: int) -> None:
    """The same token of the same layer and head scores the same, whatever else is there."""
    scorer = SCORERS.create("random", seed=seed)
    other = dataclasses.replace(other, layer=layer.layer)
    known: dict[tuple[int, int], float] = {}
    for given_layer in (layer, other):
        for index, heads in zip(given_layer.index[:, 0].tolist(), scorer.score(given_layer).tolist(), strict=True):
            for head, scores in enumerate(heads):
                for token, score in zip(index, scores, strict=True):
                    assert known.setdefault((head, token), score) == score


@given(tokens=st.integers(2, 24), cut=st.integers(1, 23), pad=st.integers(0, 5), seed=strategies.seeds)
def test_noise_is_the_same_in_chunks_and_batches(tokens: int, cut: int, pad: int, seed: int) -> None:
    """A prompt at once, in two chunks, and as the shorter row of a padded batch has the same scores."""
    model, config = tiny.model("llama"), CompressionConfig(budget=1.0, scorer={"name": "random", "seed": seed})
    ids = tiny.token_ids(2, tokens + pad, seed)
    whole, chunks, batch = (CompressedCache(model, config) for _ in range(3))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    with torch.no_grad():
        model(ids[:1, pad:], **tiny.with_cache(whole))
        for part in ids[:1, pad:].tensor_split((min(cut, tokens - 1),), dim=1):
            model(part, **tiny.with_cache(chunks))
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **tiny.with_cache(batch))
    for layer in range(3):
        expected = scores_of(whole, layer)
        assert torch.equal(scores_of(batch, layer)[:1, :, :tokens], expected)
        if tokens - cut != 1 and cut < tokens:  # a forward of one token scores nothing
            assert torch.equal(scores_of(chunks, layer), expected)


def test_noise_is_noise() -> None:
    """Uniform, and unrelated between seeds, layers, heads and neighbours."""
    layer = context(6, batch=1, kv_heads=3, queries=1, past=3999)
    layer = dataclasses.replace(layer, index=torch.arange(4000)[None, None])
    draws = [
        SCORERS.create("random", seed=seed).score(dataclasses.replace(layer, layer=number))[0]
        for seed, number in ((0, 0), (1, 0), (0, 1))
    ]
    noise = torch.cat(draws).double()
    assert float(noise.min()) > 0 and float(noise.max()) < 1
    counts = torch.stack([torch.histc(row, 20, 0, 1) for row in noise])
    assert float(((counts - 200).square() / 200).sum(1).max()) < 50  # chi-square of 19 degrees: 1 in 10,000
    related = torch.corrcoef(torch.cat([noise[:, 1:], noise[:, :-1]])) - torch.eye(18)
    related = related[:9].masked_fill(torch.eye(9, 18, dtype=torch.bool), 0)
    assert float(related.abs().max()) < 0.08


@given(seed=strategies.seeds, tokens=st.integers(5, 30))
def test_position_keeps_the_latest(seed: int, tokens: int) -> None:
    """With the first as a sink, the columns that stay are the last."""
    config = CompressionConfig(budget=4, scorer="position")
    cache = CompressedCache(tiny.model("llama"), config)
    with torch.no_grad():
        tiny.model("llama")(**tiny.inputs("llama", tokens, seed), **tiny.with_cache(cache))
    assert list(cache.report().positions(0, 0)) == [0, *range(tokens - 3, tokens)]


# -- wrong uses -------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("snapkv", {"kernel": 4}, "kernel: must be odd"),
    ("snapkv", {"window": 0}, "window"),
    ("lagkv", {"lag": 0}, "lag"),
    ("defensive", {"kernel": 2}, "kernel: must be odd"),
    ("leverage", {"blend": -1.0}, "blend"),
    ("rkv", {"share": 1.5}, "share"),
    ("attention", {"queries": "postvision"}, "queries"),
    ("attention", {"image_weight": -0.1}, "image_weight"),
    ("attention", {"text_weight": math.nan}, "text_weight"),
    ("expected_attention", {"future": 0}, "future"),
]


@pytest.mark.parametrize(("name", "fields", "says"), WRONG, ids=str)
def test_wrong_fields_are_refused_by_name(name: str, fields: dict[str, Any], says: str) -> None:
    """One line that names the field and what is allowed."""
    with pytest.raises(KVCompressError) as error:
        SCORERS.create(name, **fields)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.cuda
@every_scorer
def test_scores_on_a_gpu_are_those_of_the_cpu(scorer: Scorer) -> None:
    """The same layer on either device."""
    layer = context(9, queries=40)
    moved = {name: t.cuda() for name, t in vars(layer).items() if isinstance(t, Tensor)}
    weights = LayerWeights(layer.weights.output.cuda(), layer.weights.inverse_frequencies.cuda())
    score = scorer.score(dataclasses.replace(layer, **moved, weights=weights))
    assert score.is_cuda
    close(score.cpu(), scorer.score(layer), 1e-3)


def test_contexts_of_these_tests_have_the_kernels_log_sum_exp() -> None:
    """What scorers are shown here is what the engine shows them."""
    layer = context(10, past=0)
    _, lse = attention_with_mask(layer.query, layer.keys, layer.values, layer.scaling, None)
    close(layer.lse, lse)
