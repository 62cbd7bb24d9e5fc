"""What `auto` is told of the first prompt: by `generate`, which has all of it, or else by the forward that begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.inputs import shape_of
from kvcompress.cache.masks import Mask
from kvcompress.cache.state import CacheState
from kvcompress.config.auto import Prompt
from kvcompress.integrations import Adapter


def for_turn(
    state: CacheState, model: PreTrainedModel, adapter: Adapter, inputs: dict[str, Any], repeats: bool = False
) -> None:
    """Chooses for the prompt that `generate` was given, which it may read in chunks.

    Args:
        state: of the cache.
        model: the model that generates.
        adapter: its own.
        inputs: what `generate` was given.
        repeats: as in `Prompt`.
    """
    shape, ids, mask = shape_of(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
    if not state.asked.auto or state.sequence.seen or shape is None:
        return
    tokens = shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = int((mask != 0).sum(1).max())
    is_image = adapter.image_tokens(model, ids) if isinstance(ids, Tensor) else None
    state.whole_prompt = Prompt(tokens, is_image is not None and bool(is_image.any()), repeats)
    state.choose(state.whole_prompt)


def for_document(state: CacheState, model: PreTrainedModel, adapter: Adapter, inputs: dict[str, Any]) -> None:
    """Chooses for a prompt that is about to be read by itself, before anyone knows what will be asked about it.

    Scores by repetition are chosen where nothing else was asked for and the model can do it.
    """
    given, scorer = state.asked.given.keys(), state.asked.scorer
    free = not given & {"allocator", "reducer"} and (
        "scorer" not in given or (scorer is not None and scorer.reconstructs)
    )
    able = state.own.goes_back and adapter.position_axes == 1 and inputs.get("token_type_ids") is None
    able = able and adapter.window(model) is None  # which the repetition would leave
    for_turn(state, model, adapter, inputs, repeats=free and able)


def for_forward(state: CacheState, positions: int, mask: Mask | None) -> None:
    """Chooses for a forward of so many positions that is about to begin, where it is the first and nobody knew more.

    Args:
        state: of the cache; it knows which of the new positions are images.
        positions: of the forward.
        mask: what the attention mask says of them, if anything.
    """
    if not state.asked.auto or state.sequence.seen or state.whole_prompt is not None:
        return
    images = state.sequence.is_image
    tokens = positions if mask is None else int(mask.row_new.max())
    state.choose(Prompt(tokens, images is not None and bool(images.any())))
