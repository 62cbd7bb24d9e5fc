"""What a decoder looks like: where its attention is, which layers attend to everything, and whether that fits."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

LayerKind: TypeAlias = Literal["full", "sliding", "linear", "other"]
_OUTPUTS = ("o_proj", "dense", "out_proj", "wo")  # what models call the projection of attention's output
_PROBE = 5  # a position at which rotary embeddings are compared


class _Remembered(NamedTuple):
    """What a decoder's layers remember, and the attributes of its configuration by which they do."""

    says: dict[str, Any]
    kinds: tuple[LayerKind, ...]
    window: int | None


_REMEMBERED: weakref.WeakKeyDictionary[nn.Module, _Remembered] = weakref.WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The module that owns the decoder layers: the model itself, or what it calls its decoder; None if none does."""
    asks: Any = getattr(model, "get_decoder", None)
    own = asks() if callable(asks) else None
    for found in (model, own, getattr(model, "model", None)):
        if isinstance(found, PreTrainedModel) and isinstance(getattr(found, "layers", None), nn.ModuleList):
            return found
    return None


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The one part of a decoder layer that knows the layer's number and is given rotary embeddings; None if not one."""
    numbered = (part for part in layer.children() if hasattr(part, "layer_idx"))
    found = [part for part in numbered if "position_embeddings" in _names_of(type(part).forward)]
    return found[0] if len(found) == 1 else None


def layer_kinds(decoder: PreTrainedModel) -> list[LayerKind]:
    """What each decoder layer remembers, as transformers' own cache for the model says it.

    Returns:
        "full" for keys and values of every token, "sliding" for those of the last ones (a window or a chunk), "linear"
        for a state of a fixed size, "other" for anything else. Where every layer slides, all are "full", up to where
        the `window_of` the decoder ends.
    """
    kinds = _remembered_by(decoder).kinds
    return ["full"] * len(kinds) if set(kinds) == {"sliding"} else list(kinds)


def window_of(decoder: PreTrainedModel) -> int | None:
    """Tokens of a conversation up to which layers that slide, all of them, attend to everything; None if one does not.

    A window or a chunk of so many tokens ends in each layer before a token that comes later.
    """
    return _remembered_by(decoder).window


def _remembered_by(decoder: PreTrainedModel) -> _Remembered:
    """What a decoder's layers remember; asked of transformers once, and again when the configuration says otherwise."""
    says = vars(decoder.config.get_text_config(decoder=True))
    found = _REMEMBERED.get(decoder)
    if found is None or found.says != says:
        layers = own_layers(decoder)
        kinds = tuple(map(_kind_of, layers))
        slide = set(kinds) == {"sliding"}
        window = min(int(layer.sliding_window) for layer in layers) if slide else None
        found = _REMEMBERED[decoder] = _Remembered(copy.deepcopy(says), kinds, window)
    return found


def own_layers(decoder: PreTrainedModel) -> list[Any]:
    """What transformers itself would hold the decoder's layers in, without a token yet."""
    return list(DynamicCache(config=decoder.config).layers)


def _kind_of(layer: Any) -> LayerKind:
    if type(layer) is DynamicLayer:
        return "full"
    if type(layer).__name__ == "DynamicSlidingWindowLayer":
        return "sliding"
    return "linear" if type(layer).__name__ == "LinearAttentionLayer" else "other"


def output_of(attention: nn.Module) -> nn.Module | None:
    """The projection of attention's output; None if it has no name that is known."""
    named = (getattr(attention, name, None) for name in _OUTPUTS)
    return next((part for part in named if isinstance(part, nn.Module)), None)


def frequencies_of(decoder: nn.Module, attention: nn.Module) -> Tensor | None:
    """Angles per position of the pairs of dimensions (i, i + half); None if the layer turns none, or other pairs.

    What a model calls `inv_freq` says nothing of the pairs it turns, so its own function is asked to turn a vector.
    """
    rotary, kind = getattr(decoder, "rotary_emb", None), getattr(attention, "layer_type", None)
    by_kind = getattr(rotary, f"{kind}_inv_freq", None)
    frequencies = getattr(rotary, "inv_freq", None) if by_kind is None else by_kind
    if not isinstance(frequencies, Tensor) or not _turns(attention):
        return None
    turn = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    return frequencies if turn is None or _turns_halves(turn, len(frequencies)) else None


def _turns(attention: nn.Module) -> bool:
    """Whether a layer turns its queries and keys at all: some do in some layers."""
    for name in ("use_rope", "use_rotary"):
        if not getattr(attention, name, True):
            return False
    kind: Any = type(attention)
    windows_alone = "sliding_window is not None" in _source(kind) and hasattr(attention, "sliding_window")
    return not (windows_alone and attention.sliding_window is None)


@functools.cache
def _turns_halves(turn: Any, half: int) -> bool:
    """Whether a model's rotary function turns dimension i with dimension i + half; asked once of each function."""
    angles = torch.arange(1, half + 1, dtype=torch.float64) / (half + 1) * _PROBE
    vector = torch.linspace(-1.0, 2.0, 2 * half, dtype=torch.float64)
    cosine, sine = (torch.cat([value, value]) for value in (angles.cos(), angles.sin()))
    wanted = vector * cosine + torch.cat([-vector[half:], vector[:half]]) * sine
    try:
        query = vector[None, None, None]
        found = turn(query, query, cosine[None, None], sine[None, None])[0]
    except Exception:  # it wants something else
        return False
    return found.shape == query.shape and bool(torch.allclose(found[0, 0, 0], wanted))


def why_not(model: PreTrainedModel) -> str:
    """Why a model's decoder is none that a compressed cache can serve, in words that follow the model; empty if it is.

    Needs no weights: a model on the meta device will do.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder with a decoder, whose attention to the encoder's output is no cache of what it wrote"
    decoder = decoder_of(model)
    if decoder is None:
        return _without_layers(model)
    if config.get_text_config(decoder=True) is not config:
        return (
            "takes more than text, and no adapter says which of its tokens are images; its language model alone, "
            "model.get_decoder(), can be served"
        )
    kinds, layers = layer_kinds(decoder), list(decoder.layers)  # type: ignore[arg-type]
    if reason := _keeps_otherwise(decoder, kinds) or _without_attention(decoder, kinds, layers):
        return reason
    if not decoder._can_set_attn_implementation():
        return "computes attention itself, not through transformers' attention interface"
    return ""


def _keeps_otherwise(decoder: PreTrainedModel, kinds: list[LayerKind]) -> str:
    """Why what a decoder remembers is not keys and values of each layer's own; empty if it is."""
    config = decoder.config
    if getattr(config, "kv_lora_rank", None):
        return (
            "caches latents from which it computes keys and values anew (multi-head latent attention), so that no slot "
            "holds a key"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares the keys and values of a layer with later layers, which then attend to what it gave up"
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return "places tokens by several numbers (M-RoPE), of which the adapter of the whole model knows; give that one"
    odd = [index for index, kind in enumerate(kinds) if kind == "other"]
    if odd:
        return f"keeps more than keys and values, or none, in layers {ranges(odd)} ({_name_of_kind(decoder, odd[0])})"
    if set(kinds) == {"linear"}:
        return "keeps a state of one size in every layer (linear attention, state space): there is nothing to compress"
    return ""


def _without_layers(model: PreTrainedModel) -> str:
    """Why a model without a list of decoder layers is refused."""
    return _positions(model) or "has no list of decoder layers (`layers`) in what get_decoder() gives"


def _without_attention(decoder: PreTrainedModel, kinds: list[LayerKind], layers: list[nn.Module]) -> str:
    """Why some layer's attention is none that can be served; empty if each is."""
    if len(kinds) != len(layers):
        known = f"has {len(layers)} decoder layers, and its configuration speaks of {len(kinds)}"
        return _positions(decoder) or known
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        attention = attention_of(layer)
        if kind == "linear" or (attention is not None and attention.layer_idx == index):
            continue
        if attention is not None:
            return f"numbers its layers otherwise than they come: layer {index} calls itself {attention.layer_idx}"
        numbered = [name for name, part in layer.named_children() if hasattr(part, "layer_idx")]
        told = f"layer {index} ({type(layer).__name__}) has {', '.join(numbered) or 'nothing'} that knows its number"
        return _positions(decoder) or f"has no one attention with rotary embeddings in every layer: {told}"
    return ""


def _positions(model: nn.Module) -> str:
    """How a model without rotary embeddings tells positions, if it can be seen."""
    config: Any = getattr(model, "config", None)
    names = {name for part in model.modules() if isinstance(part, PreTrainedModel) for name in dir(type(part))}
    if getattr(config, "alibi", False) or any("alibi" in name for name in names):
        return "tells positions by a bias on the logits (ALiBi), which a slot would have to carry along"
    learned = [name for name, part in model.named_modules() if isinstance(part, nn.Embedding) and _is_positions(name)]
    return f"tells positions by learned embeddings ({learned[0]}), not by rotary ones" if learned else ""


def _is_positions(name: str) -> bool:
    return name.split(".")[-1] in ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def _name_of_kind(decoder: PreTrainedModel, index: int) -> str:
    kinds = getattr(decoder.config, "layer_types", None)
    return str(kinds[index]) if kinds else type(own_layers(decoder)[index]).__name__


@functools.cache
def _names_of(function: Any) -> frozenset[str]:
    """The names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
