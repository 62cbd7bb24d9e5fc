"""The most memory a process took, on a GPU or in RAM."""

from __future__ import annotations

from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Makes `peak_bytes` count from what is held now; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
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
