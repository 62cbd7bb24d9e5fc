"""What a compressed cache refuses of a model's arguments, before anything ran."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.errors import CacheStateError, UnsupportedModeError, UnsupportedModelError

_MEDIA = ("pixel", "image", "video", "audio", "input_features")  # in the names of arguments


def shape_of(inputs: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens of a call; None if it has neither ids nor embeddings."""
    ids = inputs.get("input_ids")
    tokens = ids if ids is not None else inputs.get("inputs_embeds")
    return None if tokens is None else (tokens.shape[0], tokens.shape[1])


def check_inputs(inputs: dict[str, Any], seen: int) -> None:
    """Refuses what a compressed cache cannot serve.

    Args:
        inputs: the arguments of a model or decoder by name.
        seen: positions that the cache has seen.

    Raises:
        UnsupportedModeError: for labels, attention maps, `use_cache=False`, masks that are not two-dimensional, and
            right padding in `generate`.
        CacheStateError: for an attention mask or positions that do not cover what was seen.
    """
    if inputs.get("labels") is not None:
        raise UnsupportedModeError(
            "labels: a loss over a sequence whose cache is compressed on the way means little; leave labels out and "
            "compute the loss from the logits"
        )
    if inputs.get("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions: a compressed cache attends without making attention maps; leave it out, or call the "
            "model with another cache, such as DynamicCache, after model.set_attn_implementation('eager')"
        )
    check_use(inputs)
    shape = shape_of(inputs)
    if shape is None:
        return
    new, mask, positions = shape[1], inputs.get("attention_mask"), inputs.get("position_ids")
    if seen and (not new or (isinstance(positions, Tensor) and positions.shape[-1] != new)):
        raise CacheStateError(not_the_conversation(seen, new))
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != shape[0]:
        raise UnsupportedModeError("attention_mask: must be [batch, positions] with 1 for tokens and 0 for padding")
    if mask.shape[1] < seen + new:
        raise CacheStateError(too_short(seen, new))
    keep = inputs.get("logits_to_keep")
    last_logits_only = isinstance(keep, int) and keep == 1  # what generate() asks for
    if last_logits_only and new > 1:
        # A row without any token yet is padded on the left: its tokens come in a later chunk.
        if bool(((mask[:, -1] == 0) & mask.any(1)).any()):
            raise UnsupportedModeError(
                "attention_mask: a row ends in padding, so the logits of its last position mean nothing; pad on the "
                "left (tokenizer.padding_side = 'left')"
            )


def check_types(inputs: dict[str, Any], seen: int) -> None:
    """Refuses types of tokens that do not begin where the conversation does, for a model that finds them by position.

    Raises:
        CacheStateError: naming the way out.
    """
    types, (_, new) = inputs.get("token_type_ids"), shape_of(inputs) or (0, 0)
    if seen and new > 1 and isinstance(types, Tensor) and types.shape[1] < seen + new:
        raise CacheStateError(
            f"token_type_ids: the model finds a token's type by its position in the conversation, and these are "
            f"{types.shape[1]}; they must cover the {seen} tokens seen and the {new} new ones. Where none of the "
            "new tokens is an image, leave them out"
        )


def check_use(inputs: dict[str, Any]) -> None:
    """Refuses a call that brings a cache and forbids its use.

    Raises:
        UnsupportedModeError: for `use_cache=False`.
    """
    if inputs.get("use_cache") is False:
        raise UnsupportedModeError(
            "use_cache: is False, and a compressed cache was given; leave out one of the two (use_cache may also be in "
            "the generation configuration)"
        )


def check_rows(mask: object) -> None:
    """Refuses a prompt of `generate` with a row of padding alone.

    Raises:
        UnsupportedModeError: naming the rows.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise UnsupportedModeError(
                f"attention_mask: rows {empty} are padding alone, so there is nothing to go on from; leave them out"
            )


def refuse_images(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuses an image for a model that sees none.

    Raises:
        UnsupportedModelError: naming the model.
    """
    for name, value in inputs.items():
        if value is not None and any(medium in name for medium in _MEDIA) and isinstance(value, Tensor | list):
            kind = type(model).__name__
            raise UnsupportedModelError(
                f"{name}: {kind} is a text model to kvcompress; an image needs a model whose adapter knows its images, "
                "such as a LLaVA"
            )


def not_the_conversation(seen: int, tokens: int) -> str:
    """What is wrong with a turn whose ids are not those of the whole conversation."""
    return f"input: the cache has seen {seen} tokens, and these {tokens} do not begin with them and go on; {_WAY_OUT}"


def too_short(seen: int, new: int) -> str:
    """What is wrong with a turn whose mask is not that of the whole conversation."""
    return (
        f"input: the cache has seen {seen} tokens, and with the {new} new ones attention_mask must cover {seen + new}; "
        f"{_WAY_OUT}"
    )


_WAY_OUT = "pass the ids and the mask of the whole conversation, or call reset() for a new one"


def tokens_to_come(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    """How many tokens `generate` is about to add to each row, at most.

    Args:
        model: the model that generates.
        inputs: what `generate` was given.
    """
    config = inputs.get("generation_config") or model.generation_config
    new = inputs.get("max_new_tokens", config.max_new_tokens)
    if new is not None:
        return int(new)
    length, shape = inputs.get("max_length", config.max_length), shape_of(inputs)
    return max(0, int(length or 20) - (0 if shape is None else shape[1]))  # 20 is what transformers takes
