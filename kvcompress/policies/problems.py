"""Checks of what is on the device, collected so that the host waits for the device once for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from kvcompress.errors import PolicyError


class Problems:
    """What may be wrong, in the order in which it is to be reported."""

    def __init__(self) -> None:
        self._says: list[str | Callable[[], str]] = []
        self._wrong: list[Tensor] = []

    def note(self, says: str | Callable[[], str], wrong: Bool[Tensor, ""]) -> None:
        """Adds a check.

        Args:
            says: the message; or what makes it, which may ask the device, since it is called only if there is need.
            wrong: whether it is so.
        """
        self._says.append(says)
        self._wrong.append(wrong)

    def refuse(self) -> None:
        """Asks the device once, and forgets what was right.

        Raises:
            PolicyError: with the first message that is true.
        """
        if not self._wrong:
            return
        found = torch.stack([wrong.to(self._wrong[0].device) for wrong in self._wrong]).tolist()
        says = [says for says, wrong in zip(self._says, found, strict=True) if wrong]
        self._says, self._wrong = [], []
        if says:
            raise PolicyError(says[0] if isinstance(says[0], str) else says[0]())
