"""What evictors are shown, as Hypothesis draws it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from kvcompress.policies.context import SelectionContext
from kvcompress.testing.importance import MASSES, generator, seeds


@st.composite
def selection_contexts(draw: st.DrawFn) -> SelectionContext:
    """A layer with empty slots, protected slots, ties, and a budget that covers the protected."""
    batch, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    sets = draw(st.sampled_from([1, heads]))
    g = generator(draw(seeds))
    count = torch.tensor([draw(st.integers(1, slots)) for _ in range(batch)])[:, None, None]
    sinks, recents = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    # Any order of tokens: decode steps overwrite freed slots.
    position = torch.rand(batch, sets, slots, generator=g).argsort(-1)
    valid = position < count
    gaps = torch.randint(1, 4, (batch, sets, slots), generator=g).cumsum(-1)
    index = gaps.gather(-1, position).masked_fill(~valid, -1).int()
    protected = valid & ((position < sinks) | (position >= count - recents))
    least = protected.sum(-1).amax(-1)
    budget = [draw(st.integers(low, high)) for low, high in zip(least.tolist(), count.flatten().tolist(), strict=True)]
    score = MASSES[draw(st.sampled_from(["random", "ties", "equal", "zeros"]))]((batch, heads, slots), g)
    norms = torch.rand(batch, heads, slots, generator=g) + 0.1
    return SelectionContext(torch.tensor(budget), valid, protected, index, score, value_norms=norms)
