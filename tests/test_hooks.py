"""What hooks bring is there, or the cache says that it is not: it never goes on without."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import kvcompress
from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError, UnsupportedModeError
from tests import tiny

pytestmark = pytest.mark.quick
IMAGE = "llava_deep"
# Configurations that have to know which tokens are images, and some that do not.
AWARE: tuple[dict[str, Any], ...] = (
    {"reducer": "lightkv"},
    {"scorer": {"name": "attention", "image_weight": 2.0}},
    {"scorer": {"name": "attention", "queries": "post_vision"}},
    {"allocator": "sparsity"},
    {"merger": "lookm"},
)
BLIND: tuple[dict[str, Any], ...] = ({}, {"merger": {"name": "lookm", "within_modality": False}})


def cache_for(model: PreTrainedModel, fields: dict[str, Any]) -> CompressedCache:
    return CompressedCache(model, "prefixkv", budget=0.5, **fields)


def images_seen(cache: CompressedCache) -> int:
    return sum(cache.report().image_tokens[0])


def modules_with_hooks(model: PreTrainedModel) -> dict[str, list[torch.nn.Module]]:
    decoder = model.get_decoder()
    return {"model and decoder": [model, decoder], "decoder": [decoder], "layers": list(decoder.layers)}


@torch.no_grad()
@pytest.mark.parametrize("whose", ["model and decoder", "decoder", "layers"])
@pytest.mark.parametrize("name", ["llama", IMAGE])
def test_a_cache_whose_hooks_are_gone_says_so_before_the_first_layer_attends(name: str, whose: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name, 20, seed=1)
    cache = cache_for(model, {"reducer": "lightkv"})
    for module in modules_with_hooks(model)[whose]:
        module._forward_pre_hooks.clear()
    with pytest.raises(CacheStateError, match=rf"no hook saw .*transformers {transformers.__version__}.*make a new"):
        model(**inputs, **tiny.with_cache(cache))
    assert cache.get_seq_length() == 0
    again = cache_for(model, {"reducer": "lightkv"})  # puts them back
    model(**inputs, **tiny.with_cache(again))
    assert bool(images_seen(again)) == (name == IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("fields", AWARE, ids=str)
def test_a_policy_that_needs_images_misses_the_hook_on_the_model(fields: dict[str, Any]) -> None:
    model, inputs = tiny.build(IMAGE), tiny.inputs(IMAGE, 20, seed=1)
    cache = cache_for(model, fields)
    model._forward_pre_hooks.clear()
    with pytest.raises(UnsupportedModeError, match="which tokens are images"):
        model(**inputs, **tiny.with_cache(cache))


@torch.no_grad()
@pytest.mark.parametrize("fields", AWARE + BLIND, ids=str)
def test_calls_without_ids_are_served_unless_a_policy_needs_them(fields: dict[str, Any]) -> None:
    model, inputs = tiny.model(IMAGE), tiny.inputs(IMAGE, 20, seed=1)
    embedded = model.get_input_embeddings()(tiny.token_ids(1, 20, seed=2))
    calls: dict[str, Callable[[dict[str, Any]], Any]] = {
        "decoder was called by itself": lambda cache: model.model(**inputs, **cache),
        "inputs_embeds": lambda cache: model(inputs_embeds=embedded, **cache),
    }
    for reason, call in calls.items():
        cache = cache_for(model, fields)
        if fields in BLIND:
            call(tiny.with_cache(cache))
            assert cache.report().retention <= 0.5
        else:
            with pytest.raises(UnsupportedModeError, match=reason):
                call(tiny.with_cache(cache))
            assert cache.get_seq_length() == 0
            model(**inputs, **tiny.with_cache(cache))  # nothing is broken
            assert images_seen(cache)


@torch.no_grad()
def test_a_text_model_called_by_its_decoder_needs_no_images() -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(1, 20, seed=2)
    for fields in AWARE:
        cache, twin = cache_for(model, fields), cache_for(model, fields)
        model.model(ids, **tiny.with_cache(cache))
        model(ids, **tiny.with_cache(twin))
        assert cache.report() == twin.report()
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(UnsupportedModeError, match="decoder was called by itself"):
        model.model(inputs_embeds=embedded, **tiny.with_cache(CompressedCache(model.model, "lookm")))


@torch.no_grad()
@pytest.mark.parametrize("other", ["untouched", "touched", "copied", "restored"])
@pytest.mark.parametrize("name", ["llama", IMAGE])
def test_a_cache_serves_no_model_but_its_own(name: str, other: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name, 20, seed=1)
    cache = cache_for(model, {})
    another = copy.deepcopy(model) if other == "copied" else tiny.build(name)
    if other in ("touched", "restored"):
        CompressedCache(another, "full")
    if other == "restored":
        kvcompress.restore(another)
    with pytest.raises(CacheStateError, match="another model"):
        another(**inputs, **tiny.with_cache(cache))
    assert cache.get_seq_length() == 0
    found = model(**inputs, **tiny.with_cache(cache)).logits
    assert torch.equal(found, model(**inputs, **tiny.with_cache(cache_for(model, {}))).logits)


@torch.no_grad()
def test_what_a_failed_call_said_of_images_is_forgotten() -> None:
    model, inputs = tiny.model(IMAGE), tiny.prompt(IMAGE, [0, 20], seed=1)
    cache = cache_for(model, {})
    with pytest.raises(ValueError, match="do not match"):  # found out between the model's call and its decoder's
        model(**{**inputs, "pixel_values": torch.cat([inputs["pixel_values"]] * 2)}, **tiny.with_cache(cache))
    for step in range(3):
        model(tiny.token_ids(1, 1, seed=step), **tiny.with_cache(cache))
    assert cache.report().tokens_seen == 3 and not images_seen(cache)


# -- pickling ----------------------------------------------------------------------------------------------------------


def pickled(model: PreTrainedModel) -> bytes:
    return pickle.dumps(model)


def saved(model: PreTrainedModel) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@torch.no_grad()
@pytest.mark.parametrize("how", [pickled, saved])
@pytest.mark.parametrize("name", ["llama", IMAGE])
def test_a_touched_model_pickles_and_serves_caches_of_its_own(name: str, how: Callable[..., bytes]) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name, 20, seed=1)
    cache = cache_for(model, {"reducer": "lightkv"})
    data = how(model)  # before it runs: transformers puts hooks of its own on an image model, which do not pickle
    wanted = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=3, do_sample=False)
    read = pickle.loads(data) if how is pickled else torch.load(io.BytesIO(data), weights_only=False)
    own = cache_for(read, {"reducer": "lightkv"})
    assert torch.equal(read.generate(**inputs, **tiny.with_cache(own), max_new_tokens=3, do_sample=False), wanted)
    assert own.report() == cache.report()
    with pytest.raises(CacheStateError, match="another model"):
        read(**inputs, **tiny.with_cache(cache_for(model, {})))
    kvcompress.restore(read)
    assert set(read.__dict__) == set(tiny.build(name).__dict__)


def test_a_pickled_model_runs_in_a_process_that_never_imported_kvcompress(tmp_path: Path) -> None:
    model, ids = tiny.build("llama"), tiny.token_ids(1, 10, seed=0)
    CompressedCache(model, "prefixkv")
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, torch\n"
        f"model = pickle.loads(open({str(tmp_path / 'model')!r}, 'rb').read())\n"
        f"with torch.no_grad(): print(model(torch.tensor({ids.tolist()})).logits.argmax(-1).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        assert result.stdout.strip() == str(tiny.untouched("llama")(ids).logits.argmax(-1).tolist())


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_that_is_to_be_pickled_says_what_to_do(take: Callable[[CompressedCache], Any]) -> None:
    cache = CompressedCache(tiny.model("llama"), "prefixkv")
    with pytest.raises(UnsupportedModeError, match=r"copy\.deepcopy\(cache\).*cache\.save\(folder\)"):
        take(cache)


# -- arguments of attention --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps_are_given_by_other_caches_and_refused_by_ours() -> None:
    inputs = tiny.inputs("llama", 12, seed=3)
    model, eager = tiny.build("llama"), tiny.build("llama")
    for each in (model, eager):
        each.set_attn_implementation("eager")
    wanted = eager(**inputs, output_attentions=True).attentions
    cache = CompressedCache(model, "prefixkv", budget=0.9)
    for how in ({}, tiny.with_cache(DynamicCache(config=model.config))):
        found = model(**inputs, output_attentions=True, **how).attentions
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: model(**inputs, output_attentions=True, **tiny.with_cache(cache)),
        lambda: model.model(**inputs, output_attentions=True, **tiny.with_cache(cache)),
        lambda: model.generate(**inputs, output_attentions=True, **tiny.with_cache(cache), max_new_tokens=2),
    )
    for call in calls:
        with pytest.raises(UnsupportedModeError, match=r"output_attentions: .*another cache"):
            call()
    configured = tiny.build("llama")
    configured.set_attn_implementation("eager")
    configured.config.output_attentions = True
    with pytest.raises(UnsupportedModeError, match="output_attentions"):
        configured(**inputs, **tiny.with_cache(CompressedCache(configured, "prefixkv")))
    assert cache.get_seq_length() == 0
    model(**inputs, output_attentions=False, **tiny.with_cache(cache))


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [
        {"sliding_window": 4},
        {"is_causal": False},
        {"cu_seq_lens_q": torch.tensor([0, 5, 12])},
        {"of_tomorrow": 0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_arguments_that_attention_does_not_know_are_refused_unless_none(given: dict[str, Any]) -> None:
    (name,) = given
    model, ids = tiny.model("llama"), tiny.token_ids(1, 12, seed=3)
    cache = CompressedCache(model, "prefixkv", budget=0.9)
    with pytest.raises(UnsupportedModeError, match=rf"^{name}: "):
        model(ids, **given, **tiny.with_cache(cache))
    cache.reset()
    assert torch.equal(
        model(ids, **{name: None}, **tiny.with_cache(cache)).logits,
        model(ids, use_cache=True, **tiny.with_cache(CompressedCache(model, "prefixkv", budget=0.9))).logits,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
@pytest.mark.parametrize("before", ["eager", "sdpa"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_touched_model_takes_masks_of_four_dimensions_as_before(before: str, kind: Any, cached: bool) -> None:
    model, untouched, ids = tiny.build("llama"), tiny.build("llama"), tiny.token_ids(2, 12, seed=3)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[6:, 2:5] = False
    mask = seen[None, None].repeat(2, 1, 1, 1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for each in (model, untouched):
        each.set_attn_implementation(before)
    CompressedCache(model, "prefixkv")
    how = [tiny.with_cache(DynamicCache(config=model.config)) if cached else {} for _ in range(2)]
    wanted = untouched(ids, attention_mask=additive, **how[0]).logits
    found = model(ids, attention_mask=additive if kind == torch.float32 else mask, **how[1]).logits
    torch.testing.assert_close(found, wanted)
