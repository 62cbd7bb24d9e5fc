"""Wrong uses give one clear message each, and leave the model usable."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from kvcompress import SCORERS, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.errors import (
    BudgetWarning,
    CacheStateError,
    KVCompressWarning,
    PolicyError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from kvcompress.integrations import Adapter, adapter_for, base, register_adapter
from kvcompress.policies.base import Allocator, Evictor, Scorer
from kvcompress.policies.context import LayerContext
from kvcompress.policies.registry import ALLOCATORS, EVICTORS
from tests import tiny


@pytest.fixture
def model() -> Iterator[transformers.PreTrainedModel]:
    """A model that must answer as a fresh one does, whatever the test did to it."""
    model = tiny.build("llama")
    yield model
    model.eval()
    inputs = tiny.inputs("llama", 20, seed=0)
    expected = tiny.untouched("llama").generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    cache = CompressedCache(model, "full")
    assert torch.equal(model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=4, do_sample=False), expected)


def prompt(tokens: int = 20, batch: int = 1) -> dict[str, Any]:
    return tiny.inputs("llama", tokens, seed=1, batch=batch)


def test_labels_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModeError, match=r"labels: .* leave labels out"):
        model(**prompt(), labels=prompt()["input_ids"], **tiny.with_cache(CompressedCache(model, "prefixkv")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_refused(model: Any, checkpointing: bool) -> None:
    """Also where layers are given no cache, so that their activations can be worked out again."""
    cache = CompressedCache(model, "prefixkv")
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UnsupportedModeError, match=r"call model.eval\(\) first"):
        model(**prompt(), **tiny.with_cache(cache))
    model.eval()
    model(**prompt(), **tiny.with_cache(cache))


def test_a_backward_pass_is_refused(model: Any) -> None:
    logits = model(**prompt(), **tiny.with_cache(CompressedCache(model, "prefixkv"))).logits
    with pytest.raises(UnsupportedModeError, match="carries no gradients"):
        logits.sum().backward()
    model.zero_grad()


def test_right_padding_in_generate_is_refused(model: Any) -> None:
    inputs = prompt(batch=2)
    inputs["attention_mask"][1, 15:] = 0
    cache = CompressedCache(model, "prefixkv")
    with pytest.raises(UnsupportedModeError, match="pad on the left"):
        model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=2)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("shape", [(1, 1, 20, 20), (1, 2, 20, 20), (2, 20)])
def test_a_mask_of_numbers_to_add_or_of_other_rows_or_heads_is_refused(model: Any, shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape) if shape[:2] == (1, 1) else torch.ones(shape, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedModeError, match=r"must be \[batch, positions\]"):
        model(prompt()["input_ids"], attention_mask=mask, **tiny.with_cache(CompressedCache(model, "prefixkv")))


def test_an_image_for_a_text_model_is_refused(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a text model"):
        model(**prompt(), pixel_values=torch.zeros(1, 3, 8, 8), **tiny.with_cache(cache))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a text model"):
        model(prompt()["input_ids"], pixel_values=torch.zeros(1, 3, 8, 8), **tiny.with_cache(cache))
    with pytest.raises(ValueError, match="pixel_values"):  # generate() says so itself
        model.generate(**prompt(), pixel_values=torch.zeros(1, 3, 8, 8), **tiny.with_cache(cache))


def test_a_static_cache_at_the_same_time_is_refused(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv")
    with pytest.raises(ValueError, match="Please use only one of the two"):
        model.generate(**prompt(), **tiny.with_cache(cache), cache_implementation="static", max_new_tokens=2)


def test_a_switched_attention_is_refused(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModeError, match=r"switched to 'sdpa' .* make a new CompressedCache"):
        model(**prompt(), **tiny.with_cache(cache))
    CompressedCache(model, "prefixkv")


def test_a_turn_without_the_conversation_is_refused(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    model.generate(**prompt(), **tiny.with_cache(cache), max_new_tokens=2)
    before = cache.report()
    short = tiny.inputs("llama", 12, seed=2)
    with pytest.raises(CacheStateError, match="the whole conversation"):
        model(**short, **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match="must cover"):
        model.model(**short, **tiny.with_cache(cache))
    assert cache.report() == before


def test_another_batch_is_refused(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv")
    model(**prompt(), **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match=r"holds 1 rows, this forward has 2"):
        model(tiny.token_ids(2, 3, seed=0), **tiny.with_cache(cache))
    model(tiny.token_ids(1, 3, seed=0), **tiny.with_cache(cache))


def test_cropping_below_an_evicted_slot_is_refused_and_changes_nothing(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    model(**prompt(30), **tiny.with_cache(cache))
    before = cache.report()
    with pytest.raises(CacheStateError, match="has already evicted one of the last 25 tokens"):
        cache.crop(-25)
    with pytest.raises(CacheStateError, match="only 30 were seen"):
        cache.crop(-31)
    with pytest.raises(CacheStateError, match="minus the number of tokens"):
        cache.crop(5)
    assert cache.report() == before


@torch.no_grad()
def test_is_croppable_tells_whether_the_last_token_can_go(model: Any) -> None:
    cache = CompressedCache(model, "streaming", budget=0.5)
    model(**prompt(30), **tiny.with_cache(cache))
    assert cache.is_croppable
    cache.crop(-1)
    assert cache.get_seq_length() == 29


def test_a_forward_that_failed_half_way_breaks_the_cache_until_reset(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv", budget=0.5)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**prompt(), **tiny.with_cache(cache))
    handle.remove()
    for use in (lambda: model(**prompt(), **tiny.with_cache(cache)), cache.compress, lambda: cache.crop(0)):
        with pytest.raises(CacheStateError, match=r"call reset\(\)"):
            use()
    cache.reset()
    model(**prompt(), **tiny.with_cache(cache))
    assert cache.report().retention <= 0.5


def test_a_cache_outlives_its_model_but_serves_no_other() -> None:
    cache = CompressedCache(tiny.build("llama"), "prefixkv")
    other = tiny.build("llama")
    CompressedCache(other, "prefixkv")
    with pytest.raises(CacheStateError, match="no longer exists"):
        other(**prompt(), **tiny.with_cache(cache))


class Faulty(Scorer):
    """A scorer that is wrong at layer 1."""

    mass: ClassVar[bool] = True
    fault: str = "nan"

    def score(self, layer: LayerContext) -> Tensor:
        scores = torch.rand(layer.keys.shape[:3], generator=torch.Generator().manual_seed(0))
        if layer.layer != 1:
            return scores
        if self.fault == "shape":
            return scores[:, :, :-1]
        return scores.fill_({"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[self.fault])


class Greedy(Evictor):
    """An evictor that keeps everything."""

    reads_importance: ClassVar[bool] = False

    def select(self, layer: Any) -> Tensor:
        return layer.valid


class Short(Allocator):
    """An allocator that forgets a token."""

    def allocate(self, importance: Any, total: Any, floor: Any, capacity: Any, context: Any = None) -> Tensor:
        budget = floor + (total - floor.sum(0)) // len(floor)
        budget[0] -= 1
        return budget


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, policy in ((SCORERS, Faulty), (EVICTORS, Greedy), (ALLOCATORS, Short)):
        monkeypatch.setattr(registry, "_policies", dict(registry._policies))
        registry.register(policy.__name__.lower())(policy)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scorer": {"name": "faulty", "fault": "nan"}}, "scorer faulty: layer 1: must return finite scores"),
        ({"scorer": {"name": "faulty", "fault": "inf"}}, "scorer faulty: layer 1: must return finite scores"),
        ({"scorer": {"name": "faulty", "fault": "shape"}}, "scorer faulty: layer 1: .* got the shape"),
        (
            {"scorer": {"name": "faulty", "fault": "negative"}},
            "allocator prefix: layer 1: importance must be finite and not",
        ),
        (
            {"allocator": "short", "budget": 10},
            "allocator short: row 0: the layers add up to 29 tokens, must be exactly 30",
        ),
        ({"evictor": "greedy"}, "evictor greedy: layer 0: select must mark as many slots as the budget"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_policy_that_breaks_its_contract_is_named_with_its_layer(
    model: Any, fields: dict[str, Any], says: str
) -> None:
    cache = CompressedCache(model, "prefixkv", **fields)
    with pytest.raises(PolicyError, match=says):
        model(**prompt(), **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match=r"call reset\(\)"):
        model(**prompt(), **tiny.with_cache(cache))


@pytest.mark.usefixtures("own")
def test_a_policy_that_is_not_registered_is_refused() -> None:
    class Anonymous(Faulty):
        name = ""

    with pytest.raises(KVCompressError, match="Anonymous is not registered"):
        CompressionConfig(scorer=Anonymous())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)),
            "no adapter for .* 'gpt2'",
        ),
        (lambda: torch.nn.Linear(1, 1), "must be a transformers model, got Linear"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        adapter_for(make())


def test_our_own_warnings_alone_are_errors_in_the_tests() -> None:
    for ours in (KVCompressWarning, BudgetWarning):
        with pytest.raises(ours):
            warnings.warn("one of ours", ours, stacklevel=1)
    with warnings.catch_warnings(record=True) as shown:  # under the filters of the tests
        warnings.warn("one of a dependency", FutureWarning, stacklevel=1)
    assert len(shown) == 1


def test_an_adapter_of_ones_own_opens_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that was refused is served once it is registered; one that is served takes the adapter named for it."""
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    small = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=1)).eval()
    with pytest.raises(UnsupportedModelError, match=r"register_adapter\('gpt2'\)"):
        CompressedCache(model, "prefixkv")

    @register_adapter("gpt2", "gemma")
    class Own(Adapter):
        def decoder(self, model: Any) -> Any:
            return getattr(model, "transformer", model)

        def layers(self, model: Any) -> list[Any]:
            return list(self.decoder(model).h)

        def attention_modules(self, model: Any) -> list[Any]:
            return [layer.attn for layer in self.layers(model)]

    cache = CompressedCache(model, "prefixkv", budget=0.5)
    model.generate(tiny.token_ids(1, 20, seed=0), **tiny.with_cache(cache), max_new_tokens=3, do_sample=False)
    assert cache.report().retention <= 0.5
    monkeypatch.setattr(Own, "check", lambda adapter, model: None)
    assert type(adapter_for(tiny.build("gemma"))) is Own


def test_a_wrong_configuration_leaves_the_model_untouched() -> None:
    model = tiny.build("llama")
    with pytest.raises(KVCompressError):
        CompressedCache(model, "prefixkv", budget=0)
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks


def test_a_cache_that_may_not_be_used_is_refused_by_that_name(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    for call in (
        lambda: model(**prompt(), use_cache=False, **tiny.with_cache(cache)),
        lambda: model.generate(**prompt(), use_cache=False, **tiny.with_cache(cache), max_new_tokens=2),
        lambda: model.generate(
            **prompt(), generation_config=GenerationConfig(use_cache=False, max_new_tokens=2), **tiny.with_cache(cache)
        ),
    ):
        with pytest.raises(UnsupportedModeError, match="use_cache: is False"):
            call()
    assert not cache.is_initialized


def test_the_class_of_a_cache_is_refused_where_a_cache_belongs(model: Any) -> None:
    CompressedCache(model, "prefixkv")
    for call in (
        lambda: model(**prompt(), **tiny.with_cache(CompressedCache)),
        lambda: model.generate(**prompt(), **tiny.with_cache(CompressedCache), max_new_tokens=2),
    ):
        with pytest.raises(
            UnsupportedModeError, match=r"got the class CompressedCache itself; .*CompressedCache\(model"
        ):
            call()


def test_what_a_dynamic_cache_answers_a_compressed_one_does() -> None:
    model = tiny.model("llama", torch.bfloat16)
    cache, full = CompressedCache(model, "full"), DynamicCache(config=model.config)
    assert (cache.dtype, cache.device) == (torch.bfloat16, torch.device("cpu"))
    assert list(cache) == [(None, None)] * 3 and len(cache) == 3
    for one in (cache, full):
        model(**prompt(), **tiny.with_cache(one))
    for (keys, values), layer, own in zip(cache, full.layers, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
        assert (own.dtype, own.device) == (layer.keys.dtype, layer.keys.device)
    assert (cache.dtype, cache.device) == (torch.bfloat16, torch.device("cpu"))


def test_protected_tokens_beat_the_budget_with_a_warning() -> None:
    model = tiny.model("llama")
    cache = CompressedCache(model, "streaming", budget=2)
    with pytest.warns(BudgetWarning, match="the budget of 6 tokens over all layers is below the 15"):
        model(**prompt(), **tiny.with_cache(cache))
    assert cache.report().layer_lengths == [[5]] * 3


def test_a_deep_copy_of_a_broken_cache_is_broken_too(model: Any) -> None:
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    with warnings.catch_warnings(), pytest.raises(IndexError):
        model(torch.full((1, 4), 10**6), **tiny.with_cache(cache))  # fails before the first layer: nothing is broken
    model(**prompt(), **tiny.with_cache(copy.deepcopy(cache)))
