"""Which model something was made for, told from its decoder without reading all of its weights."""

from __future__ import annotations

import hashlib

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.policies.configured import Configured

_SAMPLED = 16  # values of each parameter
_LEAST = 2.0**-14  # smaller values lose digits in float16, so they all count as zero


class Fingerprint(Configured):
    """The architecture of a decoder and a hash of its weights.

    Args:
        model_type: transformers' name of the decoder's architecture, such as "llama".
        layers: decoder layers that attend to everything before them, as all do in most models.
        heads: query heads.
        kv_heads: key/value heads.
        hidden_size: width of the hidden states.
        weights: `weights_hash` of the decoder; None where its weights are not all at hand (offloaded, or split by
            tensor parallelism), and then only the rest is compared.
    """

    model_type: str
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    weights: str | None = None

    def differences(self, other: Fingerprint) -> list[str]:
        """What another model has otherwise, in words; empty if this fits it."""
        found: list[str] = []
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "weights":
                if mine and theirs and mine != theirs and not found:  # weights of another shape always differ
                    found.append("other weights")
            elif mine != theirs:
                found.append(f"{name} {mine} instead of {theirs}")
        return found


def fingerprint_of(decoder: PreTrainedModel) -> Fingerprint:
    """The fingerprint of the module that owns the decoder layers."""
    config = decoder.config
    heads, kinds = int(config.num_attention_heads), list(getattr(config, "layer_types", None) or [])
    return Fingerprint(
        model_type=config.model_type,
        layers=kinds.count("full_attention") if "full_attention" in kinds else config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        hidden_size=config.hidden_size,
        weights=weights_hash(decoder),
    )


def weights_hash(decoder: PreTrainedModel) -> str | None:
    """SHA-256 over names, shapes and evenly spread values of all parameters, whatever device they are on.

    Values count as bfloat16, so that a checkpoint has one hash in float32 and bfloat16, and in float16 too unless it
    was float32 and float16 rounds it otherwise. Weights quantized on loading have a hash of their own.

    Returns:
        None if some weights are not here.
    """
    if (decoder.tp_size or 1) > 1:
        return None
    digest, values = hashlib.sha256(), []
    for name, parameter in sorted(decoder.named_parameters()):
        if parameter.is_meta:
            return None
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        values.append(_sampled(parameter.detach()))
    device = values[0].device
    read = torch.cat([value.to(device) for value in values]).cpu()
    digest.update(torch.where(read.abs() < _LEAST, 0.0, read).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sampled(parameter: Tensor) -> Tensor:
    flat = parameter.reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    return flat[::step][:_SAMPLED].bfloat16().float()
