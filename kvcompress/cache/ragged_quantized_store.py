"""A layer's store whose older tokens are quantized, in as many whole groups as each head has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress.cache.counts import Counts
from kvcompress.cache.layout import slots_after
from kvcompress.cache.quantized_store import QuantizedStore
from kvcompress.cache.ragged_packed import RaggedPacked
from kvcompress.cache.ragged_store import RaggedStore
from kvcompress.kernels import sent
from kvcompress.policies.context import Codes, Keys, Values


class RaggedQuantizedStore(QuantizedStore, RaggedStore):
    """Codes and full precision both without gaps, so that bytes are what the heads hold together.

    Every row and head has its own number of quantized slots, its oldest. The groups of all of them are encoded as those
    of one row with one head, and lie in one buffer; a selection copies codes as they are, and none goes back to full
    precision. Heads come to have a group at different steps; they are quantized at the same ones, a group of steps
    apart, so that most steps quantize nothing.
    """

    by_head = True

    @property
    def most_dense(self) -> int:
        """Tokens of a row and head in full precision, before some of them are quantized."""
        return self.quantizer.residual + 2 * self.quantizer.group

    def places(self) -> list[Tensor]:
        """Where the slots of each head begin, quantized or not."""
        return [*super().places(), *(packed.start for packed in self._packed or ())]

    def restore(self, saved: Any) -> None:
        """Takes over what `saved` gave; raises ValueError if it does not fit together."""
        super().restore(saved)
        if self._packed is not None:
            used = np.zeros_like(self.slots) if self.packed_rows is None else self.packed_rows
            keys, values = (packed.checked(used) for packed in self._packed)
            if keys.slots.shape != self.slots.shape or (keys.slots != values.slots).any():
                raise ValueError("codes of other rows or heads")
            self._packed = (keys, values)
            self._count_packed(used)

    def _oldest(self, more: Counts) -> tuple[Keys, Values]:
        """Keys and values that are to be quantized: the first slots of every row and head, as one row with one head."""
        assert self.keys is not None and self.values is not None
        at = sent(slots_after(more * 0, more, self.slots), self.keys.device)
        return self.keys.index_select(0, at)[None, None], self.values.index_select(0, at)[None, None]

    def _packed_of(self, codes: Codes, more: Counts) -> Any:
        return RaggedPacked.of(codes, np.broadcast_to(more, self.slots.shape))

    def _without_slots(self) -> tuple[Any, Any]:
        none = np.zeros_like(self.slots)
        keys, values = (
            RaggedPacked.of(codes, none).each(lambda tensor: tensor[:, :, :0] if tensor.ndim == 4 else tensor)
            for codes in self._group_of_zeros(1)
        )
        return keys, values

    def _in_place(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        assert self._packed is not None and self.keys is not None and self.values is not None
        codes, _ = self._packed  # those of values lie alike
        layout = {"code_start": codes.start, "code_slots": codes.capacity, "start": self.start, "slots": self.capacity}
        return (self.keys, self.values), layout

    def _drop_first(self, more: Counts, left: Counts) -> None:
        """Gives back the first slots of full precision, each row's and head's own number of them."""
        assert self.keys is not None
        slots = torch.arange(int(left.max(initial=0)), device=self.keys.device)
        order = slots + sent(more, self.keys.device).unsqueeze(-1)
        self._lay_out(np.maximum(1, np.broadcast_to(left, self.slots.shape)), order)
