"""How large a value is once the output projection has read it: what scorers and evictors weigh attention with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.errors import UnsupportedModelError
from kvcompress.policies.context import Importance, LayerWeights, Values

_TILE_TOKENS = 1024  # projected at once


def slot_norm(numbers: Values, order: int = 2) -> Importance:
    """L1 or L2 norm of each slot's key or value, float32; summed in float32 or, of float64, in that."""
    wide = torch.promote_types(numbers.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(numbers, ord=order, dim=-1, dtype=wide)
    return norm.float()


def projected_norm(values: Values, weights: LayerWeights, order: int, asks: str) -> Importance:
    """L1 or L2 norm of W v for each value and each query head's part W of the projection, mean over each group.

    Costs tokens x value_dim^2 for L2, tokens x hidden x value_dim for L1, of each query head. Where the projection's
    weight is missing or not stored as plain numbers, the value's own norm.

    Args:
        values: values of the key/value heads.
        weights: the layer's weights.
        order: 1 or 2.
        asks: who asks and what else to choose, for the error: "scorer x: layer 0: {}; choose y".

    Returns:
        Norms in float32.

    Raises:
        UnsupportedModelError: if an adapter on the projection does what its weight does not tell.
    """
    if weights.output_unknown:
        reason = f"the output projection {weights.output_unknown}"
        merge = "merge the adapter into the model (model.merge_and_unload())"
        raise UnsupportedModelError(asks.format(f"{reason}; {merge}"))
    output, kv_heads, width = weights.output, values.shape[1], values.shape[3]
    if output is None or output.is_meta or not output.is_floating_point() or output.shape[1] % (kv_heads * width):
        return slot_norm(values, order)
    values, heads = values.float(), output.shape[1] // width
    parts = output.to(values.device, torch.float32).view(-1, heads, width).transpose(0, 1)
    group, norm = heads // kv_heads, torch.zeros(values.shape[:3], device=values.device, dtype=torch.float32)
    for head in range(group):
        own = parts[head::group]
        norm += _by_gram(values, own) if order == 2 else _by_tiles(values, own)
    return norm / group


def _by_gram(values: Tensor, parts: Tensor) -> Importance:
    """|W v| in L2, from the Gram matrix W'W of each head."""
    square: Tensor = torch.linalg.vecdot(values @ (parts.transpose(1, 2) @ parts), values)
    return square.clamp(min=0).sqrt()


def _by_tiles(values: Tensor, parts: Tensor) -> Importance:
    """|W v| in L1, of some tokens at a time."""
    projection, tiles = parts.transpose(1, 2), torch.split(values, _TILE_TOKENS, dim=2)
    return torch.cat([slot_norm(tile @ projection, 1) for tile in tiles], dim=-1)
