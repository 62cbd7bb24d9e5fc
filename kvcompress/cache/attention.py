"""The attention implementation that transformers knows as "kvcompress".

`CompressedCache.update` returns the new keys with their cache layer attached. The function here reads that attribute
and lets the layer attend; without one it hands over to the attention the model had before. So nothing global remembers
which cache is in use, and a model works as ever with any other cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import UnsupportedModeError
from kvcompress.kernels import without_autocast

NAME = "kvcompress"
_LAYER = "_kvcompress_layer"  # on the key tensor of a forward
_PREVIOUS = "_kvcompress_previous_attention"  # on attention modules


@runtime_checkable
class Attends(Protocol):
    """What `update` attaches to the keys it returns."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attends over the stored slots and the new tokens; returns `[batch, heads, queries, head_dim]`."""


def attach(key: Tensor, layer: Attends) -> Tensor:
    """Marks keys as belonging to a cache layer, for the attention function that gets them next."""
    setattr(key, _LAYER, layer)
    return key


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature that transformers asks for.

    Args:
        module: the attention module.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`, with a cache layer attached or not.
        value: like `key`.
        attention_mask: what the sdpa mask function made.
        dropout: unused with a compressed cache, which refuses training.
        scaling: factor on the logits.
        **kwargs: passed on to the model's former attention.

    Returns:
        Output `[batch, queries, heads, head_dim]`, and no attention weights unless the former attention gives some.
    """
    layer: Attends | None = getattr(key, _LAYER, None)
    if layer is None:
        return _former_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scaling = scaling or query.shape[-1] ** -0.5
    query, key, value = _as_autocast(query, key, value)
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        output = _attend(query, key, value, layer, module, attention_mask, scaling)
    if torch.is_grad_enabled() and query.requires_grad:
        output = _InferenceOnly.apply(output, query)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


@without_autocast
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: Attends, module: nn.Module, mask: Tensor | None, scaling: float
) -> Tensor:
    return layer.attend(module, query, key, value, mask, scaling)


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which autocast lets attention compute, if it is on; as they are otherwise."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def install(decoder: PreTrainedModel, attention_modules: list[nn.Module]) -> None:
    """Makes "kvcompress" the attention of a decoder and remembers what it had before."""
    if not is_installed(decoder):
        AttentionInterface.register(NAME, compressed_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        for module in attention_modules:
            setattr(module, _PREVIOUS, decoder.config._attn_implementation)
        decoder.set_attn_implementation(NAME)


def uninstall(decoder: PreTrainedModel, attention_modules: list[nn.Module]) -> None:
    """Gives a decoder its former attention back."""
    for module in attention_modules:
        previous = module.__dict__.pop(_PREVIOUS, None)
        if previous is not None and is_installed(decoder):
            decoder.set_attn_implementation(previous)


def is_installed(decoder: PreTrainedModel) -> bool:
    """Whether the decoder's attention is "kvcompress"."""
    return bool(decoder.config._attn_implementation == NAME)


class _InferenceOnly(torch.autograd.Function):
    """Stops a backward pass that would silently leave out the attention."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedModeError(
            "backward: a CompressedCache carries no gradients; train with transformers' own caches"
        )


def _former_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention the model had before, given the mask in the form that it expects."""
    name = getattr(module, _PREVIOUS, "sdpa")
    if name == "eager":
        eager: Callable[..., tuple[Tensor, Tensor | None]]
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, _additive_mask(query, key, mask), **kwargs)
    if name.startswith("flash"):
        mask = None if mask is None else mask[:, 0, -1].contiguous()  # the padding alone; causality is its own
    elif name != "sdpa":
        name = "sdpa"  # the mask function is sdpa's, and so is what it stands for
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _additive_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask that eager attention adds to logits; sdpa's None stands for plain causality."""
    queries, tokens = query.shape[2], key.shape[2]
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)[None, None]
    hidden = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, hidden)
