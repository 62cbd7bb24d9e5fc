"""Figures of a layer's attention that allocators read beyond importance, by name.

A statistic looks at one layer right after its attention and gives one number per row; `Allocator.needs` names those
that an allocator reads, and only these are computed.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from kvcompress.shapes import LayerContext

Statistic = Callable[[LayerContext], Float[Tensor, " batch"]]

STATISTICS: dict[str, Statistic] = {}
