"""Every family of text models that is served by its shape obeys the laws that LLaMA does; all others are refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.errors import CacheStateError, UnsupportedModelError
from kvcompress.evaluation import load_model
from kvcompress.integrations import adapter_for, base
from kvcompress.testing.running import forwards, require_masked
from tests import checkpoints, families, strategies, tiny
from tests.reference import Reference

FAMILIES = [name for name in families.EVERY if strategies.THOROUGH or name not in families.ALIKE]
every_family = pytest.mark.parametrize("name", FAMILIES)


def padded(name: str) -> dict[str, Any]:
    """Two rows, of which the first has padding."""
    inputs = tiny.inputs(name, 21, seed=3, batch=2)
    inputs["attention_mask"][0, :6] = 0
    return inputs


def answers(name: str, model: Any, cache: Any) -> Any:
    """Tokens, and the logits of each, that greedy decoding of a padded batch gives."""
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**padded(name), **tiny.with_cache(cache), **settings)
    return result.sequences, torch.stack(result.logits)


@every_family
def test_a_family_at_full_budget_answers_as_with_its_own_cache(name: str) -> None:
    """With room for every token, tokens and logits are those of the untouched model with DynamicCache."""
    model, other = tiny.model(name), tiny.untouched(name)
    cache = CompressedCache(model, CompressionConfig.preset("prefixkv", budget=1.0))
    tokens, logits = answers(name, model, cache)
    wanted_tokens, wanted_logits = answers(name, other, DynamicCache(config=other.config))
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
    assert cache.report().retention == 1.0


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4_text"])  # tells nobody its chunks
def test_a_family_attends_to_what_is_kept_alone(name: str) -> None:
    """At 30 %, each forward of a padded batch is that of a whole cache in which the rest is hidden."""
    cache = CompressedCache(tiny.model(name), "prefixkv", budget=0.3)
    steps = forwards(tiny.model(name), cache, padded(name), [1, 1, 3, 1], seed=4)
    require_masked(Reference(name), cache, steps, tolerance=1e-4)
    assert cache.report().retention < 0.4


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("preset", ["adakv", "snapkv", "streaming", "h2o"])
def test_a_family_attends_to_what_each_head_keeps_alone(name: str, preset: str) -> None:
    """The same where heads keep different tokens, and different numbers of them."""
    cache = CompressedCache(tiny.model(name), preset, budget=0.5)
    steps = forwards(tiny.model(name), cache, padded(name), [1, 1, 3, 1], seed=4)
    require_masked(Reference(name), cache, steps, tolerance=1e-4)


def of_type(name: str, **more: Any) -> Any:
    """A model of a type without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **more))


_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("gpt2", {"n_layer": 2}, r"tells positions by learned embeddings \(transformer.wpe\)"),
        ("opt", _SMALL, r"tells positions by learned embeddings \(embed_positions\)"),
        ("bart", {}, r"tells positions by learned embeddings \(embed_positions\)"),
        ("bloom", {"n_layer": 2}, "ALiBi"),
        ("mpt", {"n_layers": 2}, "ALiBi"),
        ("falcon", {**_SMALL, "alibi": True}, "ALiBi"),
        ("deepseek_v3", {**_SMALL, "num_key_value_heads": 4}, "multi-head latent attention"),
        ("mamba", {"num_hidden_layers": 2, "hidden_size": 32}, "nothing to compress"),
        ("fuyu", {}, r"takes more than text.*model.get_decoder\(\)"),
        ("falcon_h1", {"num_hidden_layers": 2}, r"layers 0-1 \(hybrid\)"),
        ("gptj", {"n_layer": 2}, "no list of decoder layers"),
        ("gpt_neox_japanese", {"num_hidden_layers": 2}, "computes attention itself"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "no one attention with rotary embeddings in every layer"),
    ],
)
def test_a_family_of_another_shape_is_refused_with_the_reason(name: str, more: dict[str, Any], says: str) -> None:
    """The message names the type, says what does not fit, and how to bring an adapter of one's own."""
    with pytest.raises(UnsupportedModelError, match=says) as refusal:
        adapter_for(of_type(name, **more))
    assert f"'{name}'" in str(refusal.value) and f"register_adapter('{name}')" in str(refusal.value)


_CONFIG = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("diffllama", {}, "attends more than once to the keys of layer 0"),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}, "the keys of layer 0 did not reach the attention"),
        ("doge", {}, r"a mask of the shape \(1, 4, 9, 9\) that it makes itself"),
    ],
)
def test_a_family_that_attends_in_a_way_of_its_own_is_refused_at_first_use(
    name: str, more: dict[str, Any], says: str
) -> None:
    """What no look at the model tells is seen when it first runs: no answer comes from half of its keys."""
    config = transformers.AutoConfig.for_model(name, **_CONFIG, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=says):
        model(tiny.token_ids(1, 9, seed=1), **tiny.with_cache(cache))


@torch.no_grad()
def test_a_model_of_one_layer_whose_keys_reach_no_attention_is_refused_in_its_second_forward() -> None:
    config = transformers.AutoConfig.for_model("jetmoe", **{**_CONFIG, "num_hidden_layers": 1}, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    model(tiny.token_ids(1, 9, seed=1), **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match=r"the keys of layer 0 reached no attention.*call reset"):
        model(tiny.token_ids(1, 1, seed=2), **tiny.with_cache(cache))


def test_a_model_of_no_known_name_is_loaded_by_its_shape(tmp_path: Path) -> None:
    """Its weights are read only after its shape was found to fit."""
    tiny.build("olmo2").save_pretrained(tmp_path)
    checkpoints.text_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.config.model_type == "olmo2"


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("llama", [4, 4, 4]),
        ("phi3", [2, 2, 2]),  # half of each head's dimensions
        ("gpt_neox", [1, 1, 1]),  # a quarter
        ("smollm3", [4, None, 4]),  # a layer that turns nothing
        ("cohere", [None] * 3),  # pairs of neighbours
        ("glm", [None] * 3),
    ],
)
def test_frequencies_are_of_pairs_that_a_layer_turns(name: str, turned: list[int | None]) -> None:
    """Policies read frequencies only where dimension i turns with dimension i + half, as they take them to."""
    model = tiny.model(name)
    adapter = adapter_for(model)
    decoder = adapter.decoder(model)
    found = [adapter.layer_weights(decoder, one).inverse_frequencies for one in adapter.attention_modules(model)]
    assert [None if one is None else len(one) for one in found] == turned


@every_family
def test_the_output_projection_of_a_family_is_found(name: str) -> None:
    """`value_aware` reads it; its columns are the dimensions of all heads."""
    model = tiny.model(name)
    adapter = adapter_for(model)
    decoder = adapter.decoder(model)
    for attention in adapter.attention_modules(model):
        output = adapter.layer_weights(decoder, attention).output
        assert output is not None and output.shape == (32, 32)


PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_page_lists_the_families_that_are_tested() -> None:
    """Each row of its table is a family of the tests, with the layers that are compressed there."""
    rows = re.findall(r"^\| .* \| `(\w+)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {(name, kind) for name, kinds in rows for kind in kinds.split("; ")}
    whole = {*families.FULL, *tiny.TEXT_MODELS} - {"llama_mha"}
    kinds = {(name, "all") for name in whole} | {(name, "those of full attention") for name in families.MIXED}
    assert listed == kinds | {(name.partition(",")[0], "all, within the window") for name in families.WINDOWED}


def test_an_adapter_from_the_page_obeys_the_law_as_a_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file of its own and at most 15 lines, it opens GPT-2, whose answers at full budget are DynamicCache's."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    adapter = code[1][code[1].index("@register") :]
    assert len(adapter.strip().splitlines()) <= 15
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "adapter_of_a_user.py").write_text(code[1], encoding="utf-8")
    importlib.import_module("adapter_of_a_user")
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, bos_token_id=1, pad_token_id=0, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    wanted = answers("llama", model, DynamicCache())
    found = answers("llama", model, CompressedCache(model, "prefixkv", budget=1.0))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    assert (
        not torch.allclose(answers("llama", model, cache)[1], wanted[1], atol=1e-3) and cache.report().retention < 0.4
    )
