"""Laws of evictors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.base import Evictor
from kvcompress.policies.context import DecodeContext, SelectionContext
from kvcompress.testing.importance import generator, seeds
from kvcompress.testing.laws import Law, law, require, require_unchanged, tensors_of
from kvcompress.testing.selection import selection_contexts

_rows = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=4)


def _evictor_law(
    draws: st.SearchStrategy[Any], binds: Callable[[Any], bool] = lambda evictor: True, share: float = 1.0
) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law("evictor", draws=lambda evictor: draws, binds=binds, share=share)


@_evictor_law(selection_contexts(), share=1 / 4)
def selects_a_mask(evictor: Evictor, layer: SelectionContext) -> None:
    """The answer is a bool mask over the slots of each row, for the sets of slots there are or for each head, where the
    slots are.
    """
    mask = evictor.select(layer)
    require(isinstance(mask, Tensor), lambda: f"returned {type(mask).__name__}")
    (batch, sets, slots), heads = layer.valid.shape, 1 if layer.importance is None else layer.importance.shape[1]
    shapes = [(batch, number, slots) for number in dict.fromkeys((sets, heads))]
    require(
        mask.dtype == torch.bool and tuple(mask.shape) in shapes and mask.device == layer.valid.device,
        lambda: f"returned {mask.dtype} of {tuple(mask.shape)}; may be bool of {' or '.join(map(str, shapes))}",
    )


@_evictor_law(selection_contexts())
def keeps_no_empty_slot(evictor: Evictor, layer: SelectionContext) -> None:
    """Only slots that hold a token are kept."""
    require(~(evictor.select(layer) & ~layer.valid), "kept an empty slot")


@_evictor_law(selection_contexts())
def keeps_the_protected(evictor: Evictor, layer: SelectionContext) -> None:
    """Sinks, recents and what else is protected are kept."""
    require(evictor.select(layer) | ~layer.protected, "dropped a protected slot")


@_evictor_law(selection_contexts())
def keeps_the_budget_exactly(evictor: Evictor, layer: SelectionContext) -> None:
    """Every set keeps exactly the budget of its row."""
    kept = evictor.select(layer).sum(-1)
    require(kept == layer.budget[:, None], lambda: f"kept {kept.tolist()} slots; budgets {layer.budget.tolist()}")


@_evictor_law(selection_contexts())
def selects_rows_by_themselves(evictor: Evictor, layer: SelectionContext) -> None:
    """A row keeps what it keeps alone, whatever the other rows are."""
    together = evictor.select(layer)
    for row in range(len(layer.budget)):
        own: dict[str, Any] = {
            name: tensor[row : row + 1] for name, tensor in vars(layer).items() if isinstance(tensor, Tensor)
        }
        require(torch.equal(evictor.select(replace(layer, **own)), together[row : row + 1]), f"row {row} kept others")


@_evictor_law(selection_contexts(), share=1 / 4)
def leaves_its_slots_alone(evictor: Evictor, layer: SelectionContext) -> None:
    """An evictor writes to no tensor of its context."""
    before = tensors_of(layer)
    evictor.select(layer)
    require_unchanged(before, layer)


@_evictor_law(selection_contexts())
def selects_alike(evictor: Evictor, layer: SelectionContext) -> None:
    """The same layer keeps the same slots, however often it is asked and whatever was drawn in between."""
    first = evictor.select(layer).clone()
    torch.rand(3)
    require(torch.equal(evictor.select(layer), first), "kept other slots when it was asked again")


@_evictor_law(st.tuples(_rows, st.integers(0, 40)))
def pins_rows_by_themselves(evictor: Evictor, drawn: tuple[list[tuple[int, int]], int]) -> None:
    """What is pinned is known for all rows at once, each as it would be alone, in the shape of what they keep."""
    rows, recents = drawn
    kept, sinks = (torch.tensor(column) for column in zip(*rows, strict=True))
    pinned = evictor.pinned(kept, sinks, recents)
    require(pinned.shape == kept.shape, lambda: f"returned the shape {tuple(pinned.shape)} for {len(rows)} rows")
    require(pinned >= 0, lambda: f"pinned {pinned.tolist()}")
    alone = torch.cat([evictor.pinned(kept[n : n + 1], sinks[n : n + 1], recents) for n in range(len(rows))])
    require(torch.equal(alone, pinned), lambda: f"pinned {pinned.tolist()} at once and {alone.tolist()} one by one")


@_evictor_law(
    st.tuples(selection_contexts(), st.sampled_from([0.0, 0.3, 1.0]), seeds),
    binds=lambda evictor: evictor.frees == "chosen",
)
def frees_a_token_that_may_go(evictor: Evictor, drawn: tuple[SelectionContext, float, int]) -> None:
    """While decoding, the slot that is freed holds a token and is not protected, wherever there is such a slot; one
    without a score is freed only where none with a score may go.
    """
    layer, unscored, seed = drawn
    assert layer.importance is not None
    rows, heads, slots = layer.importance.shape
    unknown = torch.rand(rows, 1, slots, generator=generator(seed)) < unscored
    free = (layer.valid & ~layer.protected).expand(rows, heads, slots)
    victim = evictor.victim(
        DecodeContext(layer.index, layer.protected, layer.importance.masked_fill(unknown, torch.nan))
    )
    require(
        victim.ndim == 2 and victim.shape[0] == rows and victim.shape[1] in (layer.valid.shape[1], heads),
        lambda: f"named slots of the shape {tuple(victim.shape)}",
    )
    named = victim.long().expand(rows, heads).unsqueeze(-1)
    require((named >= 0) & (named < slots), lambda: f"named {victim.tolist()} of {slots} slots")
    some = free.any(-1)
    require(free.gather(-1, named).squeeze(-1) | ~some, lambda: f"freed the slots {victim.tolist()}")
    scored = (free & ~unknown).any(-1)
    require(~unknown.expand(rows, heads, slots).gather(-1, named).squeeze(-1) | ~scored, "freed one without a score")
