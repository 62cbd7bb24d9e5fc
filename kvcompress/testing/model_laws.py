"""Laws of policies in a running cache, on tiny models with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Policy, Quantizer
from kvcompress.policies.registry import REGISTRIES
from kvcompress.testing import models, running
from kvcompress.testing.importance import seeds
from kvcompress.testing.laws import Law, law, require
from kvcompress.testing.reference import Reference, prepare
from kvcompress.testing.variants import Scripted, config_with

_STAGES = tuple(registry.stage for registry in REGISTRIES)
_CHOOSE = ("scorer", "allocator", "evictor")  # what they keep stays as it was
_KEEP = (*_CHOOSE, "merger")  # at the full budget too; rounding moves no code of theirs to another
_budgets = st.sampled_from([0.1, 0.3, 0.5, 0.8, 4, 9, 15])
_lengths = st.lists(st.integers(1, 24), min_size=1, max_size=3)
_schedules = st.lists(st.sampled_from([1, 1, 1, 4]), min_size=1, max_size=6)


def _model_law(*stages: str, draws: st.SearchStrategy[Any]) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law(*stages, draws=lambda policy: draws, runs_models=True, share=1 / 8)


@law(*_STAGES, draws=lambda policy: st.just(policy), share=0)
def survives_a_file(policy: Policy, same: Policy) -> None:
    """What is written of a policy to JSON, or to a configuration's file, reads back as the same policy."""
    kind = type(policy)
    found = kind.model_validate_json(policy.model_dump_json())
    require(found == policy, f"came back from JSON as {found!r}, was {policy!r}")
    for registry in REGISTRIES:
        if registry.stage == policy.stage and policy.name in registry.names() and registry.get(policy.name) is kind:
            read = registry.parse(registry.dump(policy))
            require(read == policy, f"came back from a file as {read!r}, was {policy!r}")


@functools.cache
def _untouched() -> PreTrainedModel:
    return models.randomised(models.llama)


@functools.cache
def _prepared() -> PreTrainedModel:
    model: PreTrainedModel = prepare(models.randomised(models.llama))
    return model


def named(policy: Policy) -> Policy:
    """The policy, under its class's name where it is not registered, as configurations want it."""
    kind = type(policy)
    return policy if policy.name else _named_class(kind)(**dict(policy))


@functools.cache
def _named_class(kind: type[Policy]) -> type[Policy]:
    made: type[Policy] = type(kind.__name__, (kind,), {"name": kind.__name__, "__module__": kind.__module__})
    return made


def around(policy: Policy, budget: Any, **fields: Any) -> CompressionConfig:
    """A valid configuration around a policy with a drawn budget."""
    return running.with_budget(config_with(named(policy), **fields), budget)


@_model_law(*_KEEP, draws=st.tuples(st.integers(1, 30), st.integers(1, 2), seeds))
def keeps_everything_at_the_full_budget(policy: Policy, drawn: tuple[int, int, int]) -> None:
    """At budget 1.0 a model gives what it gives with DynamicCache: logits of the prompt bit for bit, those of decode
    steps within 1e-5.
    """
    tokens, batch, seed = drawn
    ids = models.token_ids(batch, tokens, seed)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = models.model()
    cache = CompressedCache(model, around(policy, 1.0))
    found = running.continued(model, cache, inputs, 4)
    running.require_identity(found, running.continued(_untouched(), DynamicCache(), inputs, 4))


@_model_law(*_CHOOSE, draws=st.tuples(_budgets, _lengths, _schedules, seeds))
def compresses_as_if_it_masked(policy: Policy, drawn: tuple[Any, list[int], list[int], int]) -> None:
    """Every forward, padded or not, gives what it gives with all tokens stored and those hidden that the cache did not
    hold.
    """
    budget, lengths, schedule, seed = drawn
    model = models.model()
    cache = CompressedCache(model, around(policy, budget))
    inputs, _ = running.left_padded(lengths, seed)
    del inputs["position_ids"]
    steps = running.forwards(model, cache, inputs, schedule, seed)
    running.require_masked(Reference(_prepared()), cache, steps)


@_model_law(*_CHOOSE, draws=st.tuples(_budgets, st.integers(0, 3), st.integers(0, 5), _lengths, _schedules, seeds))
def holds_no_more_than_the_budget(policy: Policy, drawn: tuple[Any, int, int, list[int], list[int], int]) -> None:
    """After every forward the layers of a row together hold at most its budget, or the protected if they are more, and
    its first and last tokens among them; where they are cut in periods, by as many tokens more in each layer.
    """
    budget, sink, recent, lengths, schedule, seed = drawn
    config = around(policy, budget, **({} if policy.stage == "scorer" else {"scorer": Scripted(seed=seed)}))
    config = running.with_budget(config, budget, sink=sink, recent=recent)
    model = models.model()
    cache, valid = running.started(model, config, lengths, seed)
    period = 0 if config.evictor is None else config.evictor.cuts_every or 0
    bounded = config.evictor is not None and (config.evictor.frees != "nothing" or period)
    for number, tokens in enumerate([0, *schedule]):
        if tokens:
            valid = running.stepped(model, cache, valid, seed + number, tokens)
        running.require_protected(cache, valid)
        if bounded or number == 0:
            running.require_within_budget(cache, valid, more=period if number else 0)


@_model_law(*_KEEP, "reducer", draws=st.tuples(_budgets, st.lists(st.integers(1, 24), min_size=2, max_size=3), seeds))
def runs_rows_as_alone(policy: Policy, drawn: tuple[Any, list[int], int]) -> None:
    """Each row of a left-padded batch holds what it holds alone and gets the logits that it gets alone, but for scores
    within 1e-5 of each other.
    """
    budget, lengths, seed = drawn
    sees_images = policy.stage == "reducer"
    ids = [
        [models.token_ids(1, count, seed + row)[0] for row, count in enumerate(counts)]
        for counts in (lengths, [1] * len(lengths), [3] * len(lengths))
    ]
    if sees_images:
        ids[0] = [models.with_images(row, (seed + number) % 3) for number, row in enumerate(ids[0])]
    sides = [[True] * len(lengths)] * len(ids)
    config = around(policy, 1.0 if sees_images else budget)
    model = models.model(sees_images)
    running.require_rows_alone(model, config, ids, sides, _images if sees_images else None)


@_model_law(*_STAGES, draws=st.tuples(_budgets, st.integers(60, 120), seeds))
def generates_with_its_neighbours(policy: Policy, drawn: tuple[Any, int, int]) -> None:
    """A model generates as many tokens as it was asked for, from logits that are finite, and no more is held than
    was seen.
    """
    budget, tokens, seed = drawn
    sees_images = policy.stage == "reducer"
    row = models.token_ids(1, tokens, seed)[0]
    row = models.with_images(row, 1) if sees_images else row
    model: Any = models.model(sees_images)
    given = _images(row) if sees_images else {}
    cache = CompressedCache(model, around(_fine(policy), 1.0 if policy.stage == "quantizer" else budget))
    ids = row[None]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
        **cache_argument(cache),
    )
    require(output.sequences.shape[1] == ids.shape[1] + 4, f"generated {output.sequences.shape[1] - ids.shape[1]}")
    require(torch.stack(output.logits).isfinite(), "logits are not finite")
    report = cache.report()
    require(report.tokens_seen == ids.shape[1] + 3, f"says that it saw {report.tokens_seen} tokens")
    require(report.retention <= 1.0, f"says that it keeps {report.retention:.1%}")


def _fine(policy: Policy) -> Policy:
    """A quantizer of small groups, if it can be one, so that a short prompt has many; any other policy as it is."""
    if not isinstance(policy, Quantizer):
        return policy
    try:
        return type(policy)(**{**dict(policy), "group": 8, "residual": 8})
    except ConfigError:
        return policy


def _images(row: Tensor) -> dict[str, Tensor]:
    number = int((row == models.IMAGE_TOKEN).sum()) // models.IMAGE_TOKENS
    return models.pixels(number, seed=int(row.sum())) if number else {}


__all__ = ["around", "named"]
