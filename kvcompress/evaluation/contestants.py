"""The caches that a benchmark compares, and how each plays a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.evaluation.memory import held_bytes
from kvcompress.evaluation.timing import Stopwatch

BASE = "DynamicCache"
QUANTIZED = "QuantizedCache"
FLOOR = "floor"
REFERENCES = (BASE, QUANTIZED, FLOOR)


@dataclass
class Contestant:
    """A cache that takes part.

    Attributes:
        policy: its name.
        budget: the bare amount and its unit, if it has one.
        play: a round with it: yields the seconds to the first token, then those of each later one.
        held: bytes that the cache held at the end of a round; None for the floor.
        peak: most memory that a round took.
        first: seconds to the first token of each round.
        later: seconds of each later token of all rounds.
        note: why it has no figures, if it has none.
        optional: whether the others run on if it fails in whatever way.
    """

    policy: str
    budget: tuple[float | None, str | None]
    play: Callable[[Contestant, Tensor], Iterator[float]]
    held: int | None = None
    peak: int | None = None
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    note: str | None = None
    optional: bool = False


def contestants_of(
    model: PreTrainedModel,
    configs: Sequence[tuple[str, CompressionConfig]],
    references: Sequence[str],
    new_tokens: int,
    missing: str | None,
) -> list[Contestant]:
    """References and configurations; `missing` tells why there is no QuantizedCache."""
    text = model.config.get_text_config(decoder=True)
    dynamic = partial(DynamicCache, config=text)
    plays: dict[str, Callable[[Contestant, Tensor], Iterator[float]]] = {
        BASE: partial(_play, model, dynamic, new_tokens),
        QUANTIZED: partial(_play, model, partial(_quantized, text), new_tokens),
        FLOOR: partial(_play_floor, model, dynamic, new_tokens),
    }
    found = [Contestant(name, (None, None), plays[name]) for name in REFERENCES if name in references]
    for contestant in found:
        if contestant.policy == QUANTIZED:
            contestant.note, contestant.optional = missing, True
    for name, config in configs:
        amounts = ((getattr(config.budget, unit), unit) for unit in ("fraction", "tokens", "bytes"))
        budget = next(amount for amount in amounts if amount[0] is not None)
        make = partial(CompressedCache, model, config)
        found.append(Contestant(name, budget, partial(_play, model, make, new_tokens)))
    return found


def _quantized(text: Any) -> Cache:
    heads, dim = text.num_key_value_heads, getattr(text, "head_dim", None)
    width = heads * (dim or text.hidden_size // text.num_attention_heads)
    return QuantizedCache("quanto", text, nbits=4, q_group_size=math.gcd(64, width), residual_length=128)


def _play(
    model: PreTrainedModel, make: Callable[[], Cache], new_tokens: int, contestant: Contestant, ids: Tensor
) -> Iterator[float]:
    """A round with a cache, which is gone when the last token has come."""
    cache = make()
    for _ in range(new_tokens):
        seconds, ids = _forward(model, ids, **cache_argument(cache))
        yield seconds
    seconds, _ = _forward(model, ids, **cache_argument(cache))
    with torch.inference_mode():
        contestant.held = held_bytes(cache)
    del cache
    yield seconds


def _play_floor(
    model: PreTrainedModel, make: Callable[[], Cache], new_tokens: int, contestant: Contestant, ids: Tensor
) -> Iterator[float]:
    """The same without a cache for the prompt, and with a cache of one token for each step."""
    seconds, token = _forward(model, ids, use_cache=False)
    yield seconds
    for _ in range(new_tokens):
        cache = make()
        _forward(model, token, **cache_argument(cache))
        seconds, token = _forward(model, token, **cache_argument(cache))
        yield seconds


@torch.inference_mode()
def _forward(model: PreTrainedModel, ids: Tensor, **given: Any) -> tuple[float, Tensor]:
    """Seconds of a forward and the choice of the next tokens, as in greedy `generate`, and these tokens."""
    watch = Stopwatch(model.device)
    watch.mark()
    token = model(ids, logits_to_keep=1, **given).logits[:, -1:].argmax(-1)
    watch.mark()
    return watch.laps()[0], token
