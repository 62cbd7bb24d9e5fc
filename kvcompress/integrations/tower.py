"""What the attention of a vision tower says of image features."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvcompress.errors import UnsupportedModelError

CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}  # whether the first feature is one
_WAY_OUT = "choose a reducer that reads no tower (divprune, cdpruner), or one that reads the language model's attention"


def unreadable(model: nn.Module, why: str) -> UnsupportedModelError:
    """The error for a reducer that reads a tower which nobody can read."""
    return UnsupportedModelError(
        f"reducer: it reads the attention of the vision tower, but {why} in {type(model).__name__}; {_WAY_OUT}"
    )


def attentions_of(model: nn.Module, tower: Any) -> list[nn.Module]:
    """The attention modules of a tower's layers, in order.

    Raises:
        UnsupportedModelError: unless it is a tower of CLIP or SigLIP.
    """
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if kind not in CLASS_TOKEN:
        known = ", ".join(CLASS_TOKEN)
        raise unreadable(model, f"that is of the type '{kind}' (known: {known})")
    found = [module for name, module in tower.named_modules() if name.endswith("self_attn")]
    if not found or not all(hasattr(module, name) for module in found for name in ("q_proj", "k_proj", "scale")):
        raise unreadable(model, "its layers have no q_proj and k_proj")
    return found


def layer_of_features(asked: int | list[int], layers: int) -> int:
    """Number of the layer whose output the features are, the last of several; -1 for what goes into the first."""
    numbers = [asked] if isinstance(asked, int) else list(asked)
    return max(number if number >= 0 else layers + 1 + number for number in numbers) - 1


@torch.no_grad()
def look(
    attention: Any, hidden: Float[Tensor, "images features hidden"], class_token: bool
) -> Float[Tensor, "images features channels"]:
    """Attention that each feature of an image receives, then its key, both means over heads, in float32.

    Args:
        attention: the attention module of a layer.
        hidden: what goes into it.
        class_token: whether the attention of the first feature counts alone; if not, the mean over all.
    """
    shape = (*hidden.shape[:2], attention.num_heads, -1)
    query, key = (
        project(hidden).view(shape).transpose(1, 2).float() for project in (attention.q_proj, attention.k_proj)
    )
    query = query[:, :, :1] if class_token else query
    received = [  # an image at a time, since every feature may look at every other
        (queries @ keys.transpose(1, 2) * attention.scale).softmax(-1).mean((0, 1))
        for queries, keys in zip(query, key, strict=True)
    ]
    return torch.cat([torch.stack(received).unsqueeze(-1), key.mean(1)], -1)
