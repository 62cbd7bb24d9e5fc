"""What mergers are shown, as Hypothesis draws it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from kvcompress.policies.context import MergeContext
from kvcompress.testing.importance import MASSES, generator, seeds


@st.composite
def merge_contexts(draw: st.DrawFn, decoding: bool | None = None, dtype: torch.dtype = torch.float32) -> MergeContext:
    """A layer after selection: empty slots, heads that keep different tokens, ties, images, tokens without a score."""
    batch, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    by_head, g = draw(st.booleans()), generator(draw(seeds))
    decoding = draw(st.booleans()) if decoding is None else decoding
    count = torch.tensor([draw(st.integers(0 if batch > 1 else 1, slots)) for _ in range(batch)])[:, None, None]
    most, more = draw(st.sampled_from([(1, 0), (2, 1), (slots, 2)]))  # a slot a row is what a decode step frees
    going = torch.tensor([draw(st.integers(0, most)) for _ in count]).view(-1, 1, 1).minimum(count)
    position = torch.rand(batch, heads if by_head else 1, slots, generator=g).argsort(-1).expand(batch, heads, slots)
    held = position < count
    index = torch.randint(1, 4, (batch, 1, slots), generator=g).cumsum(-1).expand_as(position).gather(-1, position)
    chance = torch.rand(batch, heads if by_head else 1, slots, generator=g).expand_as(position)
    evicted = chance.masked_fill(~held, 2.0).argsort(-1).argsort(-1) < going
    kept = held & ~evicted
    importance = MASSES[draw(st.sampled_from(["random", "ties", "equal", "zeros"]))]((batch, heads, slots), g)
    if decoding:
        unscored = torch.rand(batch, 1, 1, generator=g) * 60
        importance = importance.masked_fill(index > unscored, torch.nan)
    images = torch.rand(batch, 60, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    shape = (batch, heads, slots, 4)
    if draw(st.booleans()):
        keys = torch.randint(-1, 2, shape, generator=g).float()
    else:
        keys = torch.randn(shape, generator=g)
    first = draw(st.integers(0, 3))
    state = torch.rand(batch, heads, generator=g).masked_fill(torch.rand(batch, heads, generator=g) < 0.2, torch.nan)
    return MergeContext(
        layers=tuple(range(first, first + draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0])))),
        keys=keys.to(dtype),
        values=torch.randn(shape, generator=g).to(dtype),
        kept=kept,
        evicted=evicted,
        index=index.masked_fill(~held, -1),
        importance=importance.masked_fill(~held, 0.0),
        is_image=draw(st.sampled_from([None, images.unsqueeze(1).expand(-1, heads, -1).gather(-1, index) & held])),
        most_kept=min(slots, int(kept.sum(-1).max()) + more),
        most_evicted=min(slots, int(evicted.sum(-1).max()) + more),
        decoding=decoding,
        state=draw(st.sampled_from([None, state])),
    )
