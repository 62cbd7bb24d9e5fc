"""Whatever a user's policy raises names stage, policy and layer, and leaves a cache that is whole or says it is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError, PolicyError, UnsupportedModeError
from kvcompress.policies.registry import REGISTRIES
from tests import tiny

SMALL = {"preset": "prefixkv", "budget": 16}
LOWEST = {"preset": "h2o", "budget": {"tokens": 16, "sink": 2, "recent": 3}}
PACKED = {"preset": "full", "quantizer": {"name": "quanto4", "group": 4, "residual": 4}}
REDUCED = {"preset": "full", "model": "llava_36", "reducer": "fastv"}
# stage, the method that fails, the configuration, and the forward in which it fails: 0 is the prompt
FAULTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("scorer", "score", SMALL, 0),
    ("scorer", "importance", SMALL, 0),
    ("scorer", "score", SMALL, 2),
    ("allocator", "allocate", SMALL, 0),
    ("allocator", "allocate", {"preset": "streaming", "budget": 16}, 0),
    ("evictor", "select", SMALL, 0),
    ("evictor", "pinned", SMALL, 0),
    ("evictor", "victim", LOWEST, 1),
    ("merger", "merge", {**SMALL, "merger": "threshold"}, 0),
    ("merger", "merge", {**SMALL, "merger": "threshold"}, 1),
    ("quantizer", "encode_keys", PACKED, 0),
    ("quantizer", "encode_values", PACKED, 0),
    ("quantizer", "decode", PACKED, 1),
    ("reducer", "guidance", REDUCED, 0),
    ("reducer", "reduce", REDUCED, 0),
]
FORWARDS = (24, 1, 4)  # tokens of the prompt, a decode step, and a second turn


class Switch:
    """What a policy fails with, and when; off where it is None."""

    error: Any = None


def broken(stage: str, method: str, config: dict[str, Any]) -> tuple[Any, Switch]:
    """The policy of a configuration, of the same fields, whose method raises while a switch is on."""
    fields = {name: value for name, value in config.items() if name not in ("preset", "model")}
    given = getattr(CompressedCache(tiny.model(config.get("model", "llama")), config["preset"], **fields).config, stage)
    registry = next(one for one in REGISTRIES if one.stage == stage)
    switch, parent = Switch(), type(given)

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.error is not None:
            raise switch.error
        return getattr(parent, method)(self, *args, **kwargs)

    policy = type("Broken", (parent,), {method: fails, "name": "broken", "__doc__": parent.__doc__})
    assert issubclass(policy, registry.contract)
    return policy(**dict(given)), switch


@torch.no_grad()
def forwards(cache: CompressedCache, name: str, first: int = 0, last: int = len(FORWARDS)) -> list[torch.Tensor]:
    """Logits of some of the forwards."""
    found, model = [], tiny.model(name)
    for number in range(first, last):
        given = {"input_ids": tiny.token_ids(1, FORWARDS[number], seed=number)}
        if number == 0 and name != "llama":
            given = tiny.prompt(name, [4, 0, 5], seed=4)
        found.append(model(**{key: value for key, value in given.items()}, **tiny.with_cache(cache)).logits)
    return found


@pytest.mark.parametrize(("stage", "method", "config", "at"), FAULTS, ids=lambda value: str(value)[:20])
def test_an_exception_in_a_policy_names_it_and_leaves_no_cache_that_lies(
    stage: str, method: str, config: dict[str, Any], at: int
) -> None:
    error = ZeroDivisionError("no luck")
    name = config.get("model", "llama")
    policy, switch = broken(stage, method, config)
    fields = {key: value for key, value in config.items() if key not in ("preset", "model")} | {stage: policy}
    cache = CompressedCache(tiny.model(name), config["preset"], **fields)
    good = forwards(cache, name)
    cache.reset()
    forwards(cache, name, last=at)
    switch.error = error
    with pytest.raises(PolicyError) as caught:
        forwards(cache, name, at, at + 1)
    layers = {"allocator": "", "evictor": "", "reducer": "layer 1: ", "merger": "layers? 0[^:]*: "}  # merged together
    assert re.fullmatch(
        f"{stage} broken: {layers.get(stage, 'layer 0: ')}ZeroDivisionError: no luck", str(caught.value)
    )
    assert caught.value.__cause__ is error
    switch.error = None
    with pytest.raises(CacheStateError, match=r"call reset\(\)"):  # the layers no longer agree
        forwards(cache, name, at, at + 1)
    cache.reset()
    assert all(torch.equal(one, other) for one, other in zip(forwards(cache, name), good, strict=True))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PolicyError("no luck"), "scorer broken: layer 0: no luck"),
        (PolicyError("scorer broken: layer 7: no luck"), "scorer broken: layer 7: no luck"),
        (KeyError("x"), "scorer broken: layer 0: KeyError: 'x'"),
        (UnsupportedModeError("mode: no luck"), "mode: no luck"),
    ],
)
def test_an_error_of_kvcompress_is_named_once(error: Exception, says: str) -> None:
    policy, switch = broken("scorer", "score", SMALL)
    switch.error = error
    kind = UnsupportedModeError if isinstance(error, UnsupportedModeError) else PolicyError
    with pytest.raises(kind) as caught:
        forwards(CompressedCache(tiny.model("llama"), "prefixkv", budget=16, scorer=policy), "llama", last=1)
    assert str(caught.value) == says


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt(), MemoryError("no room")])
def test_want_of_memory_and_interrupts_are_not_the_policys_fault(error: BaseException) -> None:
    policy, switch = broken("scorer", "score", SMALL)
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=16, scorer=policy)
    switch.error = error
    with pytest.raises(type(error)) as caught:
        forwards(cache, "llama", last=1)
    assert caught.value is error
    switch.error = None
    with pytest.raises(CacheStateError, match=r"call reset\(\)"):
        forwards(cache, "llama", last=1)


def test_a_reducer_that_fails_as_a_cache_is_made_is_named() -> None:
    policy, switch = broken("reducer", "acts_after", REDUCED)
    switch.error = ZeroDivisionError("no luck")
    with pytest.raises(PolicyError, match="reducer broken: ZeroDivisionError: no luck"):
        CompressedCache(tiny.model("llava_36"), "full", reducer=policy)


@pytest.mark.parametrize(
    ("stage", "method", "config", "at"), [FAULTS[0], FAULTS[3], FAULTS[5], FAULTS[7], FAULTS[8], FAULTS[10]]
)
def test_what_is_no_tensor_at_all_is_the_policys_fault(
    stage: str, method: str, config: dict[str, Any], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = broken(stage, method, config)
    monkeypatch.setattr(type(policy), method, lambda self, *args, **kwargs: None)
    fields = {key: value for key, value in config.items() if key != "preset"} | {stage: policy}
    cache = CompressedCache(tiny.model("llama"), config["preset"], **fields)
    with pytest.raises(PolicyError, match=f"{stage} broken: "):
        forwards(cache, "llama", last=at + 1)
