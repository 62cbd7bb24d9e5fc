"""A model in a wrapper is served through it where its call is the model's own, and else refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kvcompress import CompressedCache, restore
from kvcompress.errors import UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import adapter_for
from kvcompress.integrations.wrapped import unwrapped
from tests import tiny
from tests.test_scorers import LoRALinear


class Peft(torch.nn.Module):
    """Calls the model inside as PEFT does: past its hooks."""

    def __init__(self, model: Any, prompts: bool = False) -> None:
        super().__init__()
        self.inside, self.active_peft_config = model, SimpleNamespace(is_prompt_learning=prompts)

    def get_base_model(self) -> Any:
        return self.inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside.generate(*args, **kwargs)


class Stranger(torch.nn.Module):
    """A wrapper of somebody."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "peft": Peft,
    "distributed": DistributedDataParallel,
    "parallel": DataParallel,  # without a device it calls the model itself
    "two": lambda model: DistributedDataParallel(Peft(model)),
}


@torch.no_grad()
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("inside", [False, True], ids=["", "of the model inside"])
def test_a_wrapped_model_gives_what_the_model_gives(wrap: Callable[[Any], Any], inside: bool) -> None:
    """Logits and what is kept are the same, whether the cache was made for the wrapper or for the model inside."""
    model, twin, inputs = tiny.build("llama"), tiny.model("llama"), tiny.inputs("llama", 20, seed=1)
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model and type(adapter_for(wrapped)) is type(adapter_for(model))
    caches = (
        CompressedCache(model if inside else wrapped, "prefixkv", budget=0.5),
        CompressedCache(twin, "prefixkv", budget=0.5),
    )
    for given in (inputs, {"input_ids": tiny.token_ids(1, 1, seed=2)}):
        found = [one(**given, **tiny.with_cache(c)).logits for one, c in zip((wrapped, twin), caches, strict=True)]
        assert torch.equal(*found)
    assert caches[0].report().held_positions == caches[1].report().held_positions
    restore(wrapped)
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks


@pytest.mark.parametrize("wrap", [Peft, lambda model: torch.compile(model, backend="eager")], ids=["peft", "compiled"])
def test_generate_of_a_wrapper_uses_the_cache(wrap: Callable[[Any], Any]) -> None:
    wrapped, inputs = wrap(tiny.build("llama")), tiny.inputs("llama", 20, seed=1)
    cache, twin = (CompressedCache(one, "prefixkv", budget=0.5) for one in (wrapped, tiny.model("llama")))
    found, wanted = (
        model.generate(**inputs, **tiny.with_cache(one), max_new_tokens=4, do_sample=False)
        for model, one in ((wrapped, cache), (tiny.model("llama"), twin))
    )
    assert torch.equal(found, wanted) and cache.report() == twin.report()


@torch.no_grad()
def test_a_prompt_that_a_compiled_forward_would_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled forwards are decode steps; the message names the model that reads the prompt."""
    model = tiny.build("llama")
    cache = CompressedCache(torch.compile(model, backend="eager"), "prefixkv", budget=0.5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # checks of every shape cannot be traced
    with pytest.raises(UnsupportedModeError, match=r"torch\.compile: .*compiled\._orig_mod"):
        model(tiny.token_ids(1, 9, seed=1), **tiny.with_cache(cache))


@torch.no_grad()
def test_value_aware_reads_a_lora_inside_a_wrapper() -> None:
    """What is kept is what a model keeps whose weights hold the adapter's effect."""
    adapted, merged, inputs = tiny.build("llama"), tiny.build("llama"), tiny.inputs("llama", 30, seed=1)
    for number, layer in enumerate(adapted.model.layers):
        layer.self_attn.o_proj = lora = LoRALinear(layer.self_attn.o_proj, ["a"], seed=number)
        more = lora.lora_B["a"].weight @ lora.lora_A["a"].weight * lora.scaling["a"]
        merged.model.layers[number].self_attn.o_proj.weight += more
    held = []
    for model in (Peft(adapted), merged):
        cache = CompressedCache(model, "prefixkv", scorer="value_aware", budget=0.5)
        model(**inputs, **tiny.with_cache(cache))
        held.append(cache.report().held_positions)
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("wrap", "says", "way"),
    [
        (lambda model: Peft(model, prompts=True), "puts learned tokens before the prompt", "model.get_base_model()"),
        (Stranger, "is a wrapper that kvcompress does not know", "model.module"),
        (lambda model: Peft(Stranger(model)), "Stranger is a wrapper", "model.get_base_model().module"),
    ],
    ids=["prompts", "stranger", "inside"],
)
def test_a_wrapper_that_calls_otherwise_is_refused_with_the_way_to_the_model_inside(
    wrap: Callable[[Any], Any], says: str, way: str
) -> None:
    model = tiny.build("llama")
    wrapped = wrap(model)
    with pytest.raises(UnsupportedModelError, match=f"{says}.*the model inside, {re.escape(way)}, and"):
        CompressedCache(wrapped)
    assert eval(way, {"model": wrapped}) is model and model.config._attn_implementation == "sdpa"


def test_a_copy_on_every_device_is_refused() -> None:
    """DataParallel on several devices would give all of its copies one cache."""
    wrapped = DataParallel(tiny.build("llama"))
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"calls a copy of the model on every device.*model\.module"):
        CompressedCache(wrapped)
