"""Importance as Hypothesis draws it: shapes, a seed and a kind, from which a torch.Generator makes the tensor."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    """The source of every random tensor of a law."""
    return torch.Generator().manual_seed(seed)


def _random(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.empty(shape).exponential_(generator=g)


def _ties(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(0, 3, shape, generator=g).float()


def _equal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.full(shape, 0.37)


def _zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _some_layers_empty(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g) * torch.randint(0, 2, (shape[0], 1, 1), generator=g)


def _identical_layers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random((1, *shape[1:]), g).expand(shape).contiguous()


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    picked = torch.randint(0, shape[2], (*shape[:2], 1), generator=g)
    return torch.zeros(shape).scatter_(2, picked, 1.0)


def _powers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.exp2(-torch.randint(0, 60, shape, generator=g).float())


def _huge(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g).clamp(max=3.0) * 1e38


def _denormal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g) * 1e-43


def _mixed_scales(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.pow(10.0, torch.randint(-44, 38, shape, generator=g).float())


# In the order in which a reader would have them: the smallest example is of the first kind that breaks a law.
MASSES = {
    f.__name__.strip("_"): f
    for f in (
        *(_zeros, _equal, _one_hot, _ties, _random, _identical_layers, _some_layers_empty),
        *(_powers, _huge, _mixed_scales, _denormal),
    )
}


any_mass = st.sampled_from(list(MASSES))


def dyadic_masses(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Integers that add up to 1,024 over the tokens of a layer, so that shares are exact; some layers hold none."""
    layers, batch, tokens = shape
    picked = torch.randint(0, tokens, (layers, batch, 1024), generator=g)
    # Some layers concentrate: a token is picked again and again with the probability of a drawn power.
    sharp = torch.randint(1, 4, (layers, batch, 1), generator=g)
    picked = (tokens * (picked / tokens) ** sharp).long()
    mass = torch.zeros(shape).scatter_add_(2, picked, torch.ones(picked.shape))
    mass *= torch.randint(0, 4, (layers, batch, 1), generator=g) > 0
    return mass


KINDS = (*MASSES, "dyadic", "padded")


@st.composite
def importances(
    draw: st.DrawFn,
    kinds: st.SearchStrategy[str] | None = None,
    max_layers: int = 6,
    max_batch: int = 3,
    max_tokens: int = 40,
    min_tokens: int = 1,
) -> Tensor:
    """Importance `[layers, batch, tokens]`, float32.

    Args:
        draw: Hypothesis's.
        kinds: which of `KINDS` may be drawn, all of them if None: "random", "ties", "equal", "zeros", "one_hot" and
            others are masses; "padded" is minus infinity in the slots after a row's tokens, which is no mass.
        max_layers: most layers.
        max_batch: most rows.
        max_tokens: most tokens.
        min_tokens: fewest tokens.
    """
    sizes = ((1, max_layers), (1, max_batch), (min_tokens, max_tokens))
    shape = tuple(draw(st.integers(least, most)) for least, most in sizes)
    g, kind = generator(draw(seeds)), draw(st.sampled_from(KINDS) if kinds is None else kinds)
    if kind == "dyadic":
        return dyadic_masses(shape, g)
    if kind != "padded":
        return MASSES[kind](shape, g)
    lengths = torch.randint(min(1, shape[2]), shape[2] + 1, (1, shape[1], 1), generator=g)
    return _random(shape, g).masked_fill(torch.arange(shape[2]) >= lengths, -torch.inf)
