"""Numbers that the host knows of rows and layers, and what to do with rows that lose different numbers of tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvcompress.kernels import sent

Counts = np.ndarray  # int64, a number per row, or per row and set of heads; kept on the host


def stacked(counts: list[Counts]) -> Counts:
    """Numbers of several layers, `[batch, sets]` each, together; as many sets as the layer that has most."""
    return np.stack(np.broadcast_arrays(*counts))


def without_last(tensor: Tensor, gone: Counts) -> Tensor:
    """All slots of each row but its last so many; in rows that lose more than others, padding comes before them.

    Args:
        tensor: what belongs to slots, `[batch, heads, slots, ...]`.
        gone: slots that each row loses.

    Returns:
        `[batch, heads, slots - least, ...]`; what is padding means nothing.
    """
    return _moved(tensor, tensor.shape[2] - int(gone.min()), gone.min() - gone)


def with_last(tensor: Tensor, gone: Counts) -> Tensor:
    """What belongs to slots that `without_last` left, each where its slot was before; without the least of the last."""
    return _moved(tensor, tensor.shape[2], gone - gone.min())


def _moved(tensor: Tensor, slots: int, by: Counts) -> Tensor:
    if not by.any():
        return tensor[:, :, :slots]
    place = sent(np.arange(slots) + by[:, None], tensor.device).clamp(0, tensor.shape[2] - 1)
    place = place.view(len(by), 1, slots, *[1] * (tensor.ndim - 3))
    return tensor.gather(2, place.expand(-1, tensor.shape[1], -1, *tensor.shape[3:]))
