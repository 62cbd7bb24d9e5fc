"""What figures were measured on, to be printed beside them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

_WIDE = 160  # characters of a line where nobody watches and figures may be kept in a file


def console() -> Console:
    """Where tables are printed: as wide as the terminal is, and where there is none, so wide that no figure is cut."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDE)


def processor_name() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def driver_version() -> str:
    """Of NVIDIA's driver; "unknown" where nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0].strip() if said else "unknown"


def about(device: torch.device) -> dict[str, str]:
    """Card and driver, or processor and threads, and the versions of what runs on it."""
    if device.type == "cuda":
        found = {"card": torch.cuda.get_device_name(device), "driver": driver_version()}
    else:
        found = {"processor": processor_name(), "threads": str(torch.get_num_threads())}
    found["python"] = platform.python_version()
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def about_line(device: torch.device | None = None) -> str:
    """The same as text; of the CPU if no device is named."""
    return ", ".join(f"{name} {said}" for name, said in about(device or torch.device("cpu")).items())
