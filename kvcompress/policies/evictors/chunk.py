"""Runs of neighbouring tokens stay or go together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.context import SelectionContext
from kvcompress.policies.evictors.topk import TopK
from kvcompress.policies.registry import EVICTORS


@EVICTORS.register("chunk")
class Chunk(TopK):
    """Keeps runs of neighbouring tokens by their summed importance, sinks and recents in any case.

    Source: ChunkKV (arXiv 2502.00299, section 3, algorithm 1).

    A row's slots, in the order of their tokens, are cut into runs of `length`; the last may be shorter. Runs are kept
    whole from the highest sum down, ties to earlier ones.

    *Deviates:* the paper keeps whole chunks, so the number of tokens is a multiple of the length. Here the budget is
    met exactly: the last run that is chosen keeps its highest scores alone. Layers do not share the chosen
    tokens (the paper's layer-wise index reuse).

    Args:
        length: tokens of a run; 8 to 16 are usual.
        granularity: "layer", one set of tokens for all heads, ranked by head-mean importance; or "head", a set per
            key/value head, ranked by its own.
        decode: which slot a decode step frees when a layer is over its budget, as in topk.
        distance: slots (tokens) between the fixed point and the end, as in topk.
    """

    length: int = Field(default=10, ge=1)

    def preference(
        self, score: Float[Tensor, "batch sets slots"], layer: SelectionContext
    ) -> Int[Tensor, "batch sets slots"]:
        """Slots by the rank of their run, then by score, ties to earlier tokens; protected first, empty ones last."""
        slots, sets = score.shape[-1], score.shape[:2]
        latest = torch.iinfo(layer.index.dtype).max
        in_order = torch.where(layer.valid, layer.index, latest).argsort(dim=-1, stable=True).expand_as(score)
        ranked = torch.where(layer.valid, score, 0.0).gather(-1, in_order)  # by token, empty slots last
        runs = F.pad(ranked, (0, -slots % self.length)).view(*sets, -1, self.length).sum(-1)
        best = runs.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(best.shape[-1], device=best.device).expand_as(best)
        place_of_run = torch.empty_like(best).scatter_(-1, best, places)
        place = place_of_run.unsqueeze(-1).expand(-1, -1, -1, self.length).flatten(2)[..., :slots]
        protected, valid = (mask.expand_as(score).gather(-1, in_order) for mask in (layer.protected, layer.valid))
        place = torch.where(valid, torch.where(protected, -1, place), slots)
        within = ranked.argsort(dim=-1, descending=True, stable=True)
        by_run = within.gather(-1, place.gather(-1, within).argsort(dim=-1, stable=True))
        return in_order.gather(-1, by_run)
