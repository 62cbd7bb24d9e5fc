"""DuoAttention: some heads keep everything, the others the first and last tokens alone."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.errors import ConfigError, PolicyError
from kvcompress.kernels import sent
from kvcompress.policies.allocators.heads import as_heads, as_layers
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, HeadCounts, HeadImportance
from kvcompress.policies.registry import ALLOCATORS

_Gate = Annotated[float, Field(ge=0.0, le=1.0)]


@ALLOCATORS.register("duo")
class Duo(Allocator):
    """Retrieval heads keep all their tokens, streaming heads a fixed few; which is which is known beforehand.

    Source: DuoAttention (arXiv 2410.10819, sections 3.1 and 3.2).

    Heads are taken in the order of their gates, highest first, and filled until the total is spent; every head after
    them streams. Ties go to earlier layers, then earlier heads. With the evictor `streaming` a streaming head keeps
    its sinks and last tokens, as in the paper.

    *Deviates:* the paper fixes the share of streaming heads, and memory follows; here the budget is met exactly, so
    the last retrieval head may be filled in part. Gates come from where the user has them: the paper trains them, and
    publishes some; the retention of a profile of heads will do.

    Args:
        gates: for each layer, the gate of each key/value head, or one for all its heads, from 0 to 1: the higher, the
            more it retrieves.
        streaming: tokens that a streaming head keeps beyond the protected; the paper's 256 recents.
    """

    by_head: ClassVar[bool] = True
    reads_importance: ClassVar[bool] = False

    gates: list[Annotated[list[_Gate], Field(min_length=1)]] = Field(min_length=1)
    streaming: int = Field(default=256, ge=0)

    @model_validator(mode="after")
    def _rectangular(self) -> Duo:
        if len({len(layer) for layer in self.gates}) > 1:
            raise ConfigError(
                f"gates: each layer needs as many heads as the others; got {[len(layer) for layer in self.gates]}"
            )
        return self

    @property
    def made_for(self) -> tuple[int, int]:
        """Layers and heads of its gates."""
        return len(self.gates), len(self.gates[0])

    def allocate(
        self,
        importance: HeadImportance,
        total: Int[Tensor, " batch"],
        floor: HeadCounts,
        capacity: HeadCounts,
        context: AllocationContext | None = None,
    ) -> HeadCounts:
        """Gives every head what streaming takes, as far as the total goes, then fills heads in the order of gates."""
        layers, _, heads = floor.shape
        given = len(self.gates[0])
        if len(self.gates) != layers or given not in (1, heads):
            raise PolicyError(
                f"allocator {self.name}: the gates are of {len(self.gates)} layers with {given} heads, the model has "
                f"{layers} with {heads}; give those of this model"
            )
        gates = sent(self.gates, floor.device, torch.float64).expand(-1, heads)
        order = gates.flatten().argsort(descending=True, stable=True)
        least, most = (as_layers(counts).long()[order] for counts in (floor, capacity))
        streams = torch.minimum(least + self.streaming, most)
        budget = least + _filled(streams - least, total - least.sum(0))
        budget = budget + _filled(most - budget, total - budget.sum(0))
        return as_heads(torch.empty_like(budget).index_copy_(0, order, budget), layers)


def _filled(room: Tensor, left: Tensor) -> Tensor:
    """What heads take one after the other of what is left for each row, as much as each has room for."""
    before = room.cumsum(0) - room
    return torch.minimum(room, (left - before).clamp(min=0))
