"""Rotary positions that count the tokens of a layer alone, in forwards after a reducer took some away."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.cache.state import CacheState
from kvcompress.errors import UnsupportedModelError


def moved_back(
    positions: dict[str, Any], lost: Int[Tensor, " batch"], frequencies: Float[Tensor, " half_dim"] | None
) -> dict[str, Any]:
    """Position ids and rotary embeddings of earlier positions.

    Args:
        positions: of `position_ids`, `[batch or 1, tokens]`, and `position_embeddings`, cosines and sines `[batch or 1,
            tokens, head_dim]`, those that a decoder layer was given.
        lost: by how many positions each row moves back.
        frequencies: angles per position of the pairs of dimensions (i, i + head_dim / 2).

    Raises:
        UnsupportedModelError: if the frequencies are unknown, or are not one for each pair of dimensions.
    """
    changed: dict[str, Any] = {}
    if (ids := positions.get("position_ids")) is not None:
        changed["position_ids"] = ids - lost.to(ids.device)[:, None]
    if (given := positions.get("position_embeddings")) is not None:
        cosine, sine = given
        if frequencies is None or 2 * len(frequencies) != cosine.shape[-1]:
            raise UnsupportedModelError(
                "reducer: positions='per_layer' turns rotary embeddings back, for which the decoder must have "
                "rotary_emb.inv_freq, a frequency for each two dimensions of a head; choose positions='original' or "
                "'contiguous'"
            )
        angle = lost.to(cosine.device)[:, None, None] * frequencies.to(cosine.device, torch.float32).repeat(2)
        back, across = angle.cos(), angle.sin()
        changed["position_embeddings"] = (
            (cosine * back + sine * across).to(cosine.dtype),
            (sine * back - cosine * across).to(sine.dtype),
        )
    return changed


def lost_before(state: CacheState, layer: int) -> Tensor | None:
    """Tokens of each row that a layer never got in earlier steps, where its positions count its own alone.

    None where they do not, or nothing was lost; on the device, without waiting for it.
    """
    reducer, step, sequence = state.config.reducer, state.step, state.sequence
    if reducer is None or reducer.positions != "per_layer":
        return None
    if (step is None and layer) or (step is not None and step.next_layer != layer):
        return None
    positions = 0 if step is None else step.queries  # the step of a first layer may be yet to begin
    missing, earlier = sequence.missing(layer), sequence.seen - positions
    return None if missing is None or not earlier else missing[:, :earlier].sum(1)
