"""The compiled extension of optimum-quanto, with which transformers' QuantizedCache unpacks its codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_SHOWN = 200  # characters of an error that a compiler wrote


def prepare_extension(device: torch.device, tell: Callable[[str], None]) -> str | None:
    """Loads the extension for a device, which compiles it the first time.

    Args:
        device: where the codes will be.
        tell: is told what is going on before a wait that takes longer than a moment.

    Returns:
        Why it is not available; None if it is.
    """
    try:
        import optimum.quanto.library.extensions as extensions

        folder = Path(extensions.__file__).parent / ("cuda" if device.type == "cuda" else "cpp") / "build"
        waiting = _waiting(folder)
        if waiting is not None:
            tell(waiting)
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8, device=device), 4)
    except Exception as error:  # compilers, linkers and file systems fail in ways of their own
        return (
            f"unavailable: optimum-quanto's extension cannot be compiled ({shown(error)}); "
            "it needs a C++ compiler and ninja (pip install ninja), on a GPU the CUDA toolkit too"
        )
    return None


def shown(error: BaseException) -> str:
    """An error in one line, cut where it is long."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _waiting(folder: Path) -> str | None:
    """What the extension makes one wait for; None where it is ready."""
    lock, version = folder / "lock", folder / "pytorch_version.txt"
    if lock.exists():
        return (
            "waiting for another process to compile optimum-quanto's extension; "
            f"if none does, because it was killed, delete {lock}"
        )
    if version.exists() and version.read_text().strip() == torch.__version__:
        return None
    return "compiling optimum-quanto's extension for QuantizedCache, a minute or two, this once"
