"""Threads: one model serves several at once, each with a cache of its own, as it serves them one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcompress import CompressedCache, CompressionConfig, Document, compressing
from tests import checkpoints, tiny

# Every kind of hook and state: exact scores, windows, statistics, merging, codes, reducers, decode rules, no policy.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"config": "prefixkv", "budget": 0.4},
        {"config": "snapkv", "budget": 24},
        {"config": "cake", "budget": 0.5},
        {"config": "h2o", "budget": 0.3, "merger": "threshold"},
        {"config": "full", "quantizer": {"name": "quanto4", "group": 8, "residual": 8}},
        {"config": "full"},
    ],
    "llava_36": [
        {"config": "prefixkv", "budget": 0.4},
        {"config": "full", "reducer": {"name": "lightkv", "windows": [2, 1]}},
        {"config": "fastv"},
        {"config": "vlcache", "budget": 0.5},
    ],
}


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What functions give that run at once, each in a thread of its own; raises what one of them raises."""
    found: dict[int, Any] = {}
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        try:
            start.wait(60)
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in found.values():
        if isinstance(answer, BaseException):
            raise answer
    return [found[number] for number in range(len(works))]


def generated(model: Any, name: str, given: dict[str, Any], seed: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt of its own, and what layers hold."""
    cache = CompressedCache(model, **given)
    inputs = tiny.inputs(name, 40 + 7 * seed, seed=seed)
    output = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=12, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), cache.report().layer_lengths


@pytest.mark.parametrize("name", CONFIGS)
def test_threads_generate_what_they_generate_one_after_the_other(name: str) -> None:
    """Each with another configuration and prompt; also the first caches of a model that no cache was made for yet."""
    works = [(given, seed) for seed, given in enumerate(CONFIGS[name] * (2 if name == "llama" else 1))]
    wanted = [generated(tiny.build(name), name, given, seed) for given, seed in works]
    model = tiny.build(name)
    for _ in range(2):
        found = together([lambda one=one: generated(model, name, *one) for one in works])  # type: ignore[misc]
        assert found == wanted


def test_threads_with_blocks_of_their_own_generate_what_they_do_alone() -> None:
    """Inside `compressing`, beside threads that bring a cache or use the model as it is."""
    model, name = tiny.build("llama"), "llama"

    opened = threading.Barrier(4)  # all blocks are open while any of them generates

    def within(budget: float, seed: int) -> tuple[list[int], list[list[int]]]:
        inputs = tiny.inputs(name, 40, seed=seed)
        with compressing(model, "prefixkv", budget=budget) as session:
            opened.wait(60)
            output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        (report,) = session.reports
        return output[0, 40:].tolist(), report.layer_lengths

    def works() -> list[Callable[[], Any]]:
        blocks = [lambda s=s: within(0.2 + 0.1 * s, s) for s in range(4)]  # type: ignore[misc]
        return [*blocks, *(lambda s=s: generated(model, name, {"config": "snapkv", "budget": 24}, s) for s in range(2))]  # type: ignore[misc]

    first = together(works())
    assert together(works()) == first
    opened = threading.Barrier(1)
    assert [work() for work in works()] == first
    assert "generate" not in vars(model) or not hasattr(vars(model)["generate"], "take_off")


def test_threads_ask_one_document() -> None:
    """Each question works on a copy."""
    model, tokenizer = checkpoints.text_model(), checkpoints.text_tokenizer()
    document = Document(model, tokenizer, "the key is under the green mat. " * 8, config="prefixkv", budget=0.5)
    questions = ["where is the key?", "which mat?", "what is green?", "who?"]
    wanted = [document.ask(question, max_new_tokens=8) for question in questions]
    report = document.report()
    found = together([lambda q=q: document.ask(q, max_new_tokens=8) for q in questions])  # type: ignore[misc]
    assert found == wanted and document.report() == report


@torch.no_grad()
def test_a_batch_in_one_thread_leaves_those_of_others_alone() -> None:
    """Padded batches and turns, forward by forward, interleaved in every order that threads take."""
    model = tiny.build("llama")

    def talk(seed: int) -> list[list[float]]:
        cache = CompressedCache(model, CompressionConfig.preset("prefixkv", budget=0.4))
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, : 5 + seed] = 0
        logits = []
        with torch.no_grad():
            for tokens in (30, 1, 1, 6, 1):
                if tokens != 30:
                    mask = torch.cat([mask, mask.new_ones(2, tokens)], 1)
                ids = tiny.token_ids(2, tokens, seed=100 * seed + tokens)
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
                given = {"attention_mask": mask, "position_ids": positions, **tiny.with_cache(cache)}
                logits.append(model(ids, **given).logits[:, -1].flatten().tolist())
        return logits

    wanted = [talk(seed) for seed in range(4)]
    assert together([lambda seed=seed: talk(seed) for seed in range(4)]) == wanted  # type: ignore[misc]
