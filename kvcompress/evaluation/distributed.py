"""Several processes on one job: which samples are mine, and what all of them found, as `accelerate launch` sets up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kvcompress.errors import KVCompressError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        device: where its model belongs; "auto" where one process works alone and may choose.
    """

    rank: int = 0
    count: int = 1
    device: str = "auto"

    @classmethod
    def current(cls, device: str = "auto") -> Processes:
        """Joins the processes that `accelerate launch` or `torchrun` started; alone where neither did.

        Args:
            device: what the user asked for; "auto" gives each process a GPU of its own if there are any.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(device=device)
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, str(state.device) if device == "auto" else device)

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th item from `rank` on; each item is exactly one process's."""
        return list(items[self.rank :: self.count])

    def gather(self, found: Sequence[T]) -> list[T]:
        """What all processes found for their items, in the order of all items, in every process.

        Args:
            found: one result for each item that `mine` gave; picklable.
        """
        if self.count == 1:
            return list(found)
        from accelerate.utils import gather_object

        parts = dict(gather_object([(self.rank, list(found))]))
        longest = max(map(len, parts.values()))
        return [parts[rank][turn] for turn in range(longest) for rank in sorted(parts) if turn < len(parts[rank])]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; an error of kvcompress there is raised in all of them."""
        if self.count == 1:
            return make()
        told: list[Any] = []
        if self.first:
            try:
                told = [(make(), None)]
            except KVCompressError as error:
                told = [(None, error)]
        from accelerate.utils import gather_object

        ((made, problem),) = gather_object(told)
        if problem is not None:
            raise problem
        return made  # type: ignore[no-any-return]

    def leave(self) -> None:
        """Ends the group of processes; call it when the work is done."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
