"""Memory: what a cache of any kind holds, and the most that a process or a run takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: keys and values, and what says which tokens they belong to.

    A compressed cache reports them. Of transformers' caches, every tensor of every layer counts, quantized ones with
    their codes, scales and shifts.
    """
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return report.kv_bytes + report.index_bytes
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def reset_peak(device: torch.device) -> None:
    """Makes `peak_bytes` count from what is held now; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives free pages back
    except (OSError, AttributeError):  # another system or C library, whose free pages stay
        pass
    try:
        _RESET.write_text("5")  # sets the peak of resident memory back to what is resident
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes held since `reset_peak`, weights included.

    Returns:
        What torch allocated on a GPU; on other devices resident memory of the process, which only Linux tells: None
        elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that a run takes on top of what was taken before.

    Off a GPU, resident memory is coarse: pages that the process holds in reserve may serve a run uncounted.

    Returns:
        Bytes; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    gc.collect()
    reset_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_bytes(device)
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    after = peak_bytes(device)
    return None if before is None or after is None else max(0, after - before)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # made of others, as quantized tensors are
        inner, _ = value.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(value, name)) for name in inner)
    return value.nbytes
