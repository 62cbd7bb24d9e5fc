"""Models all of whose layers slide: served to where their window ends, and refused beyond before anything changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.inputs import shape_of, tokens_to_come
from kvcompress.errors import UnsupportedModeError
from kvcompress.integrations import Adapter


def check_forward(
    window: int | None, adapter: Adapter, model: PreTrainedModel, inputs: dict[str, Any], seen: int
) -> None:
    """Refuses a forward that goes beyond the window.

    Args:
        window: positions that every layer attends to; None if some layer attends to everything.
        adapter: of the model.
        model: the model.
        inputs: arguments of the forward by name.
        seen: positions of the conversation so far.

    Raises:
        UnsupportedModeError: naming the ways out.
    """
    _, new = shape_of(inputs) or (0, 0)
    if window is not None and seen + new > window:
        raise _beyond(window, adapter, model, f"{seen} were seen, and {new} come")


def check_turn(window: int | None, adapter: Adapter, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Refuses a turn of `generate` that may go beyond the window; `inputs` are its arguments by name.

    Raises:
        UnsupportedModeError: naming the ways out.
    """
    if window is None:
        return
    mask, (_, tokens) = inputs.get("attention_mask"), shape_of(inputs) or (0, 0)
    read, coming = max(tokens, mask.shape[1] if isinstance(mask, Tensor) else 0), tokens_to_come(model, inputs)
    if read + max(1, coming) - 1 > window:  # the last one is not read
        says = f"the prompt has {read} and {coming} are to come: lower max_new_tokens"
        raise _beyond(window, adapter, model, says)


def _beyond(window: int, adapter: Adapter, model: PreTrainedModel, says: str) -> UnsupportedModeError:
    return UnsupportedModeError(
        f"model: every layer attends to a window of {window} tokens, and a compressed cache serves it up to there; "
        f"{says}. To attend to everything instead, {adapter.without_window(model)}. DynamicCache goes on, and holds no "
        "more than the window"
    )
