"""A prompt that is read once and compressed in many ways from there."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache import tables, undoing
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.step import Phase, Prefill
from kvcompress.evaluation.models import LoadedModel

Row = dict[str, Any]
BUDGETS = (0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Follow:
    """What comes after a prompt.

    Attributes:
        ids: its tokens, `[batch, tokens]`; several rows for each prompt are asked of copies.
        first: the first of them that counts; those before it are the question.
    """

    ids: Tensor
    first: int = 0


@dataclass
class Prompt:
    """What is read before anything is compressed, a batch without padding, and what may follow it.

    Attributes:
        name: of the batch in its suite.
        task: what is measured.
        inputs: what the model is called with.
        follows: by name.
    """

    name: str
    task: str
    inputs: dict[str, Tensor]
    follows: dict[str, Follow]


@dataclass(frozen=True)
class Way:
    """A configuration and the budgets it is measured at."""

    config: CompressionConfig
    budgets: Sequence[float] = BUDGETS


Methods = dict[str, dict[str, Way]]  # what scores -> how the budget is shared


class Reading:
    """A prompt that was read, and can be compressed in many ways."""

    def __init__(self, loaded: LoadedModel, inputs: dict[str, Tensor]) -> None:
        """Reads it, and lets scores and evictions wait."""
        self.model = loaded.model
        self.cache = CompressedCache(self.model, "text")
        self.cache.activate_past_recording()
        start = time.process_time()
        self.logits = self.model(**inputs, **cache_argument(self.cache), logits_to_keep=1).logits[:, -1]
        self.seconds = time.process_time() - start

    def scored(self, config: CompressionConfig) -> CompressedCache:
        """A copy that a scorer has looked at, which still holds everything."""
        cache = beside(self.cache)
        state = cache._state
        state.adopt(config)
        with torch.no_grad(), state.writable():
            tables.tidy(state)
            undoing.settle(state, Prefill(), 0)
        for layer in state.layers:
            layer.unscored = None
        return cache


def beside(cache: CompressedCache) -> CompressedCache:
    """A copy that shares the tensors, none of which is written to before they are cut."""
    state = cache._state
    tensors = [one for layer in state.layers for one in (*vars(layer.store).values(), *vars(layer).values())]
    tensors += [one for layer in state.layers if layer.unscored for one in (layer.unscored.query, layer.unscored.lse)]
    return copy.deepcopy(cache, {id(one): one for one in tensors if isinstance(one, Tensor)})


def compressed(scored: CompressedCache, config: CompressionConfig) -> CompressedCache:
    """A copy of what was scored, cut by an allocator and an evictor to a budget."""
    cache = copy.deepcopy(scored) if config.evictor is None or config.merger is not None else beside(scored)
    state = cache._state
    state.adopt(config)
    for layer in state.layers:
        if config.allocator.by_head:
            before, layer.store = layer.store, layer._new_store()
            keys, values = before.dense()
            layer.store.append(keys[:, :, : layer.slots], values[:, :, : layer.slots], 0)
    state.recording, state.waiting = False, Phase.PREFILL
    cache.compress()
    return cache


def reconstructed(loaded: LoadedModel, inputs: dict[str, Tensor]) -> CompressedCache:
    """A copy scored by the prompt's repetition, which still holds everything."""
    cache = CompressedCache(loaded.model, "text", budget=1.0, scorer="kvzip")
    cache.score_by_reconstruction(loaded.tokenizer, inputs)
    return cache


def followed(model: Any, cache: CompressedCache, logits: Tensor | None, follow: Follow) -> list[list[float]]:
    """For each row: nats of the tokens that count, their number, and 1 if each of them is the likeliest, or else 0.

    Args:
        model: the model.
        cache: what it holds of the prompts; changed.
        logits: of the first token that follows; None where it does not count.
        follow: what follows.
    """
    wanted = follow.ids[:, follow.first :]
    count = wanted.shape[1]
    fed = [] if logits is None or follow.first else [logits.unsqueeze(1)]
    if follow.ids.shape[1] > 1:
        more = count - len(fed)
        fed.append(model(follow.ids[:, :-1], **cache_argument(cache), logits_to_keep=more).logits[:, -more:])
    found = torch.cat(fed, 1).float()
    nats = F.cross_entropy(found.transpose(1, 2), wanted, reduction="none").sum(1)
    right = (found.argmax(-1) == wanted).all(1)
    return [[round(float(one), 4), count, int(hit)] for one, hit in zip(nats, right, strict=True)]


def measured(loaded: LoadedModel, prompt: Prompt, methods: Methods) -> Iterator[Row]:
    """A row for the full cache, then one for every method, way and budget."""
    reading = Reading(loaded, prompt.inputs)

    def row(cache: CompressedCache, method: str, way: str, budget: float) -> Row:
        held, found = cache.report().retention, {}
        for name, follow in prompt.follows.items():
            own = copy.deepcopy(cache) if len(prompt.follows) > 1 else cache
            if (rows := len(follow.ids) // len(reading.logits)) > 1:
                own.batch_repeat_interleave(rows)
            found[name] = followed(loaded.model, own, reading.logits, follow)
        known = {"task": prompt.task, "prompt": prompt.name, "method": method, "way": way, "budget": budget}
        return {**known, "held": held, "read": reading.seconds, "scored": seconds, "found": found}

    full, seconds = CompressionConfig.preset("full"), 0.0
    yield row(compressed(reading.scored(full), full), "full", "", 1.0)
    for method, ways in methods.items():
        one = next(iter(ways.values())).config
        if any(way.config.scorer != one.scorer for way in ways.values()):
            raise ValueError(f"methods: the ways of {method!r} have different scorers; scores are taken once for all")
        repeats = one.scorer is not None and one.scorer.reconstructs
        start = time.process_time()
        scored = reconstructed(loaded, prompt.inputs) if repeats else reading.scored(one)
        seconds = time.process_time() - start
        for name, way in ways.items():
            for budget in way.budgets:
                yield row(compressed(scored, way.config.override(budget=budget)), method, name, budget)
