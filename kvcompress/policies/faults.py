"""What goes wrong inside a policy, in words that name it."""

from __future__ import annotations

from types import TracebackType

import torch

from kvcompress.errors import KVCompressError, PolicyError
from kvcompress.policies.base import Policy

_MEMORY = (MemoryError, torch.OutOfMemoryError)  # not the policy's fault, and handled by those who try what fits


class policy_errors:
    """Turns what a policy raises inside into a `PolicyError` from it, which names stage, policy and layer.

    Errors of kvcompress stay what they are, as do those for want of memory and interrupts. A class rather than a
    generator, since decode steps compile.

    Args:
        policy: the policy that is asked inside.
        layer: index of the decoder layer, or of each of several; None for what is about all of them.

    Example:
        >>> from kvcompress import SCORERS
        >>> with policy_errors(SCORERS.create("snapkv"), layer=3):
        ...     [][0]
        Traceback (most recent call last):
        kvcompress.errors.PolicyError: scorer snapkv: layer 3: IndexError: list index out of range
    """

    def __init__(self, policy: Policy, layer: int | tuple[int, ...] | None = None) -> None:
        self.policy, self.layer = policy, layer

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Renames the error, if there is one.

        Raises:
            PolicyError: from it.
        """
        if error is None or not isinstance(error, Exception) or isinstance(error, _MEMORY):
            return
        stage = self.policy.stage
        told = str(error)
        if isinstance(error, KVCompressError) and (not isinstance(error, PolicyError) or told.startswith(f"{stage} ")):
            return
        label = f"{stage} {self.policy.name or type(self.policy).__name__}"
        where = label if self.layer is None else f"{label}: {layers_told(self.layer)}"
        reason = told if isinstance(error, PolicyError) else f"{type(error).__name__}: {told}"
        raise PolicyError(f"{where}: {reason}") from error


def layers_told(layer: int | tuple[int, ...]) -> str:
    """A decoder layer, or several that follow each other, in words."""
    if isinstance(layer, int):
        return f"layer {layer}"
    return f"layer {layer[0]}" if len(layer) == 1 else f"layers {layer[0]} to {layer[-1]}"


__all__ = ["layers_told", "policy_errors"]
