"""Memory: what a cache of any kind holds, and the most that a run takes."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache

_PROCESS = Path("/proc/self")


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: keys and values, and what says which tokens they belong to.

    A compressed cache reports them. Of transformers' caches, every tensor of every layer counts, quantized ones with
    their codes, scales and shifts.
    """
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return report.kv_bytes + report.index_bytes
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that a run takes on top of what was taken before.

    On a GPU, of torch's allocations (`torch.cuda.max_memory_allocated`); elsewhere of the process's resident memory,
    which Linux tells. That is coarse: pages that the process holds in reserve may serve a run without being counted.

    Returns:
        Bytes; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    before_run = _start_peak()
    run()
    return None if before_run is None else max(0, process_memory("VmHWM") - before_run)


def process_memory(field: str) -> int:
    """Bytes of a line of this process's status (Linux): "VmRSS" is resident now, "VmHWM" at most since it was reset."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _start_peak() -> int | None:
    """Gives free pages back, sets the peak to what is resident, and returns that; None where the system cannot."""
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library, whose free pages stay
        pass
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return process_memory("VmHWM")


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # made of others, as quantized tensors are
        inner, _ = value.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(value, name)) for name in inner)
    return value.nbytes
