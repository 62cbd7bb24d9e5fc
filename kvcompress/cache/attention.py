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
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import UnsupportedModeError, UnsupportedModelError
from kvcompress.kernels import in_one_dtype, without_autocast

NAME = "kvcompress"
# Where the keys of a compressed cache begin, as it tells the mask function: nowhere.
COMPRESSED = -(2**30)
COMPRESSED_UNREAD = COMPRESSED - 1  # and one token may still be padding
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
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
    if attention_mask is not None and padding_in(attention_mask) is attention_mask:
        raise own_mask(module, attention_mask)
    scaling = scaling or query.shape[-1] ** -0.5
    query, key, value = in_one_dtype(query, key, value)
    if not torch.is_grad_enabled():
        output = _attend(query, key, value, cache, layer, module, attention_mask, scaling, softcap, s_aux)
    else:
        with torch.no_grad():
            output = _attend(query, key, value, cache, layer, module, attention_mask, scaling, softcap, s_aux)
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
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return cache.attend(layer, module, query, key, value, mask, scaling, softcap, sinks)


def padding_mask(
    *args: Any,
    q_length: int | None = None,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers makes for this attention: of padding alone, `[batch, 1, 1, positions]`, in prefill.

    A compressed cache, told by its offset, needs to know which positions are padding; causality is its own, and decode
    steps need no mask at all, so that it keeps one shape when they are compiled. Where the model lets tokens see others
    than those before them, it gets the whole mask, `[batch, 1, queries, positions]`. Any other cache gets that of sdpa.
    """
    if kv_offset in (COMPRESSED, COMPRESSED_UNREAD):
        if (
            q_length is not None
            and q_length > 1
            and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function
        ):
            whole = _unless_causal(*args, q_length=q_length, attention_mask=attention_mask, **kwargs)
            if whole is not None:
                return whole
        unsaid = attention_mask is None or (q_length == 1 and kv_offset == COMPRESSED)
        return None if unsaid else attention_mask[:, None, None].to(torch.bool)  # type: ignore[index]
    known = {"q_length": q_length, "kv_offset": kv_offset, "attention_mask": attention_mask, **kwargs}
    return sdpa_mask(*args, **known)


def check_causal(module: nn.Module, mask: Tensor | None, first: bool) -> None:
    """Refuses attention that is meant to go both ways where no mask told the decoder's cache of it.

    Args:
        module: the attention module.
        mask: what it attends with.
        first: whether nothing was seen before this forward, so that transformers may leave a mask out.

    Raises:
        UnsupportedModelError: for a mask that the decoder did not get, or a model that attends both ways without one.
    """
    if mask is not None and mask.shape[2] > 1:
        raise own_mask(module, mask)
    if first and getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"model: {type(module).__name__} attends to tokens before and after each where it is given no mask of its "
            "own, and a compressed cache attends causally there; say which tokens do, by token_type_ids as the "
            "processor gives them"
        )


def own_mask(module: nn.Module, mask: Tensor) -> UnsupportedModelError:
    """What is wrong with a mask that the decoder did not get."""
    return UnsupportedModelError(
        f"model: {type(module).__name__} attends with a mask of the shape {tuple(mask.shape)} that it makes itself, "
        "and a compressed cache knows that of the decoder alone; use another cache"
    )


def _unless_causal(
    *args: Any, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """What each query sees, written out, `[batch, 1, queries, positions]`; None if that is what came before it."""
    known = {**kwargs, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    known |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    whole = sdpa_mask(*args, **known)
    assert whole is not None
    causal = torch.ones(q_length, kv_length, dtype=torch.bool, device=whole.device).tril(kv_length - q_length)
    if bool((whole == causal).all()):
        return None
    return whole if attention_mask is None else whole & attention_mask[:, None, None, :kv_length].to(torch.bool)


def padding_in(mask: Any) -> Any:
    """The padding `[batch, positions]` in a mask that `padding_mask` made; any other mask as it is.

    `generate` makes masks before it calls the model, for some models one for each kind of layer.
    """
    mask = _of_full_layers(mask)
    return mask[:, 0, -1] if _is_made(mask) else mask


def last_seen_in(mask: Any) -> Int[Tensor, "batch queries"] | None:
    """Number of the last new position that each query sees by a mask that `padding_mask` made; None if it is its own.

    Raises:
        UnsupportedModelError: if some query does not see all positions up to there that hold a token.
    """
    mask = _of_full_layers(mask)
    if not _is_made(mask) or mask.shape[2] == 1:
        return None
    visible, (queries, positions) = mask[:, 0], mask.shape[2:]
    number = torch.arange(positions, device=mask.device)
    own = number[positions - queries :]
    last = torch.maximum((visible * number).amax(-1), own)
    if not torch.equal(visible, (number <= last.unsqueeze(-1)) & visible[:, -1:]):
        raise UnsupportedModelError(
            "model: it attends with a mask by which some tokens do not see all that came before them, which a "
            "compressed cache does not know; use another cache"
        )
    among_new: Tensor = last - (positions - queries)
    return among_new


def _of_full_layers(mask: Any) -> Any:
    """The mask of the layers that attend to everything, where there is one for each kind of layer."""
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, dict) else mask


def _is_made(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[1] == 1


def install(decoder: PreTrainedModel, attention_modules: list[nn.Module]) -> None:
    """Makes "kvcompress" the attention of a decoder and remembers what it had before."""
    if not is_installed(decoder):
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
