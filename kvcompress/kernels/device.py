"""Whether Triton kernels run on a device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kvcompress.errors import KVCompressWarning


def runs_triton(device: torch.device) -> bool:
    """Whether a device is one that Triton compiles for here: an NVIDIA GPU from compute capability 8.0 on."""
    return device.type == "cuda" and _works(device)


def takes_triton(query: Tensor) -> bool:
    """Whether Triton kernels attend with these queries: they sum in float32, which is no service to float64."""
    return query.dtype != torch.float64 and runs_triton(query.device)


@cache
def _works(device: torch.device) -> bool:
    """Tries it once, since Triton wants a C compiler on the machine too, and says what stands in its way."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from kvcompress.kernels.triton_decode import merge_splits

        parts = torch.zeros(2, 1, 16, dtype=torch.float32, device=device)
        merge_splits(parts, parts[..., 0], parts.new_empty(1, 16))
    except Exception as error:
        warnings.warn(
            f"Triton kernels do not run on {torch.cuda.get_device_name(device)}, so that attention over a compressed "
            f"cache runs in plain torch, which is slower: {type(error).__name__}: {error}",
            KVCompressWarning,
            stacklevel=3,
        )
        return False
    return True


def launching(tensor: Tensor) -> Tensor:
    """A tensor as kernels read it: the numbers of its last axis next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sent(numbers: ArrayLike, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device, without waiting for it: a plain copy waits for all that was asked of it before.

    Args:
        numbers: an array, or lists of numbers; a tensor may be there already.
        device: where they go.
        dtype: as what; None for what they are.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type != "cuda" or tensor.device.type != "cpu":  # only memory of the host is pinned
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sent_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of whole numbers on a device, int64, in one copy that nobody waits for."""
    ends = np.cumsum([0, *(array.size for array in arrays)]).tolist()
    flat = sent(np.concatenate([array.ravel() for array in arrays], dtype=np.int64), device)
    return [flat[a:b].view(array.shape) for array, (a, b) in zip(arrays, pairwise(ends), strict=True)]


def powers(number: int) -> int:
    """The power of two, at least 16, that covers a number: the widths that a kernel's blocks can have."""
    return max(16, 1 << (number - 1).bit_length())


def multiprocessors(device: torch.device) -> int:
    """How many of a kernel's programs a device runs side by side, at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Whether a device multiplies matrices as GPUs of compute capability 9.0 and later do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
