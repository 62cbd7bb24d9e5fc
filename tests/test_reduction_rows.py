"""The tokens that go on from layer to layer, all rows at once: against rows alone, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.cache.reduction import Reduction
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext
from kvcompress.policies.reducers import (
    CDPruner,
    DivPrune,
    FastV,
    LightKV,
    PyramidDrop,
    RandomReducer,
    ToMe,
    UniformGrid,
)
from kvcompress.testing.image_rows import Row, layout_of, reduction_of, rows, side_by_side
from tests.strategies import examples

LAYERS, POINTS, WIDTH = 6, (1, 3, 4), 6
REDUCERS: list[Reducer] = [
    LightKV(after=POINTS, windows=(2, 1, 1)),
    LightKV(after=POINTS, softmax="queries", positions="contiguous"),
    ToMe(after=POINTS, rho=0.4),
    FastV(layer=3, drop=0.7, positions="contiguous"),
    PyramidDrop(after=POINTS),
    RandomReducer(after=POINTS, keep_shares=(0.8, 0.5, 0.1)),
    UniformGrid(after=POINTS),
    RandomReducer(after=(0, 3, 4), keep_shares=(0.8, 0.5, 0.1), positions="contiguous"),
    DivPrune(drop=0.7),
    CDPruner(drop=0.7, positions="contiguous"),
    CDPruner(after=3),
]
every_reducer = pytest.mark.parametrize("reducer", REDUCERS, ids=str)


@dataclass
class Passage:
    """What came of a forward through six layers that let tokens pass one by one, and attend for the reducer alone.

    Attributes:
        seen: for each row, what each layer after a reduction got: states, numbers and positions of its tokens.
        into: for each row, what each of its tokens was part of after each reduction, by number in the row.
        spread: for each row, what came out of the last layer for its tokens, in the order of the prompt.
        elsewhere: what came out in columns of padding.
        counts: operations that are no views, by name, of everything that the reduction did.
        waits: how often the host read from the device meanwhile.
    """

    seen: list[list[tuple[Tensor, list[int], list[int]]]]
    into: list[list[list[int]]] = field(default_factory=list)
    spread: list[Tensor] = field(default_factory=list)
    elsewhere: list[Tensor] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    waits: int = 0


def run(reducer: Reducer, drawn: list[Row], right: bool = False) -> Passage:
    """Takes rows through the layers, padded on either side as the model sees them."""
    layout, plain = layout_of(drawn), reduction_of(drawn)
    points = reducer.acts_after(LAYERS)
    lengths = [len(row.grid) for row in drawn]
    longest = max(lengths)
    valid = None if min(lengths) == longest else plain.index >= 0
    columns = torch.arange(longest).repeat(len(drawn), 1)
    order = None
    if right:  # the model has a row's first token in its first column
        order = torch.stack([torch.arange(longest).roll(longest - length) for length in lengths])
    of_columns = columns if order is None else order
    positions = plain.index.clamp(min=0)
    hidden = torch.empty_like(plain.hidden).scatter(1, of_columns.unsqueeze(-1).expand_as(plain.hidden), plain.hidden)
    positions = torch.empty_like(positions).scatter(1, of_columns, positions)
    found = Passage([[] for _ in drawn])
    with counted(found):
        reduction = Reduction(
            reducer, points, layout, index=plain.index, valid=valid, is_image=plain.is_image, order=order
        )
    for layer in range(LAYERS):
        if layer in points:
            with counted(found):
                hidden = reduction.reduce(layer, hidden)
                reduction.of_the_tokens(positions[:1])
            mine = reduction.of_the_tokens(positions)
        if layer >= points[0]:
            tokens = reduction.row_tokens
            assert tokens is not None
            for row, (number, own) in enumerate(zip(tokens, found.seen, strict=True)):
                index = reduction.index[row, -number:].tolist()
                own.append((hidden[row, -number:], index, mine[row, -number:].tolist()))
        states = hidden
        if layer < points[0] and order is not None:  # a cache sees them aligned
            states = hidden.gather(1, order.unsqueeze(-1).expand_as(hidden))
        if reduction.observes(layer):
            context = attention(layer, states, reduction, [row.image for row in drawn])
            with counted(found):
                reduction.observe(context)
        hidden = hidden + torch.sin(hidden.roll(1, -1) * (layer + 2))
    with counted(found):
        full = reduction.spread(hidden)
    for row, length in enumerate(lengths):
        mask = torch.zeros(longest, dtype=torch.bool)
        mask[of_columns[row, longest - length :]] = True
        found.spread.append(full[row, mask])
        found.elsewhere.append(full[row, ~mask])
        first = longest - length
        assert all(reduction.into[point][row, :first].tolist() == list(range(first)) for point in points)
        into = [reduction.into[point][row, first:] for point in reducer.acts_after(LAYERS)]
        found.into.append([torch.where(one < 0, one, one - first).tolist() for one in into])
    return found


def attention(layer: int, states: Tensor, reduction: Reduction, images: list[list[bool]]) -> LayerContext:
    """A layer whose queries and keys are slices of the states."""
    query = torch.stack([states[..., :4], states[..., 2:], states[..., 1:5], states[..., :4] * 2], 1)
    keys, index = query[:, :2].flip(-1), reduction.index
    image = side_by_side([torch.tensor([*row, False]) for row in images])  # the last is padding's
    missing = torch.tensor([image.shape[1] - 1 - len(row) for row in images])[:, None]
    is_image = image.gather(1, torch.where(index < 0, image.shape[1] - 1, index + missing)) == 1
    return LayerContext(
        layer=layer,
        query=query,
        keys=keys,
        values=keys,
        lse=None,
        scaling=0.7,
        index=index.unsqueeze(1),
        seen=torch.tensor(list(map(len, images))),
        valid=None if reduction.valid is None else reduction.valid.unsqueeze(1),
        is_image=is_image.unsqueeze(1),
    )


_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "repeat_interleave", "bincount")


@contextmanager
def counted(found: Passage) -> Iterator[None]:
    """Counts operations, and reads of the device: those that have to know what a tensor holds."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            found.counts[name] += not func.is_view
            masks = name.startswith("index") and any(
                isinstance(one, Tensor) and one.dtype == torch.bool
                for many in args
                if isinstance(many, list | tuple)
                for one in many
            )
            found.waits += masks or name.lstrip("_").startswith(tuple(word.lstrip("_") for word in _WAITING))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, Count():
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, _counting(getattr(Tensor, name), found))
        yield


def _counting(method: Any, found: Passage) -> Any:
    def call(self: Tensor) -> Any:
        found.waits += 1
        return method(self)

    return call


def sample(count: int, padded: bool) -> list[Row]:
    """LLaVA-NeXT's grids with text around them; every second row has more of it."""
    found = []
    for number in range(count):
        row = Row([(0, 6, 6), (0, 8, 7)], [-1] * 3, [(-1, -1)] * 3, [False] * 3, [], 2, 0, number)
        for grid, (_, height, width) in enumerate(row.grids):
            for line in range(height):
                row.grid += [grid] * width + [-1] * grid  # the second has line ends
                row.cell += [(line, column) for column in range(width + grid)]
                row.image += [True] * (width + grid)
        text = 4 + 3 * (padded and number % 2 == 0)
        row.grid += [-1] * text
        row.cell += [(-1, -1)] * text
        row.image += [False] * text
        found.append(row)
    return found


# -- rows --------------------------------------------------------------------------------------------------------------


@every_reducer
@examples(5)
@example(drawn=sample(3, True), right=False)
@example(drawn=sample(3, True), right=True)
@given(drawn=st.lists(rows(largest=7), min_size=1, max_size=4), right=st.booleans())
def test_a_row_goes_on_as_it_would_alone(reducer: Reducer, drawn: list[Row], right: bool) -> None:
    """States, numbers and positions at every layer, what became of each token, and what comes out at the end."""
    drawn = [replace(row, past=[], gone=0) for row in drawn]
    together = run(reducer, drawn, right)
    for number, row in enumerate(drawn):
        alone = run(reducer, [row])
        assert together.into[number] == alone.into[0]
        for mine, wanted in zip(together.seen[number], alone.seen[0], strict=True):
            assert mine[1:] == wanted[1:]
            torch.testing.assert_close(mine[0], wanted[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(together.spread[number], alone.spread[0], rtol=0, atol=1e-3)
        assert not together.elsewhere[number].any()


@every_reducer
@examples(5)
@given(drawn=rows(largest=7))
def test_what_goes_on_is_what_is_part_of_itself(reducer: Reducer, drawn: Row) -> None:
    """Tokens of each layer, their positions, and their columns at the end; all others come out as zero."""
    found, contiguous = run(reducer, [replace(drawn, past=[], gone=0)]), reducer.positions == "contiguous"
    points = reducer.acts_after(LAYERS)
    for layer, (_, index, positions) in enumerate(found.seen[0], points[0]):
        into = found.into[0][sum(point <= layer for point in points) - 1]
        assert index == [token for token, target in enumerate(into) if target == token]
        assert positions == (list(range(len(index))) if contiguous else index)
        assert set(into) <= {-1, *index}
    last = found.seen[0][-1]
    gone = sorted(set(range(len(drawn.grid))).difference(last[1]))
    assert torch.equal(found.spread[0][last[1]], last[0] + torch.sin(last[0].roll(1, -1) * (LAYERS + 1)))
    assert not found.spread[0][gone].any()


# -- what it costs -----------------------------------------------------------------------------------------------------


@every_reducer
def test_operations_do_not_grow_with_the_batch_and_the_host_waits_once_a_stage(reducer: Reducer) -> None:
    """And once before; one row alone is spared the sums that say where each of several rows begins."""
    one, stages = run(reducer, sample(1, False)), len(reducer.acts_after(LAYERS))
    assert one.waits == stages + 1
    few, many = (run(reducer, sample(count, False)) for count in (4, 16))
    assert few.counts == many.counts, many.counts - few.counts
    assert few.waits == many.waits == one.waits
    more = many.counts - one.counts
    assert set(more) <= {"add", "arange"} and more.total() <= 5 * stages, more
    few, many = (run(reducer, sample(count, True)) for count in (2, 16))
    assert few.counts == many.counts, many.counts - few.counts
    assert few.waits == many.waits == one.waits
    assert few.counts.total() <= one.counts.total() + 60


def test_a_stage_of_lightkv_takes_few_operations() -> None:
    """Most of a prompt's time on a GPU is Python's, and that grows with them."""
    assert run(REDUCERS[0], sample(1, False)).counts.total() <= 50 * len(POINTS)


def test_what_the_layers_of_a_stage_are_given_is_taken_once() -> None:
    """Of the same position ids or rotary embeddings; others, and those of the next stage, are taken anew."""
    drawn = sample(2, True)
    plain, reducer = reduction_of(drawn), RandomReducer(after=(1, 3), keep_shares=(0.5, 0.2))
    valid, positions = plain.index >= 0, plain.index.clamp(min=0)
    layout = layout_of(drawn)
    reduction = Reduction(reducer, (1, 3), layout, index=plain.index, valid=valid, is_image=plain.is_image)
    hidden = reduction.reduce(1, plain.hidden)
    first = reduction.of_the_tokens(positions)
    assert reduction.of_the_tokens(positions) is first
    assert not torch.equal(reduction.of_the_tokens(positions + 1), first)
    reduction.reduce(3, hidden)
    assert reduction.of_the_tokens(positions).shape[1] < first.shape[1]


# -- contracts ---------------------------------------------------------------------------------------------------------


class Wrong(Reducer):
    """A reducer that breaks its contract in one row of several."""

    name = "wrong"
    kind: str = ""

    def acts_after(self, layers: int) -> tuple[int, ...]:
        return POINTS

    @property
    def reads_attention(self) -> bool:  # type: ignore[override]
        return self.kind == "guidance"

    def guidance(self, layer: LayerContext) -> Tensor:
        return layer.query.sum((1, 3))[:, 1:]

    def reduce(self, layer: ReductionContext) -> Reduced:
        into = torch.arange(layer.index.shape[1]).repeat(len(layer.index), 1)
        row, hidden = into[2], layer.hidden
        (first, second, *_), *_ = layer.is_image[2].nonzero(as_tuple=True)
        if self.kind == "drops text":
            row[-1] = -1
        if self.kind == "into removed":
            row[first], row[second] = second, -1
        if self.kind == "outside":
            row[first] = len(row)
        if self.kind == "below":
            row[first] = -2
        if self.kind == "into padding":
            row[first] = 0
        if self.kind == "short":
            return Reduced(into[:, :-1], hidden[:, :-1])
        if self.kind == "dtype":
            return Reduced(into, hidden.half())
        reduced = Reduced(into, hidden)
        if self.kind == "no number of a token":
            object.__setattr__(reduced, "into", into.float())
        return reduced


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("drops text", "must let all text go on; it removed a text token"),
        ("into removed", r"can only become part of one that stays, or be dropped \(-1\)"),
        ("outside", r"can only become part of one that stays"),
        ("below", r"can only become part of one that stays"),
        ("into padding", r"can only become part of one that stays"),
        ("short", r"must return .*float32 \(4, 110, 6\) .* \(4, 110\); got .*\(4, 109, 6\) and torch.int64 \(4, 109\)"),
        ("dtype", r"must return hidden states as torch.float32 .* got torch.float16"),
        ("no number of a token", r"and a whole number for each token, \(4, 110\); got .* and torch.float32 \(4, 110\)"),
    ],
)
def test_a_reducer_that_breaks_its_contract_in_one_row_is_named_with_its_layer(kind: str, says: str) -> None:
    drawn = [*sample(3, True), *sample(1, True)]
    drawn[2] = sample(1, False)[0]
    with pytest.raises(PolicyError, match=f"reducer wrong: after layer 0: .*{says}"):
        run(Wrong(kind=kind), drawn)


def test_guidance_that_is_no_number_for_each_token_is_refused() -> None:
    says = r"reducer wrong: guidance at layer 0 must be a number for each token, \(1, 107\); got \(1, 106\)"
    with pytest.raises(PolicyError, match=says):
        run(Wrong(kind="guidance"), sample(1, False))


def test_a_reducer_may_show_another_one_less_than_it_sees() -> None:
    """What the host knows is then that of the tokens shown, not of those that there are."""

    class First(Wrong):
        """ToMe, in the first grid of each row alone."""

        def reduce(self, layer: ReductionContext) -> Reduced:
            shown = replace(layer, grid=torch.where(layer.grid == 0, 0, -1))
            assert (shown.on_host.grid == shown.grid.numpy()).all()
            return ToMe().reduce(shown)

    drawn = sample(1, False)
    [into], grid = run(First(), drawn).into[0][:1], drawn[0].grid
    merged = [token for token, target in enumerate(into) if target != token]
    assert merged and {grid[token] for token in merged} == {0}
    assert max(grid) > 0


def test_padding_is_judged_by_nobody() -> None:
    """A reducer may say of it what it likes, and it is never among what goes on."""

    class Careless(Wrong):
        def reduce(self, layer: ReductionContext) -> Reduced:
            return Reduced(torch.where(layer.index < 0, 10**6, torch.arange(layer.index.shape[1])), layer.hidden)

    found = run(Careless(), sample(2, True))
    assert [len(row[0][1]) for row in found.seen] == [110, 107]
