"""Lorenz curves of importance, with the Gini coefficient of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcompress.errors import ConfigError
from kvcompress.evaluation.inequality import gini, lorenz_curve
from kvcompress.evaluation.plots.style import GREY, drawing, integer_ticks, new_figure, ruled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 256  # of a curve, so that a long prompt makes no large file


@drawing
def lorenz(importance: Sequence[Sequence[float]]) -> Figure:
    """Draws a Lorenz curve for each layer, and its Gini coefficient beside it.

    A curve tells which share of all importance the least important tokens have together: the further it hangs below
    the line of equality, the fewer tokens matter. Layers whose curves differ want caches of different sizes.

    Source: PrefixKV (arXiv 2412.03409, figure 2).

    Args:
        importance: of every token to each layer, `[layers][tokens]`, at least 0; `Inspection.importance` is.

    Raises:
        ConfigError: if there is no layer or no token, or importance is negative.
    """
    if not importance or not all(importance):
        raise ConfigError("importance: must be [layers][tokens], with one of each at least")
    layers = [torch.tensor(layer, dtype=torch.float64) for layer in importance]
    if not all(bool((layer >= 0).all()) for layer in layers):
        raise ConfigError("importance: must be at least 0 everywhere; Lorenz curves share out a mass")
    ginis = [gini(layer[None]) for layer in layers]
    even, uneven = min(range(len(ginis)), key=ginis.__getitem__), max(range(len(ginis)), key=ginis.__getitem__)

    figure = new_figure(7.0, 3.0)
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1))
    colours = _colours(len(layers))
    curves.plot((0, 100), (0, 100), color=GREY, linestyle=":", linewidth=1, label="equality")
    for number, layer in enumerate(layers):
        tokens, share = lorenz_curve(layer)
        shown = torch.linspace(0, len(tokens) - 1, min(len(tokens), _POINTS)).round().long()
        special = number in (even, uneven)
        curves.plot(
            (100 * tokens[shown]).tolist(),
            (100 * share[shown]).tolist(),
            color=colours[number],
            linewidth=1.8 if special else 0.8,
            linestyle="--" if number == uneven != even else "-",
            zorder=3 if special else 2,
            label=_label(number, even, uneven, ginis) if special else None,
        )
    curves.set(xlabel="tokens, least important first (%)", ylabel="share of importance (%)", xlim=(0, 100))
    curves.set(ylim=(0, 100), box_aspect=1)
    curves.legend(loc="upper left")

    bars.bar(range(len(ginis)), ginis, color=colours, edgecolor="black", linewidth=0.4, width=0.8)
    bars.set(xlabel="layer (colours as on the left)", ylabel="Gini coefficient", ylim=(0, 1))
    bars.set_xlim(-0.7, len(ginis) - 0.3)
    integer_ticks(bars)
    ruled(bars)
    return figure


def _colours(count: int) -> list[tuple[float, ...]]:
    """From dark blue to yellow in even steps of lightness, so that order shows in grey as well."""
    import matplotlib

    scale = matplotlib.colormaps["cividis"]
    return [tuple(scale(0.92 * number / max(1, count - 1))) for number in range(count)]


def _label(number: int, even: int, uneven: int, ginis: Sequence[float]) -> str:
    kind = "" if even == uneven else ", most even" if number == even else ", least even"
    return f"layer {number}{kind}: Gini {ginis[number]:.2f}"
