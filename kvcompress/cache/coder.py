"""What asks a quantizer: codes of whole groups, and keys and values of some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from kvcompress.policies.faults import policy_errors

_BLOCK = 4096  # slots that attention decodes at a time


@dataclass(frozen=True)
class Coder:
    """A quantizer at work in a layer.

    Attributes:
        quantizer: the policy.
        layer: index of the decoder layer, for errors.
    """

    quantizer: Quantizer
    layer: int

    def encode(self, keys: Keys, values: Values) -> tuple[Codes, Codes]:
        """Codes of whole groups of tokens."""
        with policy_errors(self.quantizer, self.layer):
            codes = self.quantizer.encode_keys(keys), self.quantizer.encode_values(values)
            if any(one.data.shape[2] != keys.shape[2] for one in codes):
                raise ValueError(f"must give codes for {keys.shape[2]} tokens, got {[o.data.shape[2] for o in codes]}")
        return codes

    def of_zeros(self, like: tuple[Tensor, Tensor], heads: int) -> tuple[Codes, Codes]:
        """Codes of a group of empty slots of one row, for their shapes; of tokens like those given."""
        keys, values = (one.new_zeros(1, heads, self.quantizer.group, one.shape[-1]) for one in like)
        return self.encode(keys, values)

    def decode(self, codes: Codes) -> Keys:
        """Keys or values."""
        with policy_errors(self.quantizer, self.layer):
            return self.quantizer.decode(codes)

    def blocks(self, slots: int) -> Iterator[tuple[int, int]]:
        """Where blocks of so many slots start and end, in whole groups."""
        step = max(1, _BLOCK // self.quantizer.group) * self.quantizer.group
        for start in range(0, slots, step):
            yield start, min(start + step, slots)
