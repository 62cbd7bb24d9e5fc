"""The reference for everything that runs: transformers' DynamicCache under attention written out in float64.

A `Reference` holds every token of every layer. Before each forward it is told which positions each layer and head may
still see; it knows nothing of how a compressed cache chose or stored them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.mask_function import padding_in

_NAME = "attention_to_visible_positions"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the positions in `module.visible`, bool [batch, kv_heads, positions].

    Within a window where the model tells of one, with logits under its cap, and with its sinks among them; new ones
    see each other where `module.both_ways` says so.
    """
    group, queries, positions = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    visible = module.visible
    if visible.shape[1] != key.shape[1]:  # a layer that slides may have heads of another number, and sees all
        visible = visible[:, :1].expand(-1, key.shape[1], -1)
    keys, values, visible = (t.repeat_interleave(group, 1) for t in (key.double(), value.double(), visible))
    causal = torch.ones(queries, positions, dtype=torch.bool).tril(positions - queries)
    # Padding sees at least itself.
    itself = torch.eye(queries, positions, dtype=torch.bool).roll(positions - queries, 1)
    within, both = torch.ones(queries, positions, dtype=torch.bool), module.both_ways
    if kwargs.get("sliding_window") is not None:
        within = within.triu(positions - queries - kwargs["sliding_window"] + 1)
    sees = causal & within
    if both is not None:
        own = torch.nn.functional.pad(both[0], (positions - queries, 0)).unsqueeze(1)
        sees = sees | (own if both[1] else own & within)
    allowed = (sees & visible.unsqueeze(2)) | itself
    logits = query.double() @ keys.transpose(2, 3) * scaling
    if (cap := kwargs.get("softcap")) is not None:
        logits = cap * (logits / cap).tanh()
    logits = logits.masked_fill(~allowed, -torch.inf)
    if (sinks := kwargs.get("s_aux")) is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(*logits.shape[:3], 1)], -1)
    module.weights = logits.softmax(-1)[..., :positions]
    return (module.weights @ values).to(query.dtype).transpose(1, 2).contiguous(), module.weights


def prepare(model: Any) -> Any:
    """Lets a model that nobody else uses attend to visible positions alone."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.get_decoder().set_attn_implementation(_NAME)
    return model


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a model."""
    return list(model.get_decoder().layers)


def attention_in(layer: nn.Module) -> Any:
    """The attention of a decoder layer, whatever its model calls it; None for a layer that has none."""
    named = (getattr(layer, name, None) for name in ("self_attn", "attention", "attn"))
    return next((module for module in named if module is not None), None)


def both_ways(model_type: str, types: Tensor | None, past: int, total: int) -> tuple[Tensor, bool] | None:
    """Which new positions see each other whatever comes first, `[batch, queries, queries]`; None if none do.

    And whether they do so beyond a window, too.

    In PaliGemma those of a prompt of type 0, in Gemma 3 those of type 1 with nothing else between them.
    """
    if types is None or model_type not in ("gemma3", "paligemma") or (model_type == "paligemma" and past):
        return None
    marked = types == (0 if model_type == "paligemma" else 1)
    number = (marked & ~torch.nn.functional.pad(marked, (1, 0))[:, :-1]).cumsum(1).where(marked, -1)
    number = number.clamp(max=0) if model_type == "paligemma" else number
    number = number[:, past:total]
    return (number[:, :, None] == number[:, None]) & marked[:, past:total, None], model_type == "paligemma"


Held = list[list[list[list[int]]]]  # positions, [layers][batch][sets][tokens]; none of other layers


def held(cache: CompressedCache) -> Held:
    """Positions that the cache reports."""
    report = cache.report()
    found: Held = [[] for _ in cache.layers]
    for number, layer in zip(report.layers, report.held_positions, strict=True):
        found[number] = [list(map(list, row)) for row in layer]
    return found


@dataclass
class Step:
    """A forward: what went in, what the cache held before it, and what came out."""

    inputs: dict[str, Any]
    held: Held
    attention: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None

    @property
    def queries(self) -> int:
        """Number of its tokens, padding included."""
        return int(self.inputs["input_ids"].shape[1])


@contextlib.contextmanager
def recorded(model: PreTrainedModel, cache: CompressedCache | None = None) -> Iterator[list[Step]]:
    """Takes down every forward of a model, also those that `generate` makes."""
    steps: list[Step] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        steps.append(Step(kwargs, [] if cache is None or not cache.is_initialized else held(cache)))

    def attended(module: nn.Module, args: Any, output: Any) -> None:
        steps[-1].attention.append(output[0].detach().clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        steps[-1].logits = output.logits.detach().clone()

    attentions = filter(None, map(attention_in, decoder_layers(model)))
    hooks = [attention.register_forward_hook(attended) for attention in attentions]
    hooks += [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


class Reference:
    """A model of the same weights with a DynamicCache, whose layers see the positions they are told to."""

    def __init__(self, model: Any) -> None:
        """Starts with nothing seen.

        Args:
            model: what `prepare` gave.
        """
        self.model = model
        every, config = [attention_in(layer) for layer in decoder_layers(model)], model.get_decoder().config
        self.numbers = [number for number, module in enumerate(every) if module is not None]
        self.layers = [every[number] for number in self.numbers]
        self.sums = len(self.layers) < len(every)  # some layers read the mask themselves
        # Every token of every layer, unless some layers have another kind of cache.
        self.cache = DynamicCache(config=model.config) if self.sums else DynamicCache()
        self.kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)

    def run(self, inputs: dict[str, Any], visible: Held) -> Step:
        """Runs the tokens of one forward.

        Args:
            inputs: what the model got: `input_ids`, maybe `attention_mask`, `position_ids` and images.
            visible: older positions that each layer, row and head (or all heads) may see.
        """
        ids, mask = inputs["input_ids"], padding_in(inputs.get("attention_mask"))
        past, total = self.cache.get_seq_length(), self.cache.get_seq_length() + ids.shape[1]
        valid = torch.ones(ids.shape[0], total, dtype=torch.bool) if mask is None else mask[:, :total].bool()
        both = both_ways(self.model.config.model_type, inputs.get("token_type_ids"), past, total)
        for index, module in zip(self.numbers, self.layers, strict=True):
            seen = torch.ones(ids.shape[0], self.kv_heads, total, dtype=torch.bool)
            seen[:, :, :past] = bool(past) and not visible[index]
            for row, sets in enumerate(visible[index] if past else []):
                for head in range(self.kv_heads):
                    seen[row, head, sets[0 if len(sets) == 1 else head]] = True
            module.visible, module.both_ways = seen & valid[:, None], both
        passed = ("input_ids", "position_ids", "pixel_values", "image_sizes", "mm_encoder_outputs")
        given = {key: inputs[key] for key in passed if key in inputs}
        if self.sums and mask is not None:
            given["attention_mask"] = mask
        with recorded(self.model) as steps, torch.no_grad():
            self.model(**given, **cache_argument(self.cache))
        return steps[0]

    def attention_mass(self, last: int | None = None) -> list[Tensor]:
        """Probability that each position received in the last forward, `[batch, kv_heads, positions]` per layer.

        Summed over queries, or the last of them, and averaged over each group of heads; padded queries do not count.
        """
        found = []
        for module in self.layers:
            queries = module.weights.shape[2]
            counts = module.visible[:, :1, -queries:].unsqueeze(-1)
            mass = (module.weights * counts)[:, :, 0 if last is None else -last :].sum(2)
            found.append(mass.unflatten(1, (self.kv_heads, -1)).mean(2))
        return found

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Everything that one layer holds."""
        stored: Any = self.cache.layers[layer]
        return stored.keys, stored.values

    def check_stored(self, cache: CompressedCache, tolerance: float = 1e-4) -> None:
        """Asserts that each head of the cache stores the keys and values of exactly the positions it reports."""
        for layer, rows in enumerate(held(cache)):
            if layer not in cache.report().layers:
                continue
            own: Any = cache.layers[layer]
            stored = torch.cat([own.keys, own.values], -1)
            whole = torch.cat(self.keys_and_values(layer), -1)
            for row, sets in enumerate(rows):
                for head in range(self.kv_heads):
                    wanted = whole[row, head, sets[0 if len(sets) == 1 else head]]
                    near = (wanted[:, None] - stored[row, head]).abs().amax(-1) < tolerance  # in any order
                    assert near.any(1).all(), f"layer {layer}, row {row}, head {head}: stores another token"
                    assert near.any(0).sum() >= len(wanted), f"layer {layer}, row {row}, head {head}: stores one twice"

    def copy(self) -> Reference:
        """A reference that goes on independently."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other
