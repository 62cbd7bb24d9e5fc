"""KVzip: what the model looks at to repeat what it has read."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvcompress.kernels import highest_among, highest_probability
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("kvzip")
class KVzip(Scorer):
    """The highest attention that any query of a repetition, of any head of the group, gives to what it repeats.

    Source: KVzip (arXiv 2505.23416, section 3, and its released code). Made for
    `CompressedCache.score_by_reconstruction`, which reads a prompt, asks the model to repeat it part by part, and scores
    each part by the queries of its own repetition: so what is kept depends on no question. Probabilities are those that
    a softmax over the first tokens of the prompt, the part, and the repetition gives, as published. In other forwards
    their own queries are taken, and their probabilities over everything held.

    *Deviates:* the first tokens are so many, not a system prompt, and a system prompt is repeated like the rest. The
    code then compares heads and layers, so that heads that look things up stay whole; here that is the allocator's
    matter (`scores`, as the preset `kvzip` has it), and where every head has the same size such heads lose most.

    Args:
        sinks: first tokens of the prompt that a softmax runs over whatever part is repeated.
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = True
    one_axis: ClassVar[bool] = True  # the repetition is read at the positions that follow

    sinks: int = Field(default=4, ge=0)

    def score(self, layer: LayerContext) -> Importance:
        """Costs queries x tokens x head_dim, a tile of queries at a time."""
        if layer.lse is None:
            raise RuntimeError("attention: the scorer must set reads_attention = True to read attention")
        return highest_probability(
            layer.query, layer.keys, layer.lse, layer.scaling, layer.valid, layer.softcap, layer.last_seen
        )

    def score_part(self, layer: LayerContext, part: slice) -> Importance:
        """Costs queries x slots of the part and of the repetition x head_dim, a tile of queries at a time."""
        older, first = layer.keys.shape[2] - layer.query.shape[2], min(self.sinks, part.start)

        def some(tensor: Tensor) -> Tensor:
            of_slots = tensor.movedim(2, 0)
            return torch.cat([of_slots[:first], of_slots[part], of_slots[older:]]).movedim(0, 2)

        valid = None if layer.valid is None else some(layer.valid)
        found = highest_among(layer.query, some(layer.keys), layer.scaling, valid, layer.softcap, layer.last_seen)
        return found[..., first:]
