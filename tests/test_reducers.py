"""Reducers on random hidden states: counts, merging against plain loops, convexity, dropping, and their layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import REDUCERS, CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext
from kvcompress.policies.images import ImageGrid
from kvcompress.policies.reducers import (
    CDPruner,
    DivPrune,
    FastV,
    LightKV,
    PyramidDrop,
    RandomReducer,
    ToMe,
    UniformGrid,
    VisionZip,
)
from kvcompress.testing.image_rows import Row, rows
from tests import reduction_oracle, strategies
from tests.strategies import examples


def survivors(reduced: Reduced) -> list[int]:
    (row,) = reduced.into.tolist()
    return [token for token, into in enumerate(row) if into == token]


# -- merging -----------------------------------------------------------------------------------------------------------

rhos = st.one_of(st.sampled_from([0.0, 0.1, 0.29, 0.35, 0.5, 0.7, 1.0]), st.floats(0.0, 1.0))


@examples(60)
@given(drawn=rows(), across=st.integers(1, 4), rho=rhos, softmax=st.sampled_from(["keys", "queries"]))
def test_lightkv_is_the_plain_loop(drawn: Row, across: int, rho: float, softmax: Any) -> None:
    """Windows with a remainder, divergence, several tokens that go into one, guidance: steps 1 to 5 by hand."""
    reducer = LightKV(windows=(across,), after=(1,), rho=rho, softmax=softmax)
    weights = reducer.guidance(drawn.layer)[0]
    is_image = drawn.layer.is_image[0, 0].tolist()
    query, keys = drawn.layer.query[0], drawn.layer.keys[0]
    wanted = reduction_oracle.guidance(query, keys, is_image, drawn.layer.scaling, softmax)
    torch.testing.assert_close(weights.double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-6)
    windows = reduction_oracle.windows_of(drawn.places, drawn.sizes, across)
    into, states = reduction_oracle.merge(drawn.hidden, windows, rho, wanted)
    _assert_merged(drawn.by(reducer), into, states)


@examples(60)
@given(drawn=rows(), rho=rhos)
def test_tome_is_the_plain_loop_with_equal_weights_and_without_windows(drawn: Row, rho: float) -> None:
    windows = reduction_oracle.windows_of(drawn.places, drawn.sizes, None)
    into, states = reduction_oracle.merge(drawn.hidden, windows, rho, [1.0] * len(drawn.places))
    _assert_merged(drawn.by(ToMe(rho=rho)), into, states)


def _assert_merged(found: Reduced, into: dict[int, int], states: list[list[float]]) -> None:
    assert found.into.tolist() == [[into.get(token, token) for token in range(len(states))]]
    stay = survivors(found)
    torch.testing.assert_close(found.hidden[0, stay], torch.tensor(states)[stay], rtol=1e-4, atol=1e-5)


@examples(80)
@given(drawn=rows(largest=14), across=st.integers(1, 5), rho=rhos)
def test_every_window_loses_as_many_as_the_formula_says(drawn: Row, across: int, rho: float) -> None:
    """Of n tokens min(floor(rho n), floor(n / 2)) go; a grid of fewer than eight a window is left alone."""
    reduced = drawn.by(LightKV(windows=(across,), after=(1,), rho=rho))
    stay = set(survivors(reduced))
    windows = reduction_oracle.windows_of(drawn.places, drawn.sizes, across)
    for window in windows:
        gone = min(math.floor(rho * len(window) + 1e-6), len(window) // 2)
        assert len(stay.intersection(window)) == len(window) - gone
        assert all(reduced.into[0, token] in window for token in window)
    outside = set(range(len(drawn.places))).difference(*windows)
    assert outside <= stay
    assert torch.equal(reduced.hidden[0, sorted(outside)], drawn.hidden[sorted(outside)])


@pytest.mark.parametrize("count", [100, 576, 2880])
def test_a_share_that_comes_to_a_whole_number_is_that_number(count: int) -> None:
    """However its product is rounded."""
    row = _square(count, 1)
    for wanted in range(0, count // 2 + 1, max(1, count // 40)):
        assert len(survivors(ToMe(rho=wanted / count).reduce(row))) == count - wanted


@examples(40)
@given(drawn=rows(), across=st.integers(1, 2), guided=st.booleans())
def test_a_merged_state_is_a_convex_mean_of_its_sources(drawn: Row, across: int, guided: bool) -> None:
    """Its weights, recovered from the states, are non-negative and add up to 1; without guidance they are equal."""
    wide = torch.randn(len(drawn.places), 64, generator=strategies.generator(len(drawn.places)))
    weights = torch.rand(len(wide), generator=strategies.generator(1)) if guided else torch.zeros(len(wide))
    row = replace(drawn.row, hidden=wide[None], guidance=weights[None])
    reduced = LightKV(windows=(across,), after=(1,)).reduce(row)
    for token in survivors(reduced):
        sources = (reduced.into[0] == token).nonzero().flatten()
        state = reduced.hidden[0, token]
        if len(sources) == 1:
            assert torch.equal(state, wide[token])
            continue
        assert bool((state >= wide[sources].amin(0) - 1e-5).all() and (state <= wide[sources].amax(0) + 1e-5).all())
        found = torch.linalg.lstsq(wide[sources].double().T, state.double()[:, None]).solution.flatten()
        given = weights[sources].double() if guided else torch.ones(len(sources)).double()
        torch.testing.assert_close(found, given / given.sum(), rtol=0, atol=1e-4)


@examples(30)
@given(drawn=rows(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_states_keep_their_dtype_and_text_its_bits(drawn: Row, dtype: torch.dtype) -> None:
    row = replace(drawn.row, hidden=drawn.row.hidden.to(dtype), guidance=torch.rand(1, len(drawn.places)))
    for reducer in (
        LightKV(windows=(1,), after=(1,)),
        ToMe(),
        FastV(),
        PyramidDrop(),
        RandomReducer(),
        UniformGrid(),
        DivPrune(),
        CDPruner(),
    ):
        reduced = reducer.reduce(row)
        text = ~row.is_image
        assert reduced.hidden.dtype == dtype
        assert torch.equal(reduced.hidden[text], row.hidden[text])
        assert set(text[0].nonzero().flatten().tolist()) <= set(survivors(reduced))


def test_text_of_earlier_turns_guides_whatever_each_head_holds_of_it() -> None:
    """Heads that kept different tokens of an earlier turn each answer with their own text."""
    g = strategies.generator(3)
    query, keys = torch.randn(1, 4, 6, 4, generator=g), torch.randn(1, 2, 10, 4, generator=g)
    new = [True] * 5 + [False]
    is_image = torch.tensor([[[True, True, False, True, *new], [False, True, False, False, *new]]])
    context = LayerContext(
        0, query, keys, keys, None, 0.5, torch.arange(10).expand(1, 2, -1), torch.tensor([20]), None, is_image
    )
    for over in ("keys", "queries"):
        heads = [
            reduction_oracle.guidance(
                query[0, 2 * h : 2 * h + 2], keys[0, h : h + 1], is_image[0, h].tolist(), 0.5, over
            )
            for h in range(2)
        ]
        found = LightKV(softmax=over).guidance(context)
        torch.testing.assert_close(found[0], torch.tensor(heads).sum(0), rtol=1e-4, atol=1e-6)


def dropping(share: float) -> list[Any]:
    once = {"after": (1,), "keep_shares": (share,)}
    alike = [PyramidDrop(**once), RandomReducer(**once), UniformGrid(**once)]
    return [FastV(layer=1, drop=1 - share), *alike, DivPrune(drop=1 - share), CDPruner(drop=1 - share)]


# -- rows --------------------------------------------------------------------------------------------------------------


# -- the published numbers ---------------------------------------------------------------------------------------------


def cells_of(reducer: LightKV, grids: list[ImageGrid], layers: int) -> list[list[tuple[int, int, int]]]:
    """Grid, row and column of the image tokens that every layer gets."""
    cells = [
        (number, *place)
        for number, g in enumerate(grids)
        for place in itertools.product(range(g.height), range(g.width))
    ]
    found, points = [cells], reducer.acts_after(layers)
    for stage in range(len(points)):
        count = len(cells)
        table = torch.tensor(cells)
        row = ReductionContext(
            stage=stage,
            layer=0,
            hidden=torch.randn(1, count, 4, generator=strategies.generator(stage)),
            index=torch.arange(count)[None],
            is_image=torch.ones(1, count, dtype=torch.bool),
            grids=[grids],
            grid=table[None, :, 0],
            cell=table[None, :, 1:],
            size=torch.tensor([(grid.height, grid.width) for grid in grids])[table[None, :, 0]],
            image_tokens=[count],
            guidance=torch.ones(1, count),
        )
        cells = [cells[token] for token in survivors(reducer.reduce(row))]
        found.append(cells)
    return [found[sum(point <= layer for point in points)] for layer in range(layers)]


def counts_of(reducer: LightKV, grids: list[ImageGrid], layers: int) -> list[int]:
    """How many they are."""
    return list(map(len, cells_of(reducer, grids, layers)))


def test_the_published_plan() -> None:
    """576 tokens become 288, 144 and 72 after 12, 18 and 24 of 32 layers: 54.7 % in the mean."""
    counts = counts_of(LightKV(), [ImageGrid(0, 24, 24)], 32)
    assert counts == [576] * 12 + [288] * 6 + [144] * 6 + [72] * 8
    assert sum(counts) / 32 / 576 == pytest.approx(0.547, abs=5e-4)


@pytest.mark.parametrize(
    ("layers", "points"),
    [(32, (12, 18, 24)), (40, (15, 23, 31)), (24, (9, 14, 18)), (28, (11, 16, 21)), (4, (2, 3)), (3, (1, 2)), (1, ())],
)
def test_stages_are_the_papers_or_the_same_fractions_of_the_depth(layers: int, points: tuple[int, ...]) -> None:
    assert LightKV().acts_after(layers) == ToMe().acts_after(layers) == points


def test_windows_are_more_where_an_image_has_several_grids() -> None:
    """6, 4 and 2 a side for LLaVA-NeXT, 4, 2 and 1 for one grid an image; two images of one grid are not tiled."""
    for grids, windows in (
        ([ImageGrid(0, 24, 24), ImageGrid(0, 48, 42)], (6, 4, 2)),
        ([ImageGrid(0, 24, 24), ImageGrid(1, 24, 24)], (4, 2, 1)),
    ):
        assert cells_of(LightKV(), grids, 32) == cells_of(LightKV(windows=windows), grids, 32)
        assert cells_of(LightKV(), grids, 32) != cells_of(LightKV(windows=(5, 3, 2)), grids, 32)
    # 400 tokens are too few for eight in each of 8 x 8 windows, and enough for 7 x 7.
    assert counts_of(LightKV(windows=(8,), after=(1,)), [ImageGrid(0, 20, 20)], 2) == [400, 400]
    assert counts_of(LightKV(windows=(7,), after=(1,)), [ImageGrid(0, 20, 20)], 2)[1] < 400


@pytest.mark.parametrize("reducer", [LightKV, ToMe])
@pytest.mark.parametrize("layers", [3, 24, 32, 40])
@pytest.mark.parametrize("rho", [0.5, 0.2, 0.9])
def test_vision_retention_picks_the_nearest_plan(reducer: Any, layers: int, rho: float) -> None:
    """No three equally spaced reductions, no further apart than the default ones, come closer to it."""

    def average(plan: tuple[int, ...]) -> float:
        return sum((1 - min(rho, 0.5)) ** sum(point <= layer for point in plan) for layer in range(layers)) / layers

    widest = max(1, round(0.1875 * layers))
    plans = {
        tuple(point for point in (first, first + gap, first + 2 * gap) if point < layers)
        for gap in range(1, widest + 1)
        for first in range(1, layers + 1)
    }
    for wanted in (0.01, 0.2, 0.3, 0.42, 0.55, 0.7, 0.83, 0.95, 1.0):
        plan = reducer(vision_retention=wanted, rho=rho).acts_after(layers)
        assert plan in plans
        best = min(abs(average(other) - wanted) for other in plans)
        assert abs(average(plan) - wanted) == pytest.approx(best, abs=1e-9)
    counts = counts_of(LightKV(vision_retention=0.55), [ImageGrid(0, 24, 24)], 32)
    assert sum(counts) / 32 / 576 == pytest.approx(0.55, abs=0.01)


# -- dropping ----------------------------------------------------------------------------------------------------------


@examples(40)
@given(drawn=rows(), share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]))
def test_a_share_of_the_first_image_tokens_stays(drawn: Row, share: float) -> None:
    """Floor(share x image tokens there were at first), never more than there are; states do not change."""
    wanted = min(int(drawn.row.is_image.sum()), math.floor(share * drawn.row.image_tokens[0] + 1e-6))
    for reducer in dropping(share):
        reduced = drawn.by(reducer)
        stay = survivors(reduced)
        assert sum(drawn.image[token] for token in stay) == wanted
        assert all(into in (-1, token) for token, into in enumerate(reduced.into[0].tolist()))
        assert torch.equal(reduced.hidden[0, stay], drawn.hidden[stay])


@examples(40)
@given(drawn=rows(), share=st.sampled_from([0.25, 0.5]))
def test_fastv_and_pyramiddrop_keep_what_the_last_token_attends_to_most(drawn: Row, share: float) -> None:
    heads, kv_heads = drawn.layer.query.shape[1], drawn.layer.keys.shape[1]
    mean = torch.zeros(drawn.layer.keys.shape[2], dtype=torch.float64)
    for head in range(heads):
        keys = drawn.layer.keys[0, head // (heads // kv_heads)].double()
        logits = [float(key @ drawn.layer.query[0, head, -1].double()) * drawn.layer.scaling for key in keys]
        mean += torch.tensor([math.exp(x) for x in logits]).double() / sum(math.exp(x) for x in logits) / heads
    mean = mean[len(drawn.past) :]
    images = [token for token, image in enumerate(drawn.image) if image]
    for reducer in dropping(share)[:2]:
        torch.testing.assert_close(reducer.guidance(drawn.layer)[0].double(), mean, rtol=1e-4, atol=1e-6)
        stay = set(survivors(drawn.by(reducer)))
        wanted = sorted(images, key=lambda token: (-mean[token], token))[: len(stay.intersection(images))]
        assert stay.intersection(images) == set(wanted)


def check_greedy(stay: set[int], images: list[int], score: Callable[[int, list[int]], float], least: float) -> None:
    """Asserts that each next token kept scores, but for rounding, as much as any; until none scores the least."""
    chosen: list[int] = []
    while len(chosen) < len(stay):
        scores = {token: score(token, chosen) for token in images if token not in chosen}
        best = max(stay.difference(chosen), key=lambda token: scores[token])
        if max(scores.values()) < least:
            return
        assert scores[best] >= max(scores.values()) - 1e-4
        chosen.append(best)


@examples(25)
@given(drawn=rows(largest=7), drop=st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_divprune_keeps_what_is_farthest_from_the_nearest_kept(drawn: Row, drop: float) -> None:
    """At first what is farthest from its nearest other; distances are one minus the cosine."""
    states = [torch.nn.functional.normalize(state, dim=0) for state in drawn.hidden.double()]
    images = [token for token, image in enumerate(drawn.image) if image]

    def score(token: int, chosen: list[int]) -> float:
        others = chosen or [other for other in images if other != token]
        return min((1 - float(states[token] @ states[other]) for other in others), default=2.0)

    stay = set(survivors(drawn.by(DivPrune(drop=drop)))).intersection(images)
    assert len(stay) == min(len(images), math.floor((1 - drop) * drawn.row.image_tokens[0] + 1e-6))
    check_greedy(stay, images, score, least=0.0)


@examples(25)
@given(drawn=rows(largest=7), drop=st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_cdpruner_keeps_what_adds_most_volume_for_the_instruction(drawn: Row, drop: float) -> None:
    """Squared relevance times the squared distance of a state from the span of those kept, all of unit length."""
    states = torch.nn.functional.normalize(drawn.hidden.double(), dim=-1)
    images = [token for token, image in enumerate(drawn.image) if image]
    text = [token for token, image in enumerate(drawn.image) if not image]
    asks = [token for token in text if token > images[-1]] or text
    likeness = {token: sum(float(states[token] @ states[other]) for other in asks) / len(asks) for token in images}
    low, high = min(likeness.values()), max(likeness.values())
    relevance = {token: (own - low + 1e-6) / max(high - low, 1e-6) for token, own in likeness.items()}

    def score(token: int, chosen: list[int]) -> float:
        left = states[token]
        basis = torch.linalg.qr(states[chosen].T).Q if chosen else states[:0].T
        left = left - basis @ (basis.T @ left)
        return float(relevance[token] ** 2 * left.square().sum())

    stay = set(survivors(drawn.by(CDPruner(drop=drop)))).intersection(images)
    assert len(stay) == min(len(images), math.floor((1 - drop) * drawn.row.image_tokens[0] + 1e-6))
    check_greedy(stay, images, score, least=2e-3)


@examples(40)
@given(
    drawn=rows(largest=7), drop=st.sampled_from([0.0, 0.5, 0.8, 1.0]), contextual=st.sampled_from([0.0, 0.2, 0.5, 1.0])
)
def test_visionzip_is_the_plain_loop(drawn: Row, drop: float, contextual: float) -> None:
    """The highest attention stays; of the others, every so many-th takes up those whose keys are most like its own."""
    images = [token for token, image in enumerate(drawn.image) if image]
    attention, keys = drawn.tower[:, 0].tolist(), torch.nn.functional.normalize(drawn.tower[:, 1:].double(), dim=-1)
    keep = math.floor((1 - drop) * drawn.row.image_tokens[0] + 1e-6)
    merged = math.floor(keep * contextual + 0.5)
    dominant = sorted(images, key=lambda token: (-attention[token], token))[: keep - merged]
    others = [token for token in images if token not in dominant]
    targets = others[:: max(1, len(others) // max(1, merged))][:merged]
    into = {token: token for token in range(len(drawn.image))}
    for token in others:
        if token not in targets:
            likeness = [float(keys[token] @ keys[target]) for target in targets]
            into[token] = targets[likeness.index(max(likeness))] if targets else -1
    found = drawn.by(VisionZip(drop=drop, contextual=contextual))
    assert found.into[0].tolist() == list(into.values())
    for token, target in into.items():
        if token == target:
            comes = [other for other, to in into.items() if to == token]
            mean = drawn.hidden[comes].double().mean(0)
            torch.testing.assert_close(found.hidden[0, token].double(), mean, rtol=1e-5, atol=1e-6)


def test_random_depends_on_seed_and_place_alone_and_later_reductions_drop_more() -> None:
    drawn = _square(8)
    shares = [0.75, 0.5, 0.25]
    kept = [set(survivors(RandomReducer(after=(1,), keep_shares=(share,)).reduce(drawn))) for share in shares]
    assert kept[0] > kept[1] > kept[2]
    other = set(survivors(RandomReducer(after=(1,), keep_shares=(0.5,), seed=1).reduce(drawn)))
    assert other != kept[1]
    shifted = replace(drawn, hidden=drawn.hidden.flip(1))
    assert set(survivors(RandomReducer(after=(1,), keep_shares=(0.5,)).reduce(shifted))) == kept[1]


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("part", [2, 4])
def test_uniform_grid_keeps_as_many_in_every_part_of_the_image(side: int, part: int) -> None:
    """Each of part x part equal squares keeps the same number, to one; what stays later stayed before."""
    row, earlier = _square(side), set(range(side * side))
    for share in (0.5, 0.25, 1 / 16):
        stay = set(survivors(UniformGrid(after=(1,), keep_shares=(share,)).reduce(row)))
        assert stay <= earlier
        earlier, width = stay, side // part
        counts = [0] * part**2
        for token in stay:
            counts[token // side // width * part + token % side // width] += 1
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_uniform_grid_keeps_the_same_share_of_every_grid_and_of_what_has_none(share: float) -> None:
    """Base grid, tiles and line ends of LLaVA-NeXT, with text around them."""
    grids, number, cells = [ImageGrid(0, 8, 8), ImageGrid(0, 10, 12)], [-1] * 3, [(-1, -1)] * 3
    for index, grid in enumerate(grids):
        for line in range(grid.height):
            number += [index] * grid.width + [-1] * index
            cells += [(line, column) for column in range(grid.width)] + [(line, grid.width)] * index
    row = replace(
        _square(1),
        hidden=torch.zeros(1, len(number) + 2, 4),
        index=torch.arange(len(number) + 2)[None],
        is_image=torch.tensor([[False] * 3 + [True] * (len(number) - 3) + [False] * 2]),
        grids=[grids],
        grid=torch.tensor([[*number, -1, -1]]),
        cell=torch.tensor([[*cells, (-1, -1), (-1, -1)]]),
        size=torch.tensor([(-1, -1), *((grid.height, grid.width) for grid in grids)])[
            torch.tensor([[*number, -1, -1]]) + 1
        ],
        image_tokens=[len(number) - 3],
    )
    stay = set(survivors(UniformGrid(after=(1,), keep_shares=(share,)).reduce(row)))
    for index in (-1, 0, 1):
        own = {token for token in range(3, len(number)) if number[token] == index}
        assert abs(len(stay & own) - share * len(own)) <= 1


def _square(height: int, width: int | None = None) -> ReductionContext:
    width = width or height
    count = height * width
    token = torch.arange(count)
    return ReductionContext(
        stage=0,
        layer=0,
        hidden=torch.randn(1, count, 4, generator=strategies.generator(count)),
        index=token[None],
        is_image=torch.ones(1, count, dtype=torch.bool),
        grids=[[ImageGrid(0, height, width)]],
        grid=torch.zeros(1, count, dtype=torch.long),
        cell=torch.stack([token // width, token % width], 1)[None],
        size=torch.tensor([[height, width]]).expand(count, -1)[None],
        image_tokens=[count],
    )


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "lightkv", "after": [2], "vision_retention": 0.5}, "after and vision_retention .* give one of them"),
        ({"name": "tome", "after": [2], "vision_retention": 0.5}, "after and vision_retention .* give one of them"),
        ({"name": "lightkv", "after": [1, 2], "windows": [2]}, "after has 2 entries and windows 1; give as many"),
        ({"name": "random", "after": [1, 2]}, "after has 2 entries and keep_shares 3; give as many"),
        ({"name": "pyramiddrop", "keep_shares": [0.5]}, "after has 3 entries and keep_shares 1; give as many"),
        ({"name": "lightkv", "windows": [0]}, r"windows"),
        ({"name": "lightkv", "windows": []}, r"windows"),
        ({"name": "lightkv", "rho": 1.5}, r"rho"),
        ({"name": "lightkv", "vision_retention": 0}, r"vision_retention"),
        ({"name": "fastv", "layer": 0}, r"layer"),
        ({"name": "fastv", "drop": 1.1}, r"drop"),
        ({"name": "lightkv", "after": [1.5]}, r"after"),
        ({"name": "lightkv", "positions": "new"}, r"positions"),
    ],
)
def test_a_wrong_reducer_is_refused_with_the_argument(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CompressionConfig(reducer=fields)


@pytest.mark.parametrize("after", [(2, 1), (1, 1), (3,), (1, 5)])
def test_layers_that_the_decoder_does_not_have_are_refused(after: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"reducer lightkv: after=.* must ascend and stay below the 3 layers"):
        LightKV(after=after).acts_after(3)


@pytest.mark.parametrize("name", ["lightkv", "pyramiddrop"])
def test_before_the_first_layer_there_is_no_attention_to_read(name: str) -> None:
    fields = {"keep_shares": [0.5]} if name == "pyramiddrop" else {}
    reducer = REDUCERS.create(name, after=[0], **fields)
    with pytest.raises(ConfigError, match=rf"reducer {name}: after=\[0\]: it reads the attention .* begin with 1"):
        reducer.acts_after(3)


def test_no_layers_are_no_reduction() -> None:
    """An empty list is not the default."""
    assert LightKV(after=()).acts_after(32) == ()
