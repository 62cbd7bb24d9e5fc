"""Laws of scorers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from kvcompress.policies.base import Scorer
from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.testing.importance import seeds
from kvcompress.testing.laws import Law, law, require, require_close, require_unchanged, tensors_of
from kvcompress.testing.layers import Padded, context, contexts, padded_batches

_halves = st.tuples(seeds, st.sampled_from([torch.bfloat16, torch.float16]))


def _scorer_law(
    draws: st.SearchStrategy[Any], binds: Callable[[Any], bool] = lambda scorer: True, share: float = 1.0
) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law("scorer", draws=lambda scorer: draws, binds=binds, share=share)


@_scorer_law(contexts)
def scores_every_head_and_slot(scorer: Scorer, layer: LayerContext) -> None:
    """Scores are finite floating-point numbers, one for each key/value head and slot, where the keys are."""
    score = scorer.score(layer)
    require(isinstance(score, torch.Tensor), lambda: f"returned {type(score).__name__}")
    require(
        score.shape == layer.keys.shape[:3] and score.is_floating_point() and score.device == layer.keys.device,
        lambda: f"returned {score.dtype} of {tuple(score.shape)}; the keys are {tuple(layer.keys.shape)}",
    )
    require(score.isfinite(), lambda: f"gave {score.tolist()}")


@_scorer_law(contexts, binds=lambda scorer: scorer.mass, share=1 / 4)
def gives_mass_where_it_says_so(scorer: Scorer, layer: LayerContext) -> None:
    """What a scorer declares as mass is not negative, and has a sum in each head to take shares of."""
    score = scorer.score(layer)
    require(score >= 0, lambda: f"gave {float(score.min())}")
    require(score.sum(-1) > 0, "gave a head nothing but zeros")


@_scorer_law(contexts, share=1 / 4)
def leaves_its_layer_alone(scorer: Scorer, layer: LayerContext) -> None:
    """A scorer writes to no tensor of its layer."""
    before = tensors_of(layer)
    scorer.score(layer)
    require_unchanged(before, layer)


@_scorer_law(contexts, share=1 / 4)
def scores_alike(scorer: Scorer, layer: LayerContext) -> None:
    """The same layer gets the same scores, however often it is asked and whatever was drawn in between."""
    first = scorer.score(layer).clone()
    torch.rand(3)
    require(torch.equal(scorer.score(layer), first), "gave other scores when it was asked again")


@_scorer_law(padded_batches)
def scores_rows_by_themselves(scorer: Scorer, drawn: Padded) -> None:
    """A row of a padded batch scores as it would alone: rows of other lengths beside it, with images in other places,
    and what stands in empty slots change nothing.
    """
    score = scorer.score(drawn.batch)
    require(score.shape == drawn.batch.keys.shape[:3], f"gave the batch scores of the shape {tuple(score.shape)}")
    require(score.isfinite(), "gave a batch scores that are not finite")
    for row, alone in enumerate(drawn.alone):
        require_close(
            drawn.of_row(score, row), scorer.score(alone), 1e-5, f"scored row {row} otherwise in the batch", 1e-5
        )


@_scorer_law(seeds, share=1 / 4)
def scores_heads_that_hold_different_tokens(scorer: Scorer, seed: int) -> None:
    """Places and images may be given once for each head, as after an eviction by head: scores are finite, one for each
    head and slot.
    """
    layer = context(seed)
    assert layer.is_image is not None
    sets: dict[str, Any] = {"index": layer.index.expand(2, 2, -1), "is_image": layer.is_image.expand(2, 2, -1)}
    score = scorer.score(replace(layer, **sets))
    require(score.shape == layer.keys.shape[:3], f"gave scores of the shape {tuple(score.shape)}")
    require(score.isfinite(), f"gave {score.tolist()}")


@_scorer_law(_halves, share=1 / 4)
def scores_half_precision_alike(scorer: Scorer, drawn: tuple[int, torch.dtype]) -> None:
    """Queries, keys and values in half precision score nearly as they do in float32."""
    half = context(drawn[0] % 7, queries=40, past=0, images=False, dtype=drawn[1])
    fields: dict[str, Any] = {name: getattr(half, name).float() for name in ("query", "keys", "values")}
    assert half.weights.output is not None
    weights = LayerWeights(half.weights.output.float(), half.weights.inverse_frequencies)
    found, wanted = scorer.score(half).float(), scorer.score(replace(half, **fields, weights=weights))
    off, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    require(off <= 0.02 * largest, f"was off by {off} where scores reach {largest}")


@_scorer_law(seeds, share=1 / 4)
def reads_attention_only_where_it_says_so(scorer: Scorer, seed: int) -> None:
    """A scorer that does not declare `reads_attention` works without attention, and one that does asks for it."""
    layer = replace(context(seed), lse=None)
    try:
        scorer.score(layer)
    except RuntimeError as error:
        if "reads_attention" not in str(error):
            raise
        require(scorer.reads_attention, "asked for attention, which it does not declare to read")
    else:
        require(not scorer.reads_attention, "declares to read attention, and did not")
