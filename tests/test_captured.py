"""Decode steps that are captured and replayed: the same tokens, whatever was captured when.

On a CPU a recorder stands in for a CUDA graph. It takes down every operation with the tensors it read and wrote, and a
replay asks for the same ones, on the same tensors: so nothing that the host decides in a step can go unnoticed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import kvcompress
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache import capture
from kvcompress.cache.state import CacheState
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError, KVCompressWarning
from tests import tiny
from tests.vision import FAMILIES

PROMPT, NEW = 60, 40


class Recorder(TorchDispatchMode):
    """A graph of a CPU: what is captured does not happen before it is replayed."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0
        Recorder.made.append(self)

    def capture(self, run: Callable[[], Any]) -> Any:
        """Does it, and takes back what it changed among tensors that were there before."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: set[int] = set()
        try:
            with self:
                return run()
        finally:
            for tensor, copied in self.before.values():
                tensor.copy_(copied)

    def replay(self) -> None:
        """Does it all again."""
        self.replays += 1
        for func, args, kwargs, results in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr() and old.numel():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes an operation down; a question to the device cannot be captured."""
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        arguments = func._schema.arguments
        written = [value for argument, value in zip(arguments, args, strict=False) if _writes(argument)]
        written += [kwargs[a.name] for a in arguments if _writes(a) and a.name in kwargs]
        for tensor in written:
            address = tensor.untyped_storage().data_ptr()
            if address not in self.own and address not in self.before:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.before[address] = (whole, whole.clone())
        result = func(*args, **kwargs)
        if not any(r.alias_info is not None for r in func._schema.returns):
            self.own.update(t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.steps.append((func, args, kwargs, result))
        return result


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """Lets steps be captured on a CPU; gives the graphs that were made."""
    monkeypatch.setitem(capture.GRAPHS, "cpu", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    yield Recorder.made


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A LLaMA that generates as it would on a GPU."""
    built = tiny.build("llama")
    built._valid_auto_compile_criteria = lambda kwargs, config: (
        not config.disable_compile and kwargs[tiny.CACHE].is_compileable
    )
    yield built


def generate(model: PreTrainedModel, cache: CompressedCache, seed: int = 0, **arguments: Any) -> Tensor:
    """Greedy tokens after a padded prompt of two rows."""
    inputs = tiny.inputs("llama", PROMPT, seed, 2)
    inputs["attention_mask"][1, :20] = 0
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    arguments = {"max_new_tokens": NEW, "do_sample": False} | arguments
    return model.generate(**inputs, **tiny.with_cache(cache), **arguments)


def presets() -> list[str]:
    """Those whose decode steps can be captured."""
    return [name for name in PRESETS if CompressedCache(tiny.model("llama"), name).is_compileable]


EVERY = {"budget": 0.3, "scorer": "tova", "evictor": {"name": "every", "period": 9}}


def check_captured(name: str, model: PreTrainedModel) -> None:
    """The same tokens by captured steps and by steps in Python, and the same tokens held by every layer."""
    budget = {} if CompressionConfig.preset(name).evictor is None else {"budget": 0.3}
    eager, captured = (CompressedCache(model, name, decoding=how, **budget) for how in ("eager", "captured"))
    assert torch.equal(generate(model, captured), generate(model, eager))
    one, other = captured.report(), eager.report()
    assert (one.decoding, other.decoding) == ("captured", "eager")
    assert one.held_positions == other.held_positions


@pytest.mark.parametrize("name", presets())
def test_captured_steps_are_those_of_python(name: str, model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """In a padded batch, over one graph."""
    check_captured(name, model)
    assert [graph.replays for graph in recorders] == [NEW - 2]  # one token comes of the prompt, one step goes first


@pytest.mark.parametrize("name", presets())
def test_a_step_asks_every_tensor_where_it_is_only_after_one_was_replaced(
    name: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered is what asking would find, also where buffers grow and groups are quantized on the way."""
    remembered, asked = capture.CapturedDecoding._where, []
    places = CacheState.places

    def counted(state: CacheState) -> Any:
        asked.append(1)
        return places(state)

    def checked(decoding: capture.CapturedDecoding) -> Any:
        found = remembered(decoding)
        assert found == places(decoding.state)
        return found

    monkeypatch.setattr(CacheState, "places", counted)
    monkeypatch.setattr(capture.CapturedDecoding, "_where", checked)
    budget = {} if CompressionConfig.preset(name).evictor is None else {"budget": 0.3}
    cache = CompressedCache(model, name, reserve=0, **budget)
    generate(model, cache, max_new_tokens=90)
    assert cache.report().decoding == "captured"
    assert 1 <= len(asked) <= 45


def test_a_cut_between_captured_steps_leaves_their_addresses(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """Layers that are cut after some steps each: the same tokens over the same one graph."""
    eager, captured = (CompressedCache(model, EVERY, decoding=how) for how in ("eager", "captured"))
    assert torch.equal(generate(model, captured), generate(model, eager))
    assert captured.report().held_positions == eager.report().held_positions
    assert [graph.replays for graph in recorders] == [NEW - 2]


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["prefixkv", "h2o", "full"])
@pytest.mark.parametrize("kind", ["llama", "llama_mha"])
def test_captured_steps_on_a_gpu_are_those_of_python(kind: str, name: str) -> None:
    """In float32, by CUDA graphs: by age, by score and without eviction, with grouped queries and without."""
    check_captured(name, tiny.build(kind).cuda())


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_image_prompts_are_decoded_by_captured_steps(name: str, recorders: list[Recorder]) -> None:
    """After a reducer too, which acts in the prompt alone."""
    model = tiny.build(name)
    model._valid_auto_compile_criteria = lambda kwargs, config: not config.disable_compile
    inputs = FAMILIES[name].two_rows() if name in FAMILIES else tiny.prompt(name, [4, 0, 5], seed=4)
    found = []
    for how in ("eager", "captured"):
        cache = CompressedCache(model, "prefixkv", reducer="fastv", budget=0.4, decoding=how)
        found.append(model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=NEW, do_sample=False))
    assert torch.equal(*found)
    assert [graph.replays for graph in recorders] == [NEW - 2]


def test_turns_beams_and_rows_go_on(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """What comes after captured steps finds the cache as steps in Python would have left it."""
    found = []
    for how in ("eager", "captured"):
        cache = CompressedCache(model, "h2o", budget=0.3, decoding=how)
        ids = generate(model, cache)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        twin = copy.deepcopy(cache)
        ids = torch.cat([ids[[1, 0, 1]], tiny.token_ids(3, 5, seed=9)], 1)
        mask = torch.ones_like(ids)
        mask[[0, 2], :20] = 0
        more = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
        found.append([ids, model.generate(ids, **more, **tiny.with_cache(cache)), cache.report().held_positions])
        found[-1].append(model.generate(ids, **more, **tiny.with_cache(twin)))
        beams = CompressedCache(model, "prefixkv", budget=0.3, decoding=how)
        found[-1].append(generate(model, beams, num_beams=2))
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, list) else torch.equal(one, other)
    assert all(graph.replays for graph in recorders)


def test_a_buffer_that_grows_is_captured_anew(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """In a layer of another size, with the same tokens."""
    eager, captured = (CompressedCache(model, "full", decoding=how) for how in ("eager", "captured"))
    plan = captured.plan_decoding
    captured.plan_decoding = lambda *given: (plan(*given), setattr(captured._state, "coming", 0))[0]
    assert torch.equal(generate(model, captured), generate(model, eager))
    assert len(recorders) > 1
    assert captured.report().kv_bytes < 1.4 * captured.report().full_kv_bytes


def test_what_cannot_be_captured_runs_in_python(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says why, and the same tokens."""
    expected = generate(model, CompressedCache(model, "prefixkv", budget=0.3, decoding="eager"))
    asks = model.lm_head.register_forward_hook(lambda module, args, output: (float(output.max()), output)[1])
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    with pytest.warns(KVCompressWarning, match="decoding: a step of .* cannot be captured.*decoding='eager'"):
        assert torch.equal(generate(model, cache), expected)
    asks.remove()
    assert cache.report().decoding == "eager"


def test_few_tokens_and_other_wishes_are_not_captured(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """Less than 32 tokens, what `generate` is told, and assisted decoding, which takes tokens back."""
    generate(model, CompressedCache(model, "prefixkv", budget=0.3), max_new_tokens=20)
    generate(model, CompressedCache(model, "prefixkv", budget=0.3), max_new_tokens=20, disable_compile=False)
    generate(model, CompressedCache(model, "prefixkv", budget=0.3), disable_compile=True)
    model.generation_config.disable_compile = True
    generate(model, CompressedCache(model, "prefixkv", budget=0.3))
    model.generation_config.disable_compile = False
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    ids = tiny.token_ids(1, 30, seed=3)
    model.generate(ids, **tiny.with_cache(cache), max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert not recorders


def test_a_model_that_is_given_back_compiles_as_before(model: PreTrainedModel) -> None:
    """And a word that nobody knows is refused with those that are allowed."""
    CompressedCache(model, "prefixkv")
    assert "get_compiled_call" in model.__dict__
    kvcompress.restore(model)
    assert "get_compiled_call" not in model.__dict__
    with pytest.raises(ConfigError, match="decoding: must be 'captured', 'compiled' or 'eager'; got 'graph'"):
        CompressedCache(model, "prefixkv", decoding="graph")


@pytest.mark.parametrize("reserve", [-1, 1.5, None, True])
def test_room_is_reserved_for_a_number_of_tokens(model: PreTrainedModel, reserve: Any) -> None:
    """The class itself says so, where nobody checks types."""
    unchecked = inspect.unwrap(CompressedCache.__init__)
    with pytest.raises(ConfigError, match=r"reserve: must be a number of tokens \(int\), 0 or more; got"):
        unchecked(CompressedCache.__new__(CompressedCache), model, reserve=reserve)


def test_a_model_on_several_devices_is_not_captured(model: PreTrainedModel, recorders: list[Recorder]) -> None:
    """A graph would hold what one of them does, and go on without the others."""
    model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    assert generate(model, CompressedCache(model, "prefixkv", budget=0.3)).shape[1] == PROMPT + NEW
    assert not recorders
