"""Checks of what is on the device, collected so that the host waits for the device once for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvcompress.errors import PolicyError

_TOGETHER = 2**24  # bytes of numbers that are checked together, and kept until then


class Problems:
    """What may be wrong, in the order in which it is to be reported."""

    def __init__(self) -> None:
        self._says: list[str | Callable[[], str]] = []
        self._wrong: list[Tensor] = []
        self._finite: list[str] = []
        self._totals: list[Tensor] = []
        self._unread: list[Tensor] = []  # numbers of one shape that are summed up together

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
        other = self._unread and (numbers.shape, numbers.device) != (self._unread[0].shape, self._unread[0].device)
        if other or (1 + len(self._unread)) * numbers.nbytes > _TOGETHER:
            self._sum_up()
        self._finite.append(says)
        self._unread.append(numbers)

    def _sum_up(self) -> None:
        """Totals of what was noted last, which are finite exactly if all of their numbers are."""
        if self._unread:
            numbers = self._unread[0].unsqueeze(0) if len(self._unread) == 1 else torch.stack(self._unread)
            self._totals.append(numbers.flatten(1).sum(1, dtype=torch.float64))
            self._unread = []

    def refuse(self) -> None:
        """Asks the device once, and forgets what was right.

        Raises:
            PolicyError: with the first message that is true.
        """
        self._sum_up()
        flags: list[Tensor] = []
        if self._totals:
            totals = torch.cat([total.to(self._totals[0].device) for total in self._totals])
            flags.extend(totals.isfinite().logical_not_().unbind())
        flags.extend(self._wrong)
        if not flags:
            return
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        says = [says for says, wrong in zip((*self._finite, *self._says), found, strict=True) if wrong]
        self._says, self._wrong, self._finite, self._totals = [], [], [], []
        if says:
            raise PolicyError(says[0] if isinstance(says[0], str) else says[0]())
