"""The attention implementation that transformers knows as "kvcompress".

`CompressedCache.update` returns the new keys with their cache layer attached. The function here reads that attribute
and lets the layer attend; without one it hands over to the attention the model had before. So nothing global remembers
which cache is in use, and a model works as ever with any other cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.cache.mask_function import is_made, own_mask, padding_mask
from kvcompress.errors import UnsupportedModeError
from kvcompress.kernels import Softmax, in_one_dtype, without_autocast

NAME = "kvcompress"
_CALL = "_kvcompress_call"  # on the key tensor of a forward: the cache and the number of the layer
# What models hand to every attention, and what the attention of the models we know does not read.
_WITHOUT_MEANING = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
_PREVIOUS = "_kvcompress_previous_attention"  # on attention modules


@runtime_checkable
class Attends(Protocol):
    """What `update` attaches to the keys it returns.

    Attributes:
        window: how many positions it lets come, where every layer attends to a window; None without one.
    """

    window: int | None

    def attend(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Tensor:
        """Attends over the stored slots and the new tokens; returns `[batch, heads, queries, head_dim]`."""


def attach(key: Tensor, cache: Attends, layer: int) -> Tensor:
    """Marks keys as belonging to a layer of a cache, for the attention function that gets them next."""
    setattr(key, _CALL, (cache, layer))
    return key


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
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
        softcap: what the model keeps its logits below; None if it lets them be.
        s_aux: a logit of each head that the softmax runs over too, `[heads]`; None if there is none.
        **kwargs: passed on to the model's former attention; with a compressed cache, all that would change what
            attention means has to be None.

    Returns:
        Output `[batch, queries, heads, head_dim]`, and no attention weights unless the former attention gives some.

    Raises:
        UnsupportedModeError: for an argument that it does not know.
        UnsupportedModelError: for a mask that is not of padding alone.
    """
    call: tuple[Attends, int] | None = getattr(key, _CALL, None)
    if call is None:
        shaped = {name: given for name, given in (("softcap", softcap), ("s_aux", s_aux)) if given is not None}
        kwargs |= {"dropout": dropout, "scaling": scaling, **shaped}
        return _former_attention(module, query, key, value, attention_mask, written_out=bool(shaped), **kwargs)
    cache, layer = call
    for name, given in kwargs.items():
        within = name == "sliding_window" and cache.window is not None and cache.window <= (given or 0)
        if given is not None and name not in _WITHOUT_MEANING and not within:
            raise UnsupportedModeError(
                f"{name}: a compressed cache does not know this argument of attention and will not pass over it; leave "
                "it out, or use another cache"
            )
    if attention_mask is not None and not is_made(attention_mask):
        raise own_mask(module, attention_mask)
    softmax = Softmax(scaling or query.shape[-1] ** -0.5, softcap, s_aux)
    query, key, value = in_one_dtype(query, key, value)
    if not torch.is_grad_enabled():
        output = _attend(query, key, value, cache, layer, module, attention_mask, softmax)
    else:
        with torch.no_grad():
            output = _attend(query, key, value, cache, layer, module, attention_mask, softmax)
        if query.requires_grad:
            output = _InferenceOnly.apply(output, query)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


@without_autocast
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Attends,
    layer: int,
    module: nn.Module,
    mask: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    return cache.attend(layer, module, query, key, value, mask, softmax)


def install(decoder: PreTrainedModel, attention_modules: list[nn.Module]) -> None:
    """Makes "kvcompress" the attention of a decoder, of which it is not yet, and remembers what it had before."""
    register()
    for module in attention_modules:
        setattr(module, _PREVIOUS, decoder.config._attn_implementation)
    decoder.set_attn_implementation(NAME)


def register() -> None:
    """Makes "kvcompress" known to transformers."""
    AttentionInterface.register(NAME, compressed_attention)
    AttentionMaskInterface.register(NAME, padding_mask)


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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    written_out: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention the model had before, given the mask in the form that it expects.

    What sdpa knows nothing of, a cap or sinks, the model's own eager attention does if no flash attention did.
    """
    name = getattr(module, _PREVIOUS, "sdpa")
    if written_out and not name.startswith("flash"):
        name = "eager"
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
    if mask is not None and mask.dtype != torch.bool:
        return mask  # one of four dimensions that the user made comes as it is
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)[None, None]
    hidden = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, hidden)
