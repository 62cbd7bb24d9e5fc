"""The weight that a linear layer really applies, adapters that are in use included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.parallel import local


def effective_weight(layer: nn.Module | None) -> tuple[Tensor | None, str]:
    """Weight of a linear layer, with what an unmerged LoRA adds to it.

    Source: LoRA (arXiv 2106.09685, section 4.1): W + scaling B A for each adapter in use, in layers that look like
    PEFT's (`base_layer`, `lora_A`, `lora_B`, `scaling`, `active_adapters`).

    Args:
        layer: the layer; None for a model without it.

    Returns:
        The weight `[out, in]`, this process's part of it, or None if there is none; and why the weight does not tell
        what the layer does, empty if it does.
    """
    base: Any = getattr(layer, "base_layer", layer)
    weight = getattr(base, "weight", None)
    if weight is None or base is layer or _is_idle(layer):
        return (None if weight is None else local(weight)), ""
    if not hasattr(layer, "lora_A") or local(weight) is not weight:
        shared = " on shared heads" if hasattr(layer, "lora_A") else ""
        return None, f"is a {type(layer).__module__}.{type(layer).__name__}{shared}, whose effect is no known weight"
    if not weight.is_floating_point() or weight.ndim != 2:
        return local(weight), ""  # packed by a quantized layer
    total = weight
    for name in layer.active_adapters:  # type: ignore[union-attr]
        if name not in layer.lora_A:  # type: ignore[union-attr,operator]
            continue
        if name in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(name):
            return None, f"has the adapter '{name}', which is no plain LoRA, so its effect is no known weight"
        down, up = (getattr(layer, matrix)[name].weight.to(weight.device).float() for matrix in ("lora_A", "lora_B"))
        total = torch.addmm(total.float(), up, down, alpha=float(layer.scaling[name]))  # type: ignore[union-attr,index]
    return total.detach(), ""


def _is_idle(layer: Any) -> bool:
    """Whether a layer's adapters are merged into its base weight, switched off, or none of them is in use."""
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return True
    return not getattr(layer, "active_adapters", ["unknown"])
