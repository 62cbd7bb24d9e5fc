"""Strategies for Hypothesis: what policies meet. Shapes, a seed and a kind are drawn, and tensors made from them.

Layers, rows, tokens, heads and seeds shrink towards few; importance has ties, zeros, padding, and tiny and huge scales.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from kvcompress.config.budget import Budget
from kvcompress.testing.allocation import AllocationInput, allocation_inputs, bounds, statistics
from kvcompress.testing.image_rows import Row, rows
from kvcompress.testing.importance import KINDS, MASSES, any_mass, dyadic_masses, generator, importances, seeds
from kvcompress.testing.layers import Padded, context, contexts, padded_batches
from kvcompress.testing.merging import merge_contexts
from kvcompress.testing.numbers import tensors
from kvcompress.testing.selection import selection_contexts

layers = st.integers(1, 6)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    """A budget in tokens or as a fraction, with a few sinks and recents."""
    protected: dict[str, Any] = {"sink": draw(st.integers(0, 3)), "recent": draw(st.integers(0, 5))}
    if draw(st.booleans()):
        return Budget(tokens=draw(st.integers(1, 20)), **protected)
    return Budget(fraction=draw(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.8, 1.0])), **protected)


@st.composite
def floors_and_capacities(
    draw: st.DrawFn, max_layers: int = 6, max_batch: int = 3, max_tokens: int = 40
) -> tuple[Tensor, Tensor]:
    """Floors and capacities, int64 `[layers, batch]`, none of them above the capacity or the number of tokens."""
    number, batch, tokens = (draw(st.integers(1, most)) for most in (max_layers, max_batch, max_tokens))
    found: tuple[Tensor, Tensor] = draw(bounds(number, batch, tokens, generator(draw(seeds))))
    return found


__all__ = [
    "KINDS",
    "MASSES",
    "AllocationInput",
    "Padded",
    "Row",
    "allocation_inputs",
    "any_mass",
    "bounds",
    "budgets",
    "context",
    "contexts",
    "dyadic_masses",
    "floors_and_capacities",
    "generator",
    "importances",
    "layers",
    "merge_contexts",
    "padded_batches",
    "rows",
    "seeds",
    "selection_contexts",
    "statistics",
    "tensors",
]
