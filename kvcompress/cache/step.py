"""One forward of the model in progress."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvcompress.cache.allocation import Allocation
from kvcompress.cache.counts import Counts
from kvcompress.cache.reduction import Reduction
from kvcompress.cache.store import InUse
from kvcompress.kernels import sent
from kvcompress.policies.problems import Problems

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer


TOGETHER = 2**28  # bytes of keys and values up to which layers are compressed at once


class Phase(enum.Enum):
    """What a step does."""

    PREFILL = "several tokens, or some of them padding: stores, attends, scores, and compresses"
    DECODE = "one token of every row: writes into a slot, attends over all, and frees one"


@dataclass
class Prefill:
    """A forward of several tokens in progress, or another change of what every layer holds.

    Attributes:
        queries: positions of the model's inputs.
        index: number of tokens of the row before each of this step's, `[1 or batch, 1, tokens]`; -1 for padding, which
            comes first in each row.
        valid: which of them are tokens; None if all are.
        last_seen: number of the last of these positions that each sees, `[batch, positions]`; None if it is its own.
        row_new: tokens of each row.
        order: where each of these positions was in the model's; None if they are where they were.
        first_order: the same before a reducer acted.
        local: gives the budgets, where they need no scores, so that layers are compressed while later ones are to run.
        waiting: layers that ran and are yet to be compressed, where budgets need no scores.
        room: slots to allocate beyond each layer's budget, `[batch, sets]`.
        evicts: whether layers over their budget give tokens up in this step.
        part: slots of the prompt that this step repeats; None if it repeats nothing.
        reduction: what a reducer does to its images; None if there are none.
        problems: what may be wrong with policies' answers, all read at once.
        next_layer: layer that attends next.
        row_seen: tokens of each row, this step included.
    """

    phase: ClassVar[Phase] = Phase.PREFILL
    queries: int = 1
    index: Int[Tensor, "rows 1 tokens"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None
    last_seen: Int[Tensor, "batch tokens"] | None = None
    row_new: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    order: Int[Tensor, "batch positions"] | None = None
    first_order: Int[Tensor, "batch positions"] | None = None
    local: Callable[[], Allocation] | None = None
    waiting: list[CompressedLayer] = field(default_factory=list)
    room: list[Counts] = field(default_factory=list)
    evicts: bool = True
    part: slice | None = None
    reduction: Reduction | None = None
    problems: Problems = field(default_factory=Problems)
    next_layer: int = 0
    row_seen: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _known: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)

    def seen_on(self, device: torch.device) -> Int[Tensor, " batch"]:
        """Tokens of each row, this step included."""
        return sent(self.row_seen, device)

    def once(self, name: str, index: Tensor, compute: Callable[[], Any]) -> Any:
        """What follows from a layer's token indices, computed once for all layers that share them."""
        known = self._known.get(name)
        if known is None or known[0] is not index:
            known = self._known[name] = (index, compute())
        return known[1]

    def aligned(self, tensor: Tensor) -> Tensor:
        """Queries, keys or values with each row's padding first."""
        return tensor if self.order is None else _rows(tensor, self.order)

    def restored(self, tensor: Tensor) -> Tensor:
        """The output of attention in the model's own positions."""
        return tensor if self.order is None else _rows(tensor, self.order.argsort(dim=1))


@dataclass
class Decode:
    """A forward of one token of every row in progress.

    Attributes:
        widths: slots that attention reads per layer; None to read all that are allocated.
        bias: what is added to the logits of each layer, `[layers, batch, sets, 1, slots]`; None while all slots read
            are in use, or `length` says it.
        length: slots in use, `[layers, batch, sets]`, where kernels read these alone; None elsewhere.
        device_only: whether nothing that the host knows counts, since the step is compiled or captured.
        evicts: whether layers over their budget free a slot in this step.
        place: where layers that remember their last queries put that of this step; None where they do not.
        next_layer: layer that attends next.
    """

    phase: ClassVar[Phase] = Phase.DECODE
    queries: ClassVar[int] = 1
    widths: list[int] | None = None
    bias: Tensor | None = None
    length: Tensor | None = None
    device_only: bool = False
    evicts: bool = True
    place: Int[Tensor, " one"] | None = None
    next_layer: int = 0

    def used(self, layer: int, device: torch.device) -> InUse:
        """Which slots of a layer are in use."""
        width = None if self.widths is None else self.widths[layer]
        bias = None if self.bias is None else self.bias[layer].to(device)
        length = None if self.length is None else self.length[layer].to(device)
        return InUse(width, bias, length, self.device_only)


Step: TypeAlias = Prefill | Decode


def _rows(tensor: Tensor, order: Tensor) -> Tensor:
    index = order.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)
