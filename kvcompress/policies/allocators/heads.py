"""The heads of every layer in the place of layers, and back."""

from __future__ import annotations

from torch import Tensor


def as_layers(of_heads: Tensor) -> Tensor:
    """`[layers, batch, kv_heads, ...]` as `[layers * kv_heads, batch, ...]`, the heads of the first layer first."""
    return of_heads.transpose(1, 2).flatten(0, 1)


def as_heads(of_layers: Tensor, layers: int) -> Tensor:
    """The inverse: `[layers * kv_heads, batch]` as `[layers, batch, kv_heads]`."""
    return of_layers.view(layers, -1, of_layers.shape[1]).transpose(1, 2).contiguous()
