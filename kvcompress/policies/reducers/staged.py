"""What reducers share: after which layers they act, and how tokens are dropped."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext

Depth = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def layers_at(reducer: Reducer, after: tuple[int | float, ...], layers: int) -> tuple[int, ...]:
    """Numbers of layers, from numbers or from fractions of the depth (rounded, a half up; at least 1).

    In a shallow decoder, fractions that come to the same layer are moved on to the next one, and left out where there
    is none.

    Raises:
        ConfigError: unless the numbers ascend and leave at least one layer after the last; for 0, before the first
            layer, if the reducer reads attention.
    """
    if reducer.reads_attention and 0 in after:
        raise ConfigError(
            f"reducer {reducer.name}: after={list(after)}: it reads the attention of a layer, so one has to run first; "
            "begin with 1 or more"
        )
    found: list[int] = []
    for depth in after:
        if not isinstance(depth, float):
            found.append(depth)
        elif (number := max(1, math.floor(depth * layers + 0.5), *(last + 1 for last in found[-1:]))) < layers:
            found.append(number)
    if any(second <= first for first, second in pairwise(found)) or (found and found[-1] >= layers):
        raise ConfigError(
            f"reducer {reducer.name}: after={list(after)} must ascend and stay below the {layers} layers of the "
            "model's decoder; give numbers of layers, or fractions of the depth"
        )
    return tuple(found)


def per_row(numbers: list[int], device: torch.device) -> Int[Tensor, "batch one"]:
    """A number for each row, where the rows are; nobody waits for the copy."""
    column = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").unsqueeze(1)
    return column.to(device, non_blocking=True)


def attention_of_last(layer: LayerContext) -> Float[Tensor, "batch tokens"]:
    """Attention that the last token of each row pays to each token of this forward, head mean."""
    (batch, _, queries, head_dim), kv_heads = layer.query.shape, layer.keys.shape[1]
    query = layer.query[:, :, -1].float().reshape(batch, kv_heads, -1, head_dim) * layer.scaling
    logits = query @ layer.keys.float().transpose(2, 3)
    if layer.valid is not None:
        logits = logits.masked_fill(~layer.valid.unsqueeze(2), torch.finfo(torch.float32).min)
    return logits.softmax(-1).mean((1, 2))[:, -queries:]


def dropping(layer: ReductionContext, score: Float[Tensor, "batch tokens"], keep: list[int]) -> Reduced:
    """Drops all image tokens but those of highest score (the earlier first among equals); text stays.

    Args:
        layer: the tokens.
        score: higher = keep.
        keep: image tokens of each row that stay, as far as it has them.
    """
    order = score.masked_fill(~layer.is_image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < per_row(keep, order.device)
    return dropped(layer, torch.zeros_like(layer.is_image).scatter(1, order, first) | ~layer.is_image)


def dropped(layer: ReductionContext, stays: Bool[Tensor, "batch tokens"]) -> Reduced:
    """Drops what is not marked; hidden states stay as they are."""
    own = torch.arange(stays.shape[1], device=stays.device)
    return Reduced(torch.where(stays, own, -1), layer.hidden)


class Dropping(Reducer):
    """Base of reducers that keep a share of an image's tokens after each of some layers."""

    def share(self, stage: int) -> float:
        """Share of the row's image tokens that stays from a reduction on, of those that there were at first."""
        raise NotImplementedError

    def keep(self, layer: ReductionContext) -> list[int]:
        """Image tokens of each row that stay, as far as it has them."""
        return [math.floor(self.share(layer.stage) * tokens + 1e-6) for tokens in layer.image_tokens]


class Staged(Dropping):
    """Several reductions, each to a share of the image tokens that there were at first.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth.
        keep_shares: share of the image tokens that stays from each of them on.
    """

    after: tuple[Depth, ...] = (0.375, 0.5625, 0.75)
    keep_shares: tuple[Share, ...] = (0.5, 0.25, 0.125)

    def model_post_init(self, context: object) -> None:
        """Checks that both have as many entries."""
        if len(self.after) != len(self.keep_shares):
            raise ConfigError(
                f"reducer {self.name}: after has {len(self.after)} entries and keep_shares {len(self.keep_shares)}; "
                "give as many"
            )

    def acts_after(self, layers: int) -> tuple[int, ...]:
        """The layers in `after`."""
        return layers_at(self, self.after, layers)

    def share(self, stage: int) -> float:
        """The entry of `keep_shares`."""
        return self.keep_shares[stage]
