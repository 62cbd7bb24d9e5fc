"""Keys in eight bits, values in four."""

from __future__ import annotations

from kvcompress.policies.quantizers.rotated import Turned
from kvcompress.policies.registry import QUANTIZERS


@QUANTIZERS.register("k8v4")
class K8V4(Turned):
    """Eight bits for keys and four for values, both after a Hadamard rotation.

    Source: QuaRot (arXiv 2404.00456, section 4) for the rotation, as the quantizer `rotated`; that keys need more bits
    than values is KIVI's finding (arXiv 2402.02750, section 3.1).

    *Deviates:* KIVI gives keys and values the same bits and rotates neither. Here both are rotated; keys have a
    scale per channel and group of tokens, values per token. Codes are turned back as they are read, as in `rotated`.

    Args:
        group: tokens that share the scale of a key channel, and most channels that share the scale of a value.
        residual: most recent tokens that stay in full precision.
    """

    @property
    def key_bits(self) -> int:
        """Twice those of values."""
        return 8

    @property
    def value_bits(self) -> int:
        """Half of those of keys."""
        return 4
