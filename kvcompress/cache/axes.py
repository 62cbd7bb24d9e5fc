"""Models that place a token by several positions, of time, row and column (M-RoPE), in place of one."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.inputs import shape_of
from kvcompress.cache.sequence import Sequence
from kvcompress.config import CompressionConfig
from kvcompress.errors import UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import Adapter
from kvcompress.kernels import sent


def check_axes(config: CompressionConfig, adapter: Adapter, model: PreTrainedModel) -> None:
    """Refuses policies that take a rotary position to be one number, for a model whose positions are several.

    Raises:
        UnsupportedModelError: naming the policy and the way out.
    """
    if adapter.position_axes == 1:
        return
    why = f"{type(model).__name__} places an image's tokens by {adapter.position_axes} numbers (M-RoPE)"
    if config.scorer is not None and config.scorer.one_axis:
        raise UnsupportedModelError(
            f"scorer {config.scorer.name}: takes the rotary position of a token to be the number of tokens before it, "
            f"and {why}; choose another scorer, such as 'attention' or 'snapkv'"
        )
    if config.reducer is not None and config.reducer.positions != "original":
        raise UnsupportedModelError(
            f"reducer {config.reducer.name}: positions='{config.reducer.positions}' numbers tokens anew in one line, "
            f"and {why}; choose positions='original'"
        )


def check_positions(sequence: Sequence, adapter: Adapter, inputs: dict[str, Any]) -> None:
    """Refuses a plain call after images whose positions transformers would make for other tokens than its own.

    Raises:
        UnsupportedModeError: naming the ways out.
    """
    shape, mask = shape_of(inputs), inputs.get("attention_mask")
    if adapter.position_axes == 1 or not sequence.seen or sequence.rotary_offset is None or shape is None:
        return
    if isinstance(mask, Tensor) and mask.shape[1] > shape[1] and inputs.get("position_ids") is None:
        raise UnsupportedModeError(
            f"position_ids: transformers {transformers.__version__} makes them for all {mask.shape[1]} positions of "
            f"attention_mask, and this call brings {shape[1]}; leave attention_mask out, which rows without padding do "
            "not need, or give position_ids [3, batch, tokens], or use generate"
        )


def take_offset(sequence: Sequence, adapter: Adapter, model: PreTrainedModel | None, inputs: dict[str, Any]) -> None:
    """Remembers what the model keeps to place the tokens that come, which is the conversation's own.

    And what it would keep of a conversation that ended after any of the positions about to come: the next would
    be one more than the highest so far.

    Args:
        sequence: what was seen.
        adapter: of the model.
        model: the model.
        inputs: what the decoder is called with.
    """
    shape = shape_of(inputs)
    if adapter.position_axes == 1 or model is None or shape is None:
        return
    (rows, new), before = shape, sequence.rotary_offset
    offset = adapter.rotary_offset(model)
    if offset is not None and len(offset) != rows:  # `generate` repeats rows, for beams and several answers
        offset = None if rows % len(offset) else offset.repeat_interleave(rows // len(offset), dim=0)
    sequence.rotary_offset, positions, mask = offset, inputs.get("position_ids"), inputs.get("attention_mask")
    if offset is None:
        return
    earlier = torch.zeros_like(offset) if before is None or not sequence.seen else before.to(offset)
    offsets = earlier.expand(-1, new)
    if isinstance(positions, Tensor) and positions.ndim == 3:
        valid = torch.ones(rows, new, dtype=torch.bool, device=positions.device)
        if isinstance(mask, Tensor):
            valid = mask[:, sequence.seen : sequence.seen + new].to(valid)
        tokens = sent(sequence.row_seen, positions.device)[:, None] if sequence.seen else 0
        highest = positions[-adapter.position_axes :].amax(0).expand(rows, -1).masked_fill(~valid, -1).cummax(1).values
        offsets = highest.maximum(earlier.to(highest) + tokens - 1) + 1 - tokens - valid.cumsum(1)
    sequence.mark_offsets(offsets)


def give_offset(sequence: Sequence, adapter: Adapter, model: PreTrainedModel | None) -> None:
    """Gives the model what it kept of this conversation, whatever it read since; a new one begins with nothing."""
    if model is not None and adapter.position_axes > 1:
        adapter.set_rotary_offset(model, sequence.rotary_offset if sequence.seen else None)
