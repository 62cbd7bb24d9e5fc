"""Checks of what is on the device, collected so that the host waits for the device once for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.errors import PolicyError


class Problems:
    """What may be wrong, in the order in which it is to be reported."""

    def __init__(self) -> None:
        self._says: list[str | Callable[[], str]] = []
        self._wrong: list[Tensor] = []
        self._finite: list[str] = []
        self._totals: list[Tensor] = []

    def note(self, says: str | Callable[[], str], wrong: Bool[Tensor, ""]) -> None:
        """Adds a check.

        Args:
            says: the message; or what makes it, which may ask the device, since it is called only if there is need.
            wrong: whether it is so.
        """
        self._says.append(says)
        self._wrong.append(wrong)

    def note_unless_finite(self, says: str, numbers: Float[Tensor, "..."]) -> None:
        """Adds a check that there is no NaN and nothing infinite among numbers.

        Args:
            says: the message.
            numbers: any of float32 or less.
        """
        self._finite.append(says)
        self._totals.append(numbers.sum(dtype=torch.float64))  # which is finite exactly if all of them are

    def refuse(self) -> None:
        """Asks the device once, and forgets what was right.

        Raises:
            PolicyError: with the first message that is true.
        """
        flags: list[Tensor] = []
        if self._totals:
            totals = torch.stack([total.to(self._totals[0].device) for total in self._totals])
            flags.extend(totals.isfinite().logical_not_().unbind())
        flags.extend(self._wrong)
        if not flags:
            return
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        says = [says for says, wrong in zip((*self._finite, *self._says), found, strict=True) if wrong]
        self._says, self._wrong, self._finite, self._totals = [], [], [], []
        if says:
            raise PolicyError(says[0] if isinstance(says[0], str) else says[0]())
