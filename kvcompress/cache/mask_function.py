"""The mask function that transformers knows as "kvcompress": what it makes, and what can be read from that."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvcompress.errors import UnsupportedModelError

# Where the keys of a compressed cache begin, as it tells the mask function: nowhere.
COMPRESSED = -(2**30)
COMPRESSED_UNREAD = COMPRESSED - 1  # and one token may still be padding


def padding_mask(
    *args: Any,
    q_length: int | None = None,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers makes for this attention: of padding alone, `[batch, 1, 1, positions]`, in prefill.

    A compressed cache, told by its offset, needs to know which positions are padding; causality is its own, and decode
    steps need no mask at all, so that it keeps one shape when they are compiled. Where the model lets tokens see others
    than those before them, it gets the whole mask, `[batch, 1, queries, positions]`. Any other cache gets that of sdpa.
    """
    if kv_offset in (COMPRESSED, COMPRESSED_UNREAD):
        if (
            q_length is not None
            and q_length > 1
            and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function
        ):
            whole = _unless_causal(*args, q_length=q_length, attention_mask=attention_mask, **kwargs)
            if whole is not None:
                return whole
        unsaid = attention_mask is None or (q_length == 1 and kv_offset == COMPRESSED)
        return None if unsaid else attention_mask[:, None, None].to(torch.bool)  # type: ignore[index]
    known = {"q_length": q_length, "kv_offset": kv_offset, "attention_mask": attention_mask, **kwargs}
    return sdpa_mask(*args, **known)


def _unless_causal(
    *args: Any, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """What each query sees, written out, `[batch, 1, queries, positions]`; None if that is what came before it."""
    known = {**kwargs, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    known |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    whole = sdpa_mask(*args, **known)
    assert whole is not None
    causal = torch.ones(q_length, kv_length, dtype=torch.bool, device=whole.device).tril(kv_length - q_length)
    if bool((whole == causal).all()):
        return None
    return whole if attention_mask is None else whole & attention_mask[:, None, None, :kv_length].to(torch.bool)


def padding_in(mask: Any) -> Any:
    """The padding `[batch, positions]` in a mask that `padding_mask` made; any other mask as it is.

    `generate` makes masks before it calls the model, for some models one for each kind of layer.
    """
    mask = _of_full_layers(mask)
    return mask[:, 0, -1] if is_made(mask) else mask


def last_seen_in(mask: Any) -> Int[Tensor, "batch queries"] | None:
    """Number of the last new position that each query sees by a mask that `padding_mask` made; None if it is its own.

    Raises:
        UnsupportedModelError: if some query does not see all positions up to there that hold a token.
    """
    mask = _of_full_layers(mask)
    if not is_made(mask) or mask.shape[2] == 1:
        return None
    visible, (queries, positions) = mask[:, 0], mask.shape[2:]
    number = torch.arange(positions, device=mask.device)
    own = number[positions - queries :]
    last = torch.maximum((visible * number).amax(-1), own)
    if not torch.equal(visible, (number <= last.unsqueeze(-1)) & visible[:, -1:]):
        raise UnsupportedModelError(
            "model: it attends with a mask by which some tokens do not see all that came before them, which a "
            "compressed cache does not know; use another cache"
        )
    among_new: Tensor = last - (positions - queries)
    return among_new


def _of_full_layers(mask: Any) -> Any:
    """The mask of the layers that attend to everything, where there is one for each kind of layer."""
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, dict) else mask


def is_made(mask: Any) -> bool:
    """Whether `padding_mask` made a mask, and not the user or the model."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[1] == 1


def check_causal(module: nn.Module, mask: Tensor | None, first: bool) -> None:
    """Refuses attention that is meant to go both ways where no mask told the decoder's cache of it.

    Args:
        module: the attention module.
        mask: what it attends with.
        first: whether nothing was seen before this forward, so that transformers may leave a mask out.

    Raises:
        UnsupportedModelError: for a mask that the decoder did not get, or a model that attends both ways without one.
    """
    if mask is not None and mask.shape[2] > 1:
        raise own_mask(module, mask)
    if first and getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"model: {type(module).__name__} attends to tokens before and after each where it is given no mask of its "
            "own, and a compressed cache attends causally there; say which tokens do, by token_type_ids as the "
            "processor gives them"
        )


def own_mask(module: nn.Module, mask: Tensor) -> UnsupportedModelError:
    """What is wrong with a mask that the decoder did not get."""
    return UnsupportedModelError(
        f"model: {type(module).__name__} attends with a mask of the shape {tuple(mask.shape)} that it makes itself, "
        "and a compressed cache knows that of the decoder alone; use another cache"
    )
