"""What a forward shows of a layer, and the scores that its slots get by that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache.counts import Counts, with_last, without_last
from kvcompress.cache.repeating import Near
from kvcompress.cache.step import Prefill
from kvcompress.config import CompressionConfig
from kvcompress.errors import PolicyError
from kvcompress.kernels import sent
from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.statistics import STATISTICS

if TYPE_CHECKING:
    from kvcompress.cache.layer import CompressedLayer


@dataclass(frozen=True)
class Unscored:
    """A step that may be undone, which scores once it is known what stays of it.

    Attributes:
        query: queries of its tokens.
        lse: log-sum-exp of their logits; None if nobody reads attention.
        scaling: factor on the logits.
        softcap: what they stay below; None if they are let be.
        weights: gives the layer's own weights.
        heads_part: whether heads held different tokens by then.
        last_seen: number of the last of its tokens that each query sees, `[batch, queries]`; None if it is its own.
    """

    query: Tensor
    lse: Tensor | None
    scaling: float
    softcap: float | None
    weights: Callable[[], LayerWeights]
    heads_part: bool
    last_seen: Tensor | None = None

    def of_rows(self, index: Tensor) -> Unscored:
        """The same of some rows."""
        index = index.to(self.query.device)
        lse, last = (None if of is None else of.index_select(0, index) for of in (self.lse, self.last_seen))
        return replace(self, query=self.query.index_select(0, index), lse=lse, last_seen=last)

    def without_last(self, gone: Counts) -> Unscored:
        """The same without so many of each row's last queries; with padding before those of rows that lose more."""
        lse, last = (None if of is None else without_last(of, gone) for of in (self.lse, self._last_seen()))
        if last is not None:
            moved = sent(gone - gone.min(), last.device)[:, None]
            last = (last[:, 0] + moved).clamp(max=last.shape[2] - 1)
        return replace(self, query=without_last(self.query, gone), lse=lse, last_seen=last)

    def _last_seen(self) -> Tensor | None:
        return None if self.last_seen is None else self.last_seen[:, None]


def needs_of(config: CompressionConfig) -> tuple[str, ...]:
    """Names of the statistics that the allocator reads of a step."""
    return config.allocator.needs if config.evictor is not None else ()


def reads_attention(config: CompressionConfig) -> bool:
    """Whether a step has to tell the log-sum-exp of its logits."""
    scorer = config.scorer
    return bool(needs_of(config)) or (scorer is not None and scorer.reads_attention)


def settle(layer: CompressedLayer, step: Prefill, gone: Counts) -> None:
    """Scores what was left unscored, by the queries of each row but its last so many."""
    unscored, layer.unscored = layer.unscored, None
    if unscored is not None and gone.min(initial=0) < unscored.query.shape[2]:
        score(layer, step, unscored, gone)


def score(layer: CompressedLayer, step: Prefill, of: Unscored, gone: Counts | None = None) -> None:
    """Scores every slot by what a step shows, and takes the statistics that the allocator reads.

    Args:
        layer: the layer.
        step: the step in progress.
        of: what the step shows that is to score.
        gone: last tokens of each row in that step, which are about to be taken back.
    """
    scorer, needs = layer.config.scorer, needs_of(layer.config)
    observed = step.reduction is not None and step.reduction.observes(layer.number)
    if scorer is None and not needs and not observed:
        return
    assert layer.index is not None
    (keys, values), index = layer.every_slot(), layer.index
    valid = layer.valid(step)
    if gone is not None and gone.any():
        keys, values, index = (without_last(tensor, gone) for tensor in (keys, values, index))
        of = of.without_last(gone)
        more = sent(gone - gone.min(), index.device)[:, None, None]
        index = index.masked_fill(torch.arange(index.shape[2], device=index.device) < more, -1)
        valid = index[:, : layer.held.shape[1]] >= 0
    context = context_of(layer, step, of, keys, values, index, valid)
    if observed:
        assert step.reduction is not None
        step.reduction.observe(replace(context, lse=None))
    for name in needs:
        with policy_errors(layer.config.allocator, layer.number):
            layer.statistics[name] = layer.heads.mean(STATISTICS[name](context))
    if scorer is None:
        return
    scores, silent = scores_by(scorer, step, context), None
    if valid is not None and layer.scores is not None and scorer.over_forwards == "last":
        silent = ~valid[..., -of.query.shape[2] :].any(-1, keepdim=True)
    learn(layer, scorer, scores if gone is None or not gone.any() else with_last(scores, gone), silent)


def score_part(layer: CompressedLayer, step: Prefill, part: slice) -> Tensor:
    """Scores of a part's slots by the step that repeated it, as if what is near were all that the layer holds."""
    scorer, of, index, valid = layer.config.scorer, layer.unscored, layer.index, layer.valid(step)
    assert scorer is not None and of is not None and index is not None
    near = Near.of(part, index.shape[2] - of.query.shape[2])
    keys, values, index = (near.taken(tensor) for tensor in (*layer.every_slot(), index))
    context = context_of(layer, step, of, keys, values, index, None if valid is None else near.taken(valid))
    return scores_by(scorer, step, context, near.asked)


def context_of(
    layer: CompressedLayer,
    step: Prefill,
    of: Unscored,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    valid: Tensor | None,
) -> LayerContext:
    """What a scorer sees of a layer."""
    return LayerContext(
        layer=layer.number,
        query=of.query,
        keys=keys,
        values=values,
        lse=of.lse if reads_attention(layer.config) else None,
        scaling=of.scaling,
        index=index,
        seen=step.seen_on(of.query.device),
        valid=valid,
        is_image=step.once("images", index, lambda: layer.sequence.images_at(index)),
        weights=of.weights() if layer.config.scorer is not None else LayerWeights(),
        heads=layer.heads,
        softcap=of.softcap,
        heads_part=of.heads_part,
        last_seen=of.last_seen,
    )


def scores_by(scorer: Scorer, step: Prefill, context: LayerContext, part: slice | None = None) -> Tensor:
    """What a scorer says of the slots that it is shown, in float32; what may be wrong with it is noted."""
    with policy_errors(scorer, context.layer):
        scores = scorer.score(context) if part is None else scorer.score_part(context, part)
        shape = tuple(scores.shape)
    expected = tuple(context.keys[:, :, part or slice(None)].shape[:3])
    label = f"scorer {scorer.name}: layer {context.layer}: must return finite scores of the shape {expected}"
    if shape != expected:
        raise PolicyError(f"{label} [batch, kv_heads, tokens]; got the shape {shape}")
    scores = scores.to(torch.float32)
    step.problems.note_unless_finite(f"{label} [batch, kv_heads, tokens]; got NaN or infinite scores", scores)
    return scores


def learn(layer: CompressedLayer, scorer: Scorer, scores: Tensor, silent: Tensor | None = None) -> None:
    """Gives all slots of a layer their scores, with those that they have where earlier forwards count too.

    Args:
        layer: the layer.
        scorer: what scored.
        scores: what it said of every slot.
        silent: rows (and heads, or one set of all) of which this forward had no token, so that scores of the last one
            stay, `[batch, sets, 1]`; None if it had some of each, or nobody asks.
    """
    over = scorer.over_forwards
    if layer.scores is not None and (over != "last" or silent is not None):
        assert layer.index is not None
        known, none = layer.scores, -torch.inf if over == "highest" else 0.0
        unscored = layer.sequence.unscored_before(layer.index[..., : known.shape[2]])
        known = known if unscored is None else known.masked_fill(unscored, none)
        known = F.pad(known, (0, scores.shape[2] - known.shape[2]), value=none)
        if over == "sum":
            scores = scores + known
        elif over == "highest":
            scores = scores.maximum(known)
        elif silent is not None:
            scores = torch.where(silent, known, scores)
    layer.scores = scores
