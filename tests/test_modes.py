"""Every way of running a model that a compressed cache must hold up under."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import DynamicCache

from kvcompress import CompressedCache, CompressionConfig, restore
from kvcompress.cache.allocation import protection
from kvcompress.cache.layer import CompressedLayer
from kvcompress.config.presets import PRESETS
from tests import tiny

SQUEEZED = [preset for preset in PRESETS if not CompressionConfig.preset(preset).budget.keeps_everything]


def generate(cache: CompressedCache, inputs: dict[str, Any], new: int = 8, **how: Any) -> Tensor:
    return tiny.model("llama").generate(
        **inputs, **tiny.with_cache(cache), max_new_tokens=new, **{"do_sample": False, **how}
    )


def period(cache: CompressedCache) -> int:
    """Tokens by which layers grow before they are cut to their budget again; 0 if they never exceed it."""
    evictor = cache.config.evictor
    return 0 if evictor is None else evictor.cuts_every or 0


def within_share(cache: CompressedCache, share: float, generated: int) -> bool:
    """Whether it holds a share of the tokens, and what was generated since the last cut where it cuts in periods."""
    report = cache.report()
    return report.retention <= share + min(period(cache), generated) / report.tokens_seen


def within_budget(cache: CompressedCache) -> bool:
    report = cache.report()
    budgets = report.layer_budgets
    pairs = zip(report.layer_lengths, budgets or report.layer_lengths, strict=True)
    return all(length <= budget for layer in pairs for length, budget in zip(*layer, strict=True))


@pytest.mark.parametrize("preset", SQUEEZED)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.9, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generation_keeps_to_the_budget(preset: str, how: dict[str, Any]) -> None:
    cache = CompressedCache(tiny.model("llama"), preset, budget=0.4)
    inputs = tiny.inputs("llama", 200, seed=1)  # so that 64 recents are fewer than the budget
    output = generate(cache, inputs, **how)
    report = cache.report()
    assert output.shape[1] == 208
    assert report.tokens_seen == 207
    assert within_share(cache, 0.4, generated=7)
    assert within_budget(cache)


@pytest.mark.parametrize("preset", SQUEEZED)
def test_sampling_draws_what_it_draws_without_the_cache(preset: str) -> None:
    inputs = tiny.inputs("llama", 30, seed=2)
    outputs = []
    for cache in (
        CompressedCache(tiny.model("llama"), preset, budget=1.0),
        DynamicCache(config=tiny.model("llama").config),
    ):
        torch.manual_seed(5)
        outputs.append(generate(cache, inputs, do_sample=True, new=12))  # type: ignore[arg-type]
    assert torch.equal(*outputs)


@pytest.fixture(scope="module")
def searched() -> list[tuple[dict[str, Any], Tensor]]:
    """Ways to look for several tokens, with what DynamicCache gives."""
    hows = ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": tiny.build("llama", seed=1)})
    inputs, config = tiny.inputs("llama", 25, seed=3), tiny.model("llama").config
    return [(how, generate(DynamicCache(config=config), inputs, new=16, **how)) for how in hows]  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_beams_and_assisted_decoding_at_full_budget_are_those_of_dynamic_cache(
    preset: str, searched: list[tuple[dict[str, Any], Tensor]]
) -> None:
    inputs = tiny.inputs("llama", 25, seed=3)
    for how, expected in searched:
        found = generate(CompressedCache(tiny.model("llama"), preset, budget=1.0), inputs, new=16, **how)
        assert torch.equal(found, expected), how


@pytest.mark.quick
@pytest.mark.parametrize("preset", SQUEEZED)
def test_several_turns_on_one_cache(preset: str) -> None:
    cache = CompressedCache(tiny.model("llama"), preset, budget=0.5)
    conversation = tiny.token_ids(1, 150, seed=4)
    for turn in range(3):
        conversation = torch.cat([conversation, tiny.token_ids(1, 9, seed=5 + turn)], dim=1)
        conversation = generate(
            cache, {"input_ids": conversation, "attention_mask": torch.ones_like(conversation)}, new=5
        )
        assert cache.get_seq_length() == conversation.shape[1] - 1
        assert within_budget(cache) and within_share(cache, 0.5, generated=4)


@pytest.mark.parametrize("preset", SQUEEZED)
def test_one_document_many_questions(preset: str) -> None:
    cache = CompressedCache(tiny.model("llama"), preset, budget=0.5)
    document = tiny.token_ids(1, 40, seed=6)
    with torch.no_grad():
        tiny.model("llama")(document, **tiny.with_cache(cache))
    before = cache.report()
    for seed in (7, 8):
        ids = torch.cat([document, tiny.token_ids(1, 6, seed)], dim=1)
        own = copy.deepcopy(cache)
        first = generate(own, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        again = generate(copy.deepcopy(cache), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert torch.equal(first, again)
        assert own.report().tokens_seen > before.tokens_seen
    assert cache.report() == before


@torch.no_grad()
@pytest.mark.parametrize("preset", SQUEEZED)
def test_a_prompt_of_one_token_grows_into_its_budget(preset: str) -> None:
    cache = CompressedCache(tiny.model("llama"), preset, budget=6)
    sinks, recents = protection(cache.config)
    for step in range(80):
        tiny.model("llama")(tiny.token_ids(1, 1, seed=step), **tiny.with_cache(cache))
        report = cache.report()
        assert report.layer_lengths == [[min(step + 1, max(6, sinks + recents) + period(cache))]] * 3
        assert {*range(min(sinks, step + 1)), step} <= set(report.positions(0, 0))


@pytest.mark.quick
@torch.no_grad()
def test_two_caches_on_one_model_take_turns() -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(1, 40, seed=9)
    alone = {preset: [] for preset in SQUEEZED}
    for preset, logits in alone.items():
        cache = CompressedCache(model, preset, budget=0.4)
        logits += [
            model(ids[:, step : step + n], **tiny.with_cache(cache)).logits for step, n in [(0, 30), (30, 1), (31, 1)]
        ]
    caches = {preset: CompressedCache(model, preset, budget=0.4) for preset in SQUEEZED}
    for turn, (step, n) in enumerate([(0, 30), (30, 1), (31, 1)]):
        for preset, cache in caches.items():
            logits = model(ids[:, step : step + n], **tiny.with_cache(cache)).logits
            assert torch.equal(logits, alone[preset][turn])


def test_two_threads_on_two_models() -> None:
    names, inputs = ("llama", "qwen2"), tiny.inputs("llama", 40, seed=10)
    results: dict[tuple[str, int], Tensor] = {}

    def run(name: str, turn: int) -> None:
        cache = CompressedCache(tiny.model(name), "prefixkv", budget=0.4)
        results[name, turn] = tiny.model(name).generate(
            **inputs, **tiny.with_cache(cache), max_new_tokens=10, do_sample=False
        )

    for name in names:
        run(name, 0)
    threads = [threading.Thread(target=run, args=(name, turn)) for turn in (1, 2) for name in names]
    for pair in (threads[:2], threads[2:]):
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
    for name in names:
        assert torch.equal(results[name, 0], results[name, 1]) and torch.equal(results[name, 0], results[name, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama_mha"])
@pytest.mark.parametrize("preset", SQUEEZED)
def test_every_dtype_keeps_its_bytes(name: str, dtype: torch.dtype, preset: str) -> None:
    model = tiny.model(name, dtype)
    cache = CompressedCache(model, preset, budget=0.5)
    model.generate(**tiny.inputs(name, 400, seed=11), **tiny.with_cache(cache), max_new_tokens=1, do_sample=False)
    report, config = cache.report(), model.config
    slot = 2 * config.num_key_value_heads * 8 * dtype.itemsize
    assert report.full_kv_bytes == 3 * 400 * slot
    if cache.config.quantizer is None:
        more = 0 if period(cache) else 1  # for the token of the step that frees a slot
        every, sets = config.num_key_value_heads, report.head_lengths
        heads = sets or [[[length] * every for length in layer] for layer in report.layer_lengths]
        held = sum(length + more for layer in heads for row in layer for length in row)
        assert report.kv_bytes == held * slot // every
        assert abs(report.kv_bytes / report.full_kv_bytes - 0.5) <= 0.01
    assert abs(report.retention - 0.5) <= 0.01
    assert cache.layers[0].keys.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("tokens", [16, 1800])
def test_growth_leaves_little_slack(tokens: int) -> None:
    model = tiny.model("llama")
    cache = CompressedCache(model, "full")
    model(tiny.token_ids(1, tokens, seed=0), **tiny.with_cache(cache))
    for number in range(60):
        model(tiny.token_ids(1, 1, seed=number), **tiny.with_cache(cache))
        store, held = cache.layers[0].store, tokens + number + 1
        assert held <= store.capacity <= held + max(16, held // 100)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["full", "prefixkv", "uniform", "kivi4", "prefixkv+int4"])
@pytest.mark.parametrize("rows", [[100], [100, 71]], ids=str)
def test_what_is_reserved_is_there_at_once(preset: str, rows: list[int]) -> None:
    """Whatever a compiled step reads keeps its address, and its bytes, for as many tokens as were announced."""

    def addresses() -> list[int]:
        tensors = [tensor for layer in cache.layers for tensor in layer.store.buffers()]
        table = cache._state.table
        assert table is not None
        return [tensor.data_ptr() for tensor in (*tensors, *table.tensors())]

    model, padding = tiny.model("llama"), torch.arange(100) >= 100 - torch.tensor(rows)[:, None]
    quantizer = {"quantizer": {"name": "quanto4", "group": 8, "residual": 26}} if "4" in preset else {}
    budget = {"budget": 0.9} if preset == "prefixkv+int4" else {}
    cache = CompressedCache(model, preset, reserve=40, **quantizer, **budget)
    model(tiny.token_ids(len(rows), 100, seed=0), attention_mask=padding.long(), **tiny.with_cache(cache))
    before, report = addresses(), cache.report()
    packed = [layer.store.packed for layer in cache.layers]
    for number in range(40):
        model(tiny.token_ids(len(rows), 1, seed=number), **tiny.with_cache(cache))
    assert addresses() == before and cache.report().kv_bytes == report.kv_bytes
    grew = [now.store.packed - then for now, then in zip(cache.layers, packed, strict=True)]
    assert max(grew) >= (16 if quantizer else 0)


@pytest.mark.parametrize(("preset", "batch"), [("prefixkv", 1), ("uniform", 1), ("uniform", 2), ("streaming", 3)])
def test_a_bytes_budget_is_never_exceeded(preset: str, batch: int) -> None:
    cache = CompressedCache(tiny.model("llama"), preset, budget="12KiB")
    generate(cache, tiny.inputs("llama", 200, seed=12, batch=batch), new=40)
    assert 10 * 2**10 < cache.report().kv_bytes <= 12 * 2**10


@torch.no_grad()
def test_a_local_allocator_never_holds_two_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt, whose layers do not wait for each other."""
    monkeypatch.setattr("kvcompress.cache.selection.TOGETHER", 1)
    held: list[list[int]] = []
    attend = CompressedLayer.attend

    def watched(self: CompressedLayer, *args: Any) -> Tensor:
        output = attend(self, *args)
        held.append([layer.store.capacity for layer in cache.layers])
        return output

    monkeypatch.setattr(CompressedLayer, "attend", watched)
    for preset, whole in (("uniform", 0), ("streaming", 0), ("prefixkv", 3)):
        held.clear()
        cache = CompressedCache(tiny.model("llama"), preset)
        tiny.model("llama")(tiny.token_ids(1, 50, seed=13), **tiny.with_cache(cache))
        assert max(sum(length == 50 for length in lengths) for lengths in held[:-1]) == max(0, whole - 1)


@pytest.mark.parametrize("preset", SQUEEZED)
def test_weights_may_lie_elsewhere_than_they_compute(preset: str) -> None:
    model = tiny.build("llama")
    inputs = tiny.inputs("llama", 30, seed=14)
    expected = generate(CompressedCache(tiny.model("llama"), preset, budget=0.5), inputs)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{index}": "cpu" for index in range(3)}
    dispatched = dispatch_model(model, {**parts, **layers}, main_device="cpu", force_hooks=True)
    cache = CompressedCache(dispatched, preset, budget=0.5)
    found = dispatched.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_layers_go_to_cpu_memory_and_come_back() -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(1, 40, seed=15)
    cache, twin = (CompressedCache(model, "prefixkv", budget=0.5) for _ in range(2))
    for step, n in [(0, 30), (30, 1), (31, 5), (36, 1)]:
        found = model(ids[:, step : step + n], **tiny.with_cache(cache)).logits
        assert torch.equal(found, model(ids[:, step : step + n], **tiny.with_cache(twin)).logits)
        for layer in cache.layers:
            layer.offload()
            assert layer.keys.device.type == "cpu"
            layer.prefetch()


@pytest.mark.cuda
@torch.no_grad()
def test_layers_on_two_devices_and_offloading() -> None:
    model = tiny.build("llama")
    parts = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    dispatched = dispatch_model(model, {**parts, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu"})
    cache = CompressedCache(dispatched, "prefixkv", budget=0.5)
    inputs = {name: tensor.cuda() for name, tensor in tiny.inputs("llama", 30, seed=14).items()}
    dispatched.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=8, do_sample=False)
    cache.layers[0].offload()
    assert cache.layers[0].keys.device.type == "cpu"
    cache.layers[0].prefetch()
    assert cache.layers[0].keys.device.type == "cuda"


def test_a_cache_keeps_no_model_alive_and_no_cache_needs_the_collector() -> None:
    model = tiny.build("llama")
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    model.generate(**tiny.inputs("llama", 20, seed=16), **tiny.with_cache(cache), max_new_tokens=3)
    copied = copy.deepcopy(cache)
    gc.collect()
    gc.disable()
    try:
        keys = weakref.ref(cache.layers[0])
        del cache
        assert keys() is None
    finally:
        gc.enable()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert copied.report().tokens_seen == 22


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cache_moves_between_inference_mode_and_none(preset: str) -> None:
    """What was made in one mode can be read, decoded, cropped and reordered in any other, with the same logits."""
    model, ids = tiny.model("llava_36"), tiny.inputs("llava_36", 120, seed=21)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    budget = {"budget": 0.5} if preset in SQUEEZED else {}
    caches = {mode: CompressedCache(model, preset, **budget) for mode in [None, *modes]}
    for cache in caches.values():
        with torch.inference_mode() if cache is not caches[None] else torch.no_grad():
            model(**ids, **tiny.with_cache(cache))
            model(tiny.token_ids(1, 1, seed=22), **tiny.with_cache(cache))
    for mode in modes:
        with mode():
            assert caches[mode].report() == caches[None].report()
            caches[mode].reorder_cache(torch.tensor([0]))
            for tokens in (1, 1, 5, 1):
                found = model(tiny.token_ids(1, tokens, seed=23), **tiny.with_cache(caches[mode])).logits
            if mode is torch.enable_grad:
                assert found.requires_grad
            caches[mode].crop(-1 if caches[mode].is_croppable else 0)
    with torch.no_grad():
        for tokens in (1, 1, 5, 1):
            expected = model(tiny.token_ids(1, tokens, seed=23), **tiny.with_cache(caches[None])).logits
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("name", tiny.IMAGE_MODELS)
def test_policies_are_told_which_tokens_are_images(name: str) -> None:
    inputs = tiny.inputs(name, 12, seed=17)
    is_image = inputs["input_ids"][0] == tiny.IMAGE_TOKEN
    assert is_image.any() and not is_image.all()
    for how in ({}, {"num_beams": 2}):
        cache = CompressedCache(tiny.model(name), "prefixkv", budget=0.5)
        tiny.model(name).generate(**inputs, **tiny.with_cache(cache), max_new_tokens=4, do_sample=False, **how)
        sequence, index = cache._state.sequence, cache._state.index_of(cache.layers[0])
        found, held = sequence.images_at(index), sequence.positions_of(index)
        assert found is not None
        for row, columns in enumerate(held[:, 0].tolist()):
            expected = [0 <= column < len(is_image) and bool(is_image[column]) for column in columns]
            assert found[row, 0].tolist() == expected


@torch.no_grad()
def test_scores_of_a_prompt_in_chunks_add_up_to_those_of_the_whole() -> None:
    ids = tiny.token_ids(1, 40, seed=18)
    whole, chunked = (CompressedCache(tiny.model("llama"), "prefixkv", budget=1.0) for _ in range(2))
    tiny.model("llama")(ids, **tiny.with_cache(whole))
    for chunk in ids.split(11, dim=1):
        tiny.model("llama")(chunk, **tiny.with_cache(chunked))
    for one, other in zip(whole.layers, chunked.layers, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stride_estimates_the_sum_and_mean_divides_by_what_could_see() -> None:
    ids, model = tiny.token_ids(1, 200, seed=19), tiny.model("llama")
    scores = {}
    for queries in ("all", "stride:2", "window:200", "stride:1"):
        cache = CompressedCache(model, "prefixkv", budget=1.0, scorer={"name": "attention", "queries": queries})
        model(ids, **tiny.with_cache(cache))
        scores[queries] = cache.layers[1].scores
    assert torch.equal(scores["all"], scores["stride:1"]) and torch.equal(scores["all"], scores["window:200"])
    assert float(scores["stride:2"].sum() / scores["all"].sum()) == pytest.approx(1, abs=1e-5)
    mean = CompressedCache(model, "prefixkv", scorer={"name": "attention", "reduce": "mean"}).config.scorer
    queries = torch.arange(200, 0, -1)[None, None]
    assert torch.equal(mean.importance(scores["all"], queries), scores["all"] / queries)


@pytest.mark.quick
def test_a_restored_model_refuses_old_caches_and_serves_new_ones() -> None:
    model = tiny.build("llama")
    CompressedCache(model, "prefixkv")
    restore(model)
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    model.generate(**tiny.inputs("llama", 20, seed=20), **tiny.with_cache(cache), max_new_tokens=3)
    assert cache.report().retention <= 0.5


def test_the_former_name_of_positions_still_works() -> None:
    """With a word that it is deprecated."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    tiny.model("llama")(**tiny.inputs("llama", 20, seed=1), **tiny.with_cache(cache))
    with pytest.warns(DeprecationWarning, match="positions"):
        assert cache.report().columns(0, 0) == cache.report().positions(0, 0)
