"""KVzip: what the model looks at to repeat what it has read."""

from __future__ import annotations

from typing import ClassVar

from kvcompress.kernels import highest_probability
from kvcompress.policies.base import OverForwards, Scorer
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.registry import SCORERS


@SCORERS.register("kvzip")
class KVzip(Scorer):
    """The highest attention that any query of a repetition, of any head of the group, gives to what it repeats.

    Source: KVzip (arXiv 2505.23416, section 3, and its released code). Made for
    `CompressedCache.score_by_reconstruction`, which reads a prompt, asks the model to repeat it part by part, and
    scores each part by the queries of its own repetition: so what is kept depends on no question. Probabilities are
    those of a softmax over the first tokens, the part, and the repetition, as published. In other forwards their own
    queries are taken, and probabilities are those over everything held; a slot keeps the highest that any forward gave
    it, so that a question does not outdo what the repetition found.

    *Deviates:* the first tokens are four, and a system prompt is repeated like the rest; in the released code they are
    the system prompt, which is kept whole. Parts have 512 tokens, not 2,000. The code then compares heads and layers,
    so that heads that look things up stay whole; here that is the allocator's matter (`scores`, as the preset `kvzip`
    has it), and where every head has the same size such heads lose most.
    """

    mass: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = True
    one_axis: ClassVar[bool] = True  # the repetition is read at the positions that follow

    @property
    def over_forwards(self) -> OverForwards:
        """The highest attention is that of any query so far."""
        return "highest"

    def score(self, layer: LayerContext) -> Importance:
        """Costs queries x tokens x head_dim, a tile of queries at a time."""
        return _highest(layer)

    def score_part(self, layer: LayerContext, part: slice) -> Importance:
        """Costs queries x slots of the part x head_dim."""
        return _highest(layer, part)


def _highest(layer: LayerContext, part: slice | None = None) -> Importance:
    if layer.lse is None:
        raise RuntimeError("attention: the scorer must set reads_attention = True to read attention")
    return highest_probability(
        layer.query, layer.keys, layer.lse, layer.scaling, layer.valid, layer.softcap, layer.last_seen, part
    )
