"""What caches leave on a model: one set of hooks, however many they were and for whichever part; none after restore."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvcompress
from kvcompress import CompressedCache
from kvcompress.cache import hooks
from tests import tiny

IMAGE = "llava_36"
REDUCED = {"config": "full", "reducer": "lightkv"}


def hooks_on(model: PreTrainedModel) -> dict[str, int]:
    """Number of our forward hooks on each module that has any; transformers puts some of its own on vision towers."""
    found = {}
    for name, module in model.named_modules():
        hooks_of = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        ours = [hook for hook in hooks_of if getattr(hook, "func", hook).__module__.startswith("kvcompress")]
        found[name] = len(ours)
    return {name: count for name, count in found.items() if count}


def traces_on(model: PreTrainedModel) -> list[str]:
    """What is left of kvcompress on any module."""
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "kvcompress" in attribute or type(value).__module__.startswith("kvcompress")
    ]


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that lets other threads go on in its middle."""

    def waits(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        time.sleep(0.02)
        return found

    return waits


@pytest.mark.parametrize("name", ["llama", IMAGE])
def test_first_caches_of_several_threads_leave_one_set_of_hooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, model = tiny.build(name), tiny.build(name)
    CompressedCache(alone, **REDUCED)
    monkeypatch.setattr(hooks.inspect, "signature", slowly(inspect.signature))
    monkeypatch.setattr(type(model), "set_attn_implementation", slowly(type(model).set_attn_implementation))
    start, caches, failed = threading.Barrier(4), [], []

    def make() -> None:
        start.wait()
        try:
            caches.append(CompressedCache(model, **REDUCED))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    monkeypatch.undo()
    assert not failed and len(caches) == 4
    assert hooks_on(model) == hooks_on(alone)
    with torch.no_grad():
        inputs = tiny.inputs(name, 20, seed=1)
        logits = [model(**inputs, **tiny.with_cache(cache)).logits for cache in caches]
        assert all(torch.equal(one, logits[0]) for one in logits)
        kvcompress.restore(model)
        assert not hooks_on(model) and not traces_on(model)
        assert torch.equal(model(**inputs).logits, tiny.untouched(name)(**inputs).logits)


def parts(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """A LLaVA and the models inside it that a cache can be made for."""
    return {"whole": model, "without head": model.model, "language model": model.model.language_model}


@torch.no_grad()
@pytest.mark.parametrize("order", list(itertools.permutations(["whole", "without head", "language model"])))
def test_caches_of_the_parts_of_a_model_leave_its_reducers_at_work(order: tuple[str, ...]) -> None:
    inputs = tiny.prompt(IMAGE, [4, 0, 5], seed=4)
    wanted = CompressedCache(tiny.build(IMAGE), **REDUCED)
    model = tiny.build(IMAGE)
    for part in order:
        CompressedCache(parts(model)[part], "full")
    cache, other = CompressedCache(model, **REDUCED), tiny.build(IMAGE)
    wanted = CompressedCache(other, **REDUCED)
    found = model(**inputs, **tiny.with_cache(cache)).logits
    assert torch.equal(found, other(**inputs, **tiny.with_cache(wanted)).logits)
    report = cache.report()
    assert report == wanted.report() and report.vision_retention is not None and report.vision_retention < 1
    found = model.generate(**inputs, **tiny.with_cache(CompressedCache(model, **REDUCED)), max_new_tokens=4)
    wanted_ids = other.generate(**inputs, **tiny.with_cache(CompressedCache(other, **REDUCED)), max_new_tokens=4)
    assert torch.equal(found, wanted_ids)


@torch.no_grad()
@pytest.mark.parametrize("first", [["language model"], ["without head"], ["language model", "without head", "whole"]])
def test_restoring_a_model_restores_its_parts(first: list[str]) -> None:
    model, inputs = tiny.build(IMAGE), tiny.prompt(IMAGE, [4, 0, 5], seed=4)
    for part in first:
        CompressedCache(parts(model)[part], **({"config": "full"} if part == "language model" else REDUCED))
    assert hooks_on(model)
    kvcompress.restore(model)
    assert not hooks_on(model) and not traces_on(model)
    assert torch.equal(model(**inputs).logits, tiny.untouched(IMAGE)(**inputs).logits)
    assert model.config._attn_implementation == tiny.untouched(IMAGE).config._attn_implementation


@torch.no_grad()
def test_restoring_a_part_leaves_a_model_that_serves_new_caches() -> None:
    model, inputs = tiny.build(IMAGE), tiny.prompt(IMAGE, [4, 0, 5], seed=4)
    CompressedCache(model, **REDUCED)
    kvcompress.restore(model.model.language_model)
    assert torch.equal(model(**inputs).logits, tiny.untouched(IMAGE)(**inputs).logits)
    cache = CompressedCache(model, **REDUCED)
    model(**inputs, **tiny.with_cache(cache))
    assert (cache.report().vision_retention or 1) < 1
    kvcompress.restore(model)
    assert not hooks_on(model) and not traces_on(model)
