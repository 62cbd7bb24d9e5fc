"""The model inside a wrapper: PEFT, `torch.compile`, DistributedDataParallel and DataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModelError


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers whose call is the call of the model inside; the model itself without one.

    A cache belongs to the model inside, and the wrapper is called as ever.

    Raises:
        UnsupportedModelError: if it is no transformers model, or in a wrapper that calls several copies of the model, a
            part of its weights, or the model with other inputs; the message says how to get at the model inside.
    """
    found, expression = model, "model"
    while not isinstance(found, PreTrainedModel):
        reason = _why_not(found)
        inside, way = _inside(found)
        if inside is None:
            raise UnsupportedModelError(f"model: must be a transformers model, got {type(model).__name__}")
        if reason:
            raise UnsupportedModelError(
                f"model: {type(found).__name__} {reason}; make the cache for the model inside, {expression}{way}, and "
                "call that one"
            )
        found, expression = inside, expression + way
    return found


def _inside(wrapper: Any) -> tuple[Any, str]:
    """What a wrapper wraps, and the expression that gives it; None if it is no wrapper."""
    if callable(getattr(wrapper, "get_base_model", None)):
        return wrapper.get_base_model(), ".get_base_model()"
    for name in ("_orig_mod", "module"):
        if isinstance(inside := getattr(wrapper, name, None), nn.Module):
            return inside, f".{name}"
    return None, ""


def _why_not(wrapper: Any) -> str:
    """Why the call of a wrapper is not the call of what it wraps; empty if it is."""
    if callable(getattr(wrapper, "get_base_model", None)):
        learned = getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False)
        return "puts learned tokens before the prompt, which the cache would not know of" if learned else ""
    if hasattr(wrapper, "_orig_mod") or type(wrapper) is DistributedDataParallel:
        return ""
    if type(wrapper) is DataParallel:
        return "calls a copy of the model on every device, all with one cache" if len(wrapper.device_ids) > 1 else ""
    return "is a wrapper that kvcompress does not know"
