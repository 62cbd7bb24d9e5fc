"""Mergers: what each promises of a layer, against plain loops over its published formula, and through whole models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import MERGERS, Budget, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Evictor, Merger
from kvcompress.policies.context import MergeContext, Merged
from kvcompress.policies.mergers import CaM
from kvcompress.testing.running import started, stepped, with_budget
from tests import strategies, tiny
from tests.strategies import Scripted, examples, merge_contexts
from tests.test_batch import check_generate


def kind(merger: Any) -> str:
    """LOOK-M's rule, or the name of another merger."""
    return str(getattr(merger, "rule", merger.name))


every_merger = pytest.mark.parametrize("merger", strategies.mergers(), ids=strategies.label)
# What the others promise instead has a law of its own.
averaging = [merger for merger in strategies.mergers() if merger.name != "cam" and kind(merger) != "weighted"]
GRID = 2**16


def clone(layer: MergeContext) -> MergeContext:
    """The same layer in tensors of its own."""
    own = {name: value.clone() for name, value in vars(layer).items() if isinstance(value, Tensor)}
    return replace(layer, **own)


def reordered(layer: MergeContext, axis: int, index: Tensor) -> MergeContext:
    """The same layer with rows (axis 0) or slots (axis 2) picked in another order."""
    picked = {
        name: value.index_select(axis, index)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and value.ndim > axis
    }
    return replace(layer, **picked)


def same(found: Merged, wanted: Merged, where: Tensor, tolerance: float = 2e-6) -> None:
    """Asserts that two results agree on some slots, and on the state."""
    for one, other in ((found.keys, wanted.keys), (found.values, wanted.values)):
        torch.testing.assert_close(one[where], other[where], rtol=0, atol=tolerance)
    if found.state is not None or wanted.state is not None:
        torch.testing.assert_close(found.state, wanted.state, rtol=0, atol=tolerance, equal_nan=True)


# -- laws of all -------------------------------------------------------------------------------------------------------


@every_merger
@given(layer=merge_contexts())
def test_no_more_slots_change_than_take_up_something(merger: Merger, layer: MergeContext) -> None:
    """Each evicted slot reaches one kept slot of its own head, or as many as the merger says."""
    merged = merger.merge(layer)
    changed = ((merged.keys != layer.keys) | (merged.values != layer.values)).any(-1) & layer.kept
    assert (changed.sum(-1) <= layer.evicted.sum(-1) * getattr(merger, "reach", 1)).all()


@pytest.mark.parametrize("merger", averaging, ids=strategies.label)
@given(layer=merge_contexts())
def test_averages_stay_inside_the_hull(merger: Merger, layer: MergeContext) -> None:
    """Every channel lies between the least and the most that the head's slots had."""
    merged, held = merger.merge(layer), layer.kept | layer.evicted
    for found, given_ in ((merged.keys, layer.keys), (merged.values, layer.values)):
        low = given_.masked_fill(~held.unsqueeze(-1), torch.inf).amin(2, keepdim=True) - 1e-5
        high = given_.masked_fill(~held.unsqueeze(-1), -torch.inf).amax(2, keepdim=True) + 1e-5
        assert ((found >= low) & (found <= high))[layer.kept].all()


# -- against plain loops -----------------------------------------------------------------------------------------------

Formula = Callable[[Tensor, list[tuple[Tensor, float]]], Tensor]  # of a kept row and (evicted row, similarity or share)


def mean(k: Tensor, evicted: list[tuple[Tensor, float]]) -> Tensor:
    return (k + sum(e for e, _ in evicted)) / (len(evicted) + 1)


def mean_of_midpoints(k: Tensor, evicted: list[tuple[Tensor, float]]) -> Tensor:
    return (k + sum((k + e) / 2 for e, _ in evicted)) / (len(evicted) + 1)


def mean_by_similarity(k: Tensor, evicted: list[tuple[Tensor, float]]) -> Tensor:
    return (k + sum(s * e for e, s in evicted)) / (len(evicted) + 1)


def exponential_weights(k: Tensor, evicted: list[tuple[Tensor, float]]) -> Tensor:
    total = math.e + sum(math.exp(s) for _, s in evicted)
    return (math.e * k + sum(math.exp(s) * e for e, s in evicted)) / total


def mean_by_share(k: Tensor, evicted: list[tuple[Tensor, float]]) -> Tensor:
    return (k + sum(share * e for e, share in evicted)) / (1 + sum(share for _, share in evicted))


FORMULAS: dict[str, Formula] = {
    "nearest": mean,
    "average": mean,
    "pivotal": mean_of_midpoints,
    "weighted": mean_by_similarity,
    "mass": mean_by_share,
    "threshold": exponential_weights,
}
published = [merger for merger in strategies.mergers() if kind(merger) in FORMULAS]


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two keys in float64, 0 for a key of length 0."""
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if length else 0.0


def pivots(merger: Any, layer: MergeContext, row: int, head: int) -> list[tuple[int, int, float]]:
    """Each evicted slot of a head with its kept one and the cosine of their keys; those without one are left out."""
    keys, index = layer.keys[row, head].double(), layer.index[row, head].tolist()
    kept = sorted(layer.kept[row, head].nonzero().flatten().tolist(), key=index.__getitem__)
    image = [False] * len(index) if layer.is_image is None else layer.is_image[row, head].tolist()
    found = []
    for slot in layer.evicted[row, head].nonzero().flatten().tolist():
        mine = [k for k in kept if image[k] == image[slot] or not getattr(merger, "within_modality", False)]
        if merger.name == "nearest":
            mine.sort(key=lambda k: abs(index[k] - index[slot]))
        else:
            mine.sort(key=lambda k: -round(cosine(keys[k], keys[slot]) * GRID))  # stable: the earlier of equals
        if mine:
            found.append((slot, mine[0], cosine(keys[mine[0]], keys[slot])))
    return found


def moved(merger: Any, tau: float, similarities: list[float], decoding: bool) -> float:
    """The threshold after some tokens were evicted."""
    if not similarities:
        return tau
    average = sum(similarities) / len(similarities)
    return merger.beta * average + (1 - merger.beta) * tau if decoding and not math.isnan(tau) else average


def shares(layer: MergeContext, row: int, head: int, pairs: list[tuple[int, int, float]]) -> list[Any]:
    """The same pairs with the mass of the evicted in parts of the kept one's, which is at least the largest."""
    assert layer.importance is not None
    mass = layer.importance[row, head].double().nan_to_num(nan=0.0).tolist()
    pairs = [pair for pair in pairs if mass[pair[0]] > 0]
    most = {
        pivot: max(mass[pivot], *(mass[slot] for slot, other, _ in pairs if other == pivot)) for _, pivot, _ in pairs
    }
    return [(slot, pivot, mass[slot] / most[pivot]) for slot, pivot, _ in pairs]


def plain(merger: Any, layer: MergeContext, row: int, head: int) -> tuple[Tensor, Tensor, set[int], float]:
    """Keys and values of one head by the published formulas, slots that take up something, and tau (or NaN)."""
    pairs = pivots(merger, layer, row, head)
    tau = math.nan if layer.state is None else float(layer.state[row, head])
    if merger.name == "threshold":
        rounded = [round(similarity * GRID) / GRID for *_, similarity in pairs]
        tau = moved(merger, tau, rounded, layer.decoding)
        assume(all(s == tau or abs(s - tau) > 1e-4 for s in rounded))
        pairs = [pair for pair, s in zip(pairs, rounded, strict=True) if s >= tau]
    if kind(merger) == "mass":
        pairs = shares(layer, row, head, pairs)
    keys, values = layer.keys[row, head].double(), layer.values[row, head].double()
    new_keys, new_values, takers = keys.clone(), values.clone(), {pivot for _, pivot, _ in pairs}
    for pivot in takers:
        own = [(slot, similarity) for slot, other, similarity in pairs if other == pivot]
        for old, new in ((keys, new_keys), (values, new_values)):
            new[pivot] = FORMULAS[kind(merger)](old[pivot], [(old[slot], similarity) for slot, similarity in own])
    return new_keys, new_values, takers, tau


@pytest.mark.parametrize("merger", published, ids=strategies.label)
@examples(40)
@given(layer=merge_contexts())
def test_a_merger_is_its_published_formula(merger: Merger, layer: MergeContext) -> None:
    """Keys, values and state are those of plain loops, and slots that take up nothing are bit for bit the same."""
    merged = merger.merge(layer)
    for row in range(layer.kept.shape[0]):
        for head in range(layer.kept.shape[1]):
            keys, values, takers, tau = plain(merger, layer, row, head)
            kept = layer.kept[row, head]
            torch.testing.assert_close(merged.keys[row, head][kept].double(), keys[kept], rtol=0, atol=1e-5)
            torch.testing.assert_close(merged.values[row, head][kept].double(), values[kept], rtol=0, atol=1e-5)
            alone = [slot for slot in kept.nonzero().flatten().tolist() if slot not in takers]
            assert torch.equal(merged.keys[row, head, alone], layer.keys[row, head, alone])
            assert torch.equal(merged.values[row, head, alone], layer.values[row, head, alone])
            if merger.name == "threshold":
                assert merged.state is not None
                torch.testing.assert_close(float(merged.state[row, head]), tau, rtol=0, atol=1e-4, equal_nan=True)


def test_tiles_of_similarities_are_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tile, with equal keys in different tiles, the same kept slot is found: the first of them."""
    g = strategies.generator(0)
    keys = torch.randint(-1, 2, (2, 3, 400, 4), generator=g).float()
    index = torch.arange(400).expand(2, 3, 400)
    kept = torch.rand(2, 1, 400, generator=g).expand(2, 3, 400) < 0.3
    most = int(kept.sum(-1).max()), int((~kept).sum(-1).max())
    layer = MergeContext((0,), keys, torch.randn(keys.shape, generator=g), kept, ~kept, index, None, None, *most)
    whole = MERGERS.create("lookm").merge(layer)
    monkeypatch.setattr("kvcompress.policies.mergers.similarity._TILE_KEYS", 7)
    monkeypatch.setattr("kvcompress.policies.mergers.similarity._TILE_SIMILARITIES_CPU", 1)
    assert torch.equal(MERGERS.create("lookm").merge(layer).keys[kept], whole.keys[kept])


def test_rounding_does_not_decide_between_keys_that_are_equally_similar() -> None:
    """The same token as far before as after has a key that is turned as far; the earlier one is taken, always."""
    g = strategies.generator(0)
    pairs, angle = torch.randn(1, 300, 4, 2, generator=g), torch.rand(1, 300, 4, 1, generator=g) * 3
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1) * angle.sin()
    keys = [(pairs * angle.cos() + sign * turned).flatten(2) for sign in (-1, 0, 1)]
    layer = line(3, [1], most_evicted=2)
    wide = {"keys": torch.stack(keys, 2), "values": torch.randn(1, 300, 3, 8, generator=g)}
    spread = {name: getattr(layer, name).expand(1, 300, 3) for name in ("kept", "evicted", "index", "importance")}
    merged = MERGERS.create("lookm").merge(replace(layer, **wide, **spread))
    assert torch.equal(merged.values[:, :, 2], wide["values"][:, :, 2])


# -- single promises ---------------------------------------------------------------------------------------------------


def line(tokens: int, evicted: list[int], seed: int = 0, heads: int = 1, **more: Any) -> MergeContext:
    """One row whose slots lie in the order of their tokens, with random keys and values."""
    g, slots = strategies.generator(seed), torch.arange(tokens)
    gone = torch.isin(slots, torch.tensor(evicted, dtype=torch.long)).expand(1, heads, -1)
    fields = {
        "layers": (0,),
        "keys": torch.randn(1, heads, tokens, 8, generator=g),
        "values": torch.randn(1, heads, tokens, 8, generator=g),
        "kept": ~gone,
        "evicted": gone,
        "index": slots.expand(1, heads, -1),
        "importance": torch.ones(1, heads, tokens),
        "is_image": None,
        "most_kept": tokens - len(evicted),
        "most_evicted": len(evicted),
    }
    return MergeContext(**{**fields, **more})


def test_pivotal_with_one_evicted_token_is_three_to_one() -> None:
    """The mean of the pivot and the midpoint to the one evicted token."""
    layer = line(2, [1])
    merged = MERGERS.create("lookm", rule="pivotal").merge(layer)
    torch.testing.assert_close(merged.keys[:, :, 0], 0.75 * layer.keys[:, :, 0] + 0.25 * layer.keys[:, :, 1])
    torch.testing.assert_close(merged.values[:, :, 0], 0.75 * layer.values[:, :, 0] + 0.25 * layer.values[:, :, 1])


@pytest.mark.parametrize("rule", ["average", "pivotal", "weighted", "mass"])
def test_an_image_token_never_merges_into_text(rule: str) -> None:
    """However similar; with no image token kept it is dropped, and across modalities only on request."""
    layer = line(4, [1], is_image=torch.tensor([False, True, False, True]).expand(1, 1, 4))
    layer.keys[:, :, 0] = layer.keys[:, :, 1]
    for images_kept, within, taker in ((True, True, 3), (False, True, None), (True, False, 0)):
        kept = layer.kept.clone()
        kept[:, :, 3] = images_kept
        layer_ = replace(layer, kept=kept)
        merged = MERGERS.create("lookm", rule=rule, within_modality=within).merge(layer_)
        changed = (merged.values != layer.values).any(-1)[0, 0]
        assert [slot for slot in (0, 2, 3) if changed[slot]] == ([] if taker is None else [taker])


def test_by_mass_what_nobody_looked_at_changes_nothing() -> None:
    """And a kept token that nobody looked at, which was protected, counts as much as the most that it takes up."""
    layer = line(4, [1, 3])
    layer.keys[:, :, [1, 3]] = layer.keys[:, :, [0, 2]]
    importance = torch.tensor([3.0, 1.0, 0.0, 0.5]).view(1, 1, 4)
    merged = MERGERS.create("lookm", rule="mass").merge(replace(layer, importance=importance))
    v = layer.values[0, 0]
    torch.testing.assert_close(merged.values[0, 0, 0], 0.75 * v[0] + 0.25 * v[1])
    torch.testing.assert_close(merged.values[0, 0, 2], (v[2] + v[3]) / 2)
    for nothing in (0.0, torch.nan):
        none = importance.masked_fill(importance == 1.0, nothing)
        merged = MERGERS.create("lookm", rule="mass").merge(replace(layer, importance=none))
        assert torch.equal(merged.values[0, 0, 0], v[0])


@pytest.mark.parametrize("scorer", [None, "key_norm"])
def test_a_rule_by_mass_wants_a_scorer_of_mass(scorer: str | None) -> None:
    """Without one it is refused by name, and what gives mass is said; by the other rules nothing is read of scores."""
    evictor = {"evictor": "streaming"} if scorer is None else {}
    fields = {"budget": 0.2, "scorer": scorer, "allocator": "uniform", **evictor}
    CompressionConfig.model_validate({**fields, "merger": "lookm"})
    with pytest.raises(ValueError, match=r"merger lookm: reads shares of mass.*choose a scorer of mass.*attention"):
        CompressionConfig.model_validate({**fields, "merger": {"name": "lookm", "rule": "mass"}})


def test_nearest_prefers_the_earlier_of_two() -> None:
    """At the same distance; and the ends of the row merge inwards."""
    layer = line(7, [0, 2, 6])
    merged = MERGERS.create("nearest").merge(layer)
    v = layer.values[0, 0]
    torch.testing.assert_close(merged.values[0, 0, 1], (v[0] + v[1] + v[2]) / 3)
    assert torch.equal(merged.values[0, 0, 3:5], v[3:5])
    torch.testing.assert_close(merged.values[0, 0, 5], (v[5] + v[6]) / 2)


@given(beta=st.sampled_from([0.0, 0.3, 0.7, 1.0]), steps=st.integers(1, 6), seed=strategies.seeds)
def test_the_threshold_follows_plain_loops_over_a_prompt_and_decode_steps(beta: float, steps: int, seed: int) -> None:
    """A mean at first, then a moving average; and what stays below it changes nothing."""
    merger = MERGERS.create("threshold", beta=beta)
    layer = line(12, [3, 4, 8], seed, heads=2)
    tau = [math.nan, math.nan]
    state = None
    for number in range(steps + 1):
        layer = replace(layer, state=state)
        merged = merger.merge(layer)
        for head in range(2):
            pairs = pivots(merger, layer, 0, head)
            rounded = [round(similarity * GRID) / GRID for *_, similarity in pairs]
            tau[head] = moved(merger, tau[head], rounded, layer.decoding)
            takers = {pivot for (_, pivot, _), s in zip(pairs, rounded, strict=True) if s >= tau[head] + 1e-4}
            below = {pivot for (_, pivot, _), s in zip(pairs, rounded, strict=True) if s < tau[head] - 1e-4}
            changed = (merged.values != layer.values).any(-1)[0, head]
            assert all(changed[slot] for slot in takers)
            assert not any(changed[slot] for slot in below - {pivot for _, pivot, s in pairs if s >= tau[head] - 1e-4})
        state = merged.state
        torch.testing.assert_close(state, torch.tensor([tau]), rtol=0, atol=1e-4)
        layer = line(12, [(5 * number) % 12], seed + number + 1, heads=2, decoding=True)


# -- cam ---------------------------------------------------------------------------------------------------------------


@given(layer=merge_contexts(), reach=st.integers(1, 8), seed=strategies.seeds)
def test_cam_changes_values_alone(layer: MergeContext, reach: int, seed: int) -> None:
    """Keys are bit for bit what they were."""
    assert torch.equal(CaM(reach=reach, seed=seed).merge(layer).keys, layer.keys)


@examples(60)
@given(layer=merge_contexts(), reach=st.integers(1, 8), seed=strategies.seeds)
def test_cam_spreads_values_as_plain_loops_do(layer: MergeContext, reach: int, seed: int) -> None:
    """Given the same draws: equal shares for the kept tokens that follow, and no share for any other."""
    merger = CaM(reach=reach, seed=seed)
    found = merger.merge(layer).values
    assert layer.importance is not None
    for row in range(layer.kept.shape[0]):
        for head in range(layer.kept.shape[1]):
            index, score = layer.index[row, head].tolist(), layer.importance[row, head].tolist()
            kept = layer.kept[row, head].nonzero().flatten().tolist()
            wanted = layer.values[row, head].double().clone()
            takers = set()
            for slot in layer.evicted[row, head].nonzero().flatten().tolist():
                following = sorted((k for k in kept if index[k] > index[slot]), key=index.__getitem__)[:reach]
                known = [score[k] for k in following if not math.isnan(score[k])]
                if not known or math.isnan(score[slot]) or not score[slot]:
                    continue
                least = sum(known) / len(known)
                draws = torch.zeros(1, head + 1, 1, dtype=torch.long) + index[slot]
                own = layer.layers[row * len(layer.layers) // len(layer.kept)]
                draw = float(merger._draws((own,), draws)[0, head, 0])
                if least == 0 or draw < score[slot] / least:
                    takers.update(following)
                    for k in following:
                        wanted[k] += layer.values[row, head, slot].double() / len(following)
            torch.testing.assert_close(found[row, head, kept].double(), wanted[kept], rtol=0, atol=1e-5)
            alone = [slot for slot in kept if slot not in takers]
            assert torch.equal(found[row, head, alone], layer.values[row, head, alone])


@given(layer=merge_contexts(decoding=False), reach=st.integers(1, 8))
def test_cam_conserves_values_that_are_sure_to_merge(layer: MergeContext, reach: int) -> None:
    """With as much attention as the tokens that follow, every value that has one after it is still there in full."""
    layer = replace(layer, importance=torch.ones(layer.kept.shape))
    last = layer.index.masked_fill(~layer.kept, -1).amax(-1, keepdim=True)
    dropped = layer.evicted & (layer.index > last)
    held = (layer.kept | layer.evicted) & ~dropped
    found, before = (
        (values * slots.unsqueeze(-1)).sum(2)
        for values, slots in ((CaM(reach=reach).merge(layer).values, layer.kept), (layer.values, held))
    )
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8])
def test_cam_merges_as_often_as_attention_says(share: float) -> None:
    """Of many evicted tokens with so much of their followers' attention, that share is merged, in every head anew."""
    tokens = torch.arange(2000)
    importance = torch.where(tokens % 2 == 0, share, 1.0).expand(1, 4, -1)
    layer = line(2000, tokens[::2].tolist(), heads=4, importance=importance)
    changed = {}
    for seed, number in ((0, 0), (1, 0), (0, 1)):
        values = CaM(reach=1, seed=seed).merge(replace(layer, layers=(number,))).values
        changed[seed, number] = (values != layer.values).any(-1)[0, :, 1::2]
        assert abs(float(changed[seed, number].float().mean()) - share) < 0.03
    draws = torch.stack([heads.float() for heads in changed.values()]).flatten(0, 1)
    if share:  # neither heads nor seeds nor layers draw the same
        assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.12


# -- through a model ---------------------------------------------------------------------------------------------------


class Pour(Merger):
    """Pours keys and values of whatever goes into the row's first kept token, so that their sums stay as they are."""

    name: ClassVar[str] = "pour"

    @property
    def merges_decoding(self) -> bool:
        return True

    def merge(self, layer: MergeContext) -> Merged:
        assert layer.evicted.any() and not (layer.kept & layer.evicted).any()
        assert ((layer.kept | layer.evicted) == (layer.index >= 0)).all()
        assert layer.kept.sum(-1).max() <= layer.most_kept and layer.evicted.sum(-1).max() <= layer.most_evicted
        assert (layer.evicted.sum(-1) == layer.evicted.sum(-1)[:, :1]).all()
        if layer.importance is not None and not layer.decoding:
            assert layer.importance.isfinite().all()
        elif layer.importance is not None:  # Scripted scores are at least 1
            known = layer.importance[layer.index.ge(0) & (layer.index < 12)]
            assert (known >= 1).all()
        first = layer.index.masked_fill(~layer.kept, 2**31).argmin(-1, keepdim=True).unsqueeze(-1)
        new = []
        for tensor in (layer.keys, layer.values):
            gone = (tensor * layer.evicted.unsqueeze(-1)).sum(2, keepdim=True)
            new.append(tensor.scatter_add(2, first.expand_as(gone), gone))
        return Merged(new[0], new[1])


def check_sums(cache: CompressedCache, ids: list[Tensor]) -> None:
    """What layer 0 holds of each row adds up to all its tokens' values, which no attention has touched."""
    model, own = tiny.model("llama"), cache.layers[0]
    layer, values = model.model.layers[0], own.store.dense()[1]
    held = (cache._state.index_of(own) >= 0).unsqueeze(-1)
    values = values[:, :, : held.shape[2]]
    with torch.no_grad():
        for row, tokens in enumerate(ids):
            hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
            wanted = layer.self_attn.v_proj(hidden).sum(0).view(values.shape[1], -1)
            found = (values[row] * held[row, :, : values.shape[2]]).sum(1)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("evictor", strategies.bounded_evictors(), ids=strategies.label)
@pytest.mark.parametrize("allocator", ["uniform", "prefix"])
@examples(4)
@given(budget=st.sampled_from([0.3, 0.6, 8]), short=st.integers(12, 20), seed=strategies.seeds)
def test_everything_that_goes_is_merged_once(
    allocator: str, evictor: Evictor, budget: Any, short: int, seed: int
) -> None:
    """After a prompt, a turn, decode steps, and drafts that were taken back in part."""
    budget = Budget.parse(budget, default=Budget(tokens=1, sink=1, recent=2))
    policies = {"scorer": Scripted(seed=seed), "allocator": allocator, "evictor": evictor, "merger": Pour()}
    config = CompressionConfig(budget=budget, **policies)
    lengths = [20, short]
    cache, valid = started(tiny.model("llama"), config, lengths, seed)
    ids = [row[20 - length :] for row, length in zip(tiny.token_ids(2, 20, seed), lengths, strict=True)]
    check_sums(cache, ids)

    def go(tokens: int, kept: int | None = None) -> None:
        nonlocal valid, ids
        valid = stepped(tiny.model("llama"), cache, valid, seed, tokens)
        new = tiny.token_ids(2, tokens, seed)[:, :kept]
        ids = [torch.cat([row, more]) for row, more in zip(ids, new, strict=True)]

    for tokens in (1, 1, 1, 4, 1, 1):
        go(tokens)
        check_sums(cache, ids)
    for tokens, kept in ((5, 2), (1, 1), (1, 0), (3, 3)):
        cache.activate_past_recording()
        go(tokens, kept)
        cache.crop(kept - tokens)
        valid = valid[:, : valid.shape[1] - tokens + kept]
        check_sums(cache, ids)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    valid, ids = valid[[1, 0, 1]], [ids[1], ids[0], ids[1]]
    for number in range(3):
        valid = stepped(tiny.model("llama"), cache, valid, number)
        ids = [torch.cat([row, more]) for row, more in zip(ids, tiny.token_ids(3, 1, number), strict=True)]
        check_sums(cache, ids)


PATHS = {
    "oldest": {"name": "topk", "granularity": "layer", "decode": "oldest"},
    "lowest_score by head": {"name": "topk", "granularity": "head", "decode": "lowest_score"},
}


@every_merger
@pytest.mark.parametrize("path", PATHS)
def test_decode_steps_merge_only_where_the_merger_says_so(path: str, merger: Merger) -> None:
    """Of the tokens that a step leaves, some change if the merger merges decode steps, and none otherwise."""
    config = CompressionConfig(budget=12, scorer="attention", evictor=PATHS[path], merger=merger)
    cache, valid = started(tiny.model("llama"), config, [30, 25], seed=1)
    changed = 0
    for number in range(10):
        before = stored(cache)
        valid = stepped(tiny.model("llama"), cache, valid, seed=number)
        after = stored(cache)
        changed += sum(not torch.equal(before[token], after[token]) for token in before.keys() & after.keys())
    assert bool(changed) == merger.merges_decoding


def stored(cache: CompressedCache) -> dict[tuple[int, int, int, int], Tensor]:
    """Keys and values by layer, row, head and column."""
    found = {}
    for layer, own in enumerate(cache.layers):
        both = torch.cat([own.keys, own.values], -1)
        columns = (
            cache._state.sequence.positions_of(cache._state.index_of(own))[..., : both.shape[2]]
            .expand(both.shape[:3])
            .tolist()
        )
        for row, heads in enumerate(columns):
            for head, slots in enumerate(heads):
                found |= {(layer, row, head, c): both[row, head, i].clone() for i, c in enumerate(slots) if c >= 0}
    return found


@pytest.mark.parametrize("path", PATHS)
def test_a_threshold_lives_with_its_rows(path: str) -> None:
    """It moves with decode steps, is counted in bytes, follows its row, is copied with the cache and reset with it."""
    config = CompressionConfig(budget=12, scorer="attention", evictor=PATHS[path], merger="threshold")
    cache, valid = started(tiny.model("llama"), config, [30, 25], seed=2)

    def states(cache: CompressedCache) -> list[Tensor | None]:
        return [layer.merger_state for layer in cache.layers]

    first = [tau.clone() for tau in states(cache) if tau is not None]
    assert [tau.shape for tau in first] == [(2, 2)] * 3 and all(tau.isfinite().all() for tau in first)
    stepped(tiny.model("llama"), cache, valid, seed=3)
    second = [tau.clone() for tau in states(cache) if tau is not None]
    assert all((one != other).all() for one, other in zip(first, second, strict=True))
    other = copy.deepcopy(cache)
    without = CompressedCache(tiny.model("llama"), config.override(merger=None))
    cache.batch_select_indices(torch.tensor([1]))
    for tau, both in zip(states(cache), second, strict=True):
        assert torch.equal(tau, both[1:])
    assert all(map(torch.equal, states(other), second))
    cache.reset()
    assert states(cache) == [None] * 3
    model = tiny.model("llama")
    with torch.no_grad():
        for mine in (cache, without):
            model(**tiny.inputs("llama", 30, seed=4), **tiny.with_cache(mine))
    assert cache.report().index_bytes == without.report().index_bytes + 3 * 2 * 4


@every_merger
@pytest.mark.parametrize("name", ["llama", "llava"])
@examples(2)
@given(budget=st.sampled_from([0.3, 0.5, 9]), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3))
def test_a_left_padded_row_merges_as_alone(name: str, merger: Merger, budget: Any, lengths: list[int]) -> None:
    """With heads that keep different tokens and lose them by score, and with an image in every row."""
    evictor = {"name": "topk", "granularity": "head", "decode": "lowest_score"}
    config = CompressionConfig(scorer="attention", allocator="prefix", evictor=evictor, merger=merger)
    rows = [tiny.inputs(name, tokens, sum(lengths) + number) for number, tokens in enumerate(lengths)]
    check_generate(name, with_budget(config, budget), rows)


def test_cam_needs_a_scorer_of_mass() -> None:
    """Ratios of scores that do not add up mean nothing."""

    class Ranks(Scripted):
        mass: ClassVar[bool] = False

    with pytest.raises(
        KVCompressError, match=r"merger cam: reads shares of mass, but the scores of the scorer scripted are"
    ):
        CompressionConfig(scorer=Ranks(), merger="cam")
    assert CompressionConfig(scorer=Ranks(), merger="nearest").merger == MERGERS.create("nearest")


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_merger_that_returns_other_slots_is_named_with_its_layer(part: str) -> None:
    """Keys and values come back in the shape and dtype they went in."""

    class Short(Pour):
        name: ClassVar[str] = "short"

        def merge(self, layer: MergeContext) -> Merged:
            return replace(Merged(layer.keys, layer.values), **{part: getattr(layer, part).double()})

    config = CompressionConfig(budget=5, scorer="attention", merger=Short())
    cache = CompressedCache(tiny.model("llama"), config)
    with (
        pytest.raises(PolicyError, match=f"merger short: layers 0 to 2: must return {part} as torch.float32"),
        torch.no_grad(),
    ):
        tiny.model("llama")(**tiny.inputs("llama", 20, seed=1), **tiny.with_cache(cache))


@pytest.mark.parametrize("shape", [(), (5,), (12,)])
def test_a_state_that_is_not_of_the_rows_is_refused(shape: tuple[int, ...]) -> None:
    """Layers that were merged together each get their own rows of it back, so that nothing else can be divided."""

    class Odd(Pour):
        name: ClassVar[str] = "odd"

        def merge(self, layer: MergeContext) -> Merged:
            return Merged(layer.keys, layer.values, torch.zeros(shape))

    cache = CompressedCache(tiny.model("llama"), CompressionConfig(budget=5, scorer="attention", merger=Odd()))
    says = r"merger odd: layers 0 to 2: must return a state whose first axis is of the 3 rows"
    with pytest.raises(PolicyError, match=says), torch.no_grad():
        tiny.model("llama")(**tiny.inputs("llama", 20, seed=1), **tiny.with_cache(cache))
