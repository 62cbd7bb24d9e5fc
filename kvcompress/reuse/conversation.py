"""The tokens of a conversation, and what a model is told of all of them whenever some are new."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import UnsupportedModeError
from kvcompress.integrations import adapter_for
from kvcompress.integrations.wrapped import unwrapped

_TYPES, _GRIDS = ("token_type_ids", "mm_token_type_ids"), "image_grid_thw"


class Conversation:
    """What was said and answered so far.

    Attributes:
        ids: all its tokens, int64 [1, tokens]; None at the start.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing was said yet."""
        self.ids: Tensor | None = None
        self._model, self._adapter = model, adapter_for(model)
        self._told: dict[str, Tensor] = {}  # types of the first tokens, and the grids of all images

    @property
    def tokens(self) -> int:
        """How many they are."""
        return 0 if self.ids is None else self.ids.shape[1]

    def check_images(self, images: int) -> None:
        """Refuses images where the model cannot be told which tokens attend both ways.

        Args:
            images: number of those about to be said.

        Raises:
            UnsupportedModeError: naming the ways out.
        """
        of_prompt = self._adapter.typed and not self._adapter.reads_types({})
        if of_prompt and bool(images) != (self.ids is None):
            came = "they come in a later one" if images else "there are none in it"
            raise UnsupportedModeError(
                f"images: {type(self._model).__name__} reads them in the first turn of a conversation, and {came}; say "
                "them all in the first turn (reset() begins anew)"
            )

    def joined(self, new: dict[str, Tensor], end: int | None) -> dict[str, Tensor]:
        """Inputs of `generate` for everything that was said and what comes; nothing changes yet.

        Args:
            new: inputs of what comes, by itself.
            end: the token that ends an answer; it is there once, whoever wrote it.
        """
        ids, inputs = new["input_ids"], dict(new)
        if self.ids is not None:
            twice = end is not None and int(self.ids[0, -1]) == end and ids.shape[1] > 0 and int(ids[0, 0]) == end
            ids = torch.cat([self.ids.to(ids.device), ids[:, 1:] if twice else ids], 1)
            inputs |= {name: self._of_all(name, ids, new[name]) for name in _TYPES if name in new}
            if self._adapter.position_axes > 1 and _GRIDS in self._told and _TYPES[1] in self._told:
                inputs["position_ids"] = self._positions(ids, new)
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def take(self, inputs: dict[str, Tensor], output: Tensor) -> None:
        """Takes over what was answered.

        Args:
            inputs: what `joined` gave.
            output: all tokens with those of the answer, [1, tokens].
        """
        told = {name: inputs[name] for name in _TYPES if name in inputs}
        if _GRIDS in inputs:
            told[_GRIDS] = self._grids(inputs)
        self._told, self.ids = self._told | told, output

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _of_all(self, name: str, ids: Tensor, new: Tensor | None) -> Tensor:
        """Types of all tokens; those that nobody told of are text."""
        types, earlier, coming = torch.zeros_like(ids), self._told.get(name), ids.shape[1] - self.tokens
        if earlier is not None:
            types[:, : earlier.shape[1]] = earlier
        if new is not None:
            types[:, -coming:] = new[:, -coming:]
        return types if new is None else types.to(new.dtype)

    def _positions(self, ids: Tensor, new: dict[str, Tensor]) -> Tensor:
        """Where the model places all tokens, `[3, 1, tokens]`; `generate` is given the new images alone and cannot."""
        whole: Any = unwrapped(self._model)
        inner = whole if hasattr(whole, "get_rope_index") else whole.model
        types = self._of_all(_TYPES[1], ids, new.get(_TYPES[1]))
        positions: Tensor = inner.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=self._grids(new), attention_mask=torch.ones_like(ids)
        )[0]
        return positions

    def _grids(self, inputs: dict[str, Tensor]) -> Tensor:
        """Grids of all images, also of those in some inputs."""
        return torch.cat([told[_GRIDS] for told in (self._told, inputs) if _GRIDS in told])
