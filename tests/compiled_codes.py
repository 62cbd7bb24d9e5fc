"""Generates with compiled decode steps, and fails where they differ from eager ones or make a second graph.

A process of its own, since the type checks that tests put on every function cannot be compiled. Arguments are names of
cases.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from kvcompress import CompressedCache
from kvcompress.cache import tables
from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes, Keys, Values
from tests import tiny

TOKENS, NEW = 60, 41  # 40 of these are decode steps
LENGTHS = [60, 43]  # of the rows of a padded batch


class Halves(Quantizer):
    """Half precision, in a layout that no kernel knows: a user's own."""

    name: ClassVar[str] = "halves"

    def encode_keys(self, keys: Keys) -> Codes:
        scale = keys.abs().amax((2, 3), keepdim=True).expand(-1, -1, keys.shape[2] // self.group, -1)
        numbers = (keys / scale.repeat_interleave(self.group, 2)).half()
        return Codes(numbers.view(torch.uint8), scale.contiguous(), None, keys.shape[3])

    def encode_values(self, values: Values) -> Codes:
        return self.encode_keys(values)

    def decode(self, codes: Codes) -> Keys:
        numbers = codes.data.view(torch.float16).to(codes.scale.dtype)
        return numbers * codes.scale.repeat_interleave(codes.data.shape[2] // codes.scale.shape[2], 2)


_FOUR_BITS = {"name": "quanto4", "group": 8, "residual": 26}
CASES: dict[str, dict[str, Any]] = {
    "prefixkv+int4": {"config": "prefixkv+int4", "budget": 0.9, "quantizer": _FOUR_BITS},
    "headprefix+int4": {"config": "headprefix+int4", "budget": 0.9, "quantizer": _FOUR_BITS, "lengths": LENGTHS},
    "headprefix+int4, as kernels are called": {
        "config": "headprefix+int4",
        "budget": 0.9,
        "quantizer": {"name": "fp8", "group": 8, "residual": 26},
        "kernels": True,
    },
    "kivi4, nothing quantized yet": {
        "config": "kivi4",
        "quantizer": {**_FOUR_BITS, "residual": 56},
        "lengths": LENGTHS,
    },
    "kivi4, as kernels are called": {"config": "kivi4", "quantizer": _FOUR_BITS, "lengths": LENGTHS, "kernels": True},
    "fp8, heads apart": {
        "config": {"budget": 0.7, "scorer": "attention", "evictor": {"name": "topk", "granularity": "head"}},
        "quantizer": {"name": "fp8", "group": 8, "residual": 26},
        "lengths": LENGTHS,
    },
    "k8v4, which turns back what it reads": {"config": "full", "quantizer": {**_FOUR_BITS, "name": "k8v4"}},
    "a quantizer of one's own": {
        "config": "full",
        "quantizer": Halves(group=4, residual=12),
        "lengths": LENGTHS,
        "tolerance": 2e-3,
    },
    "prefixkv, as kernels are called": {"config": "prefixkv", "budget": 0.5, "lengths": LENGTHS, "kernels": True},
}

OWN_LOOP = "a loop of one's own"


def main() -> None:
    """Runs the cases that are named."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = tiny.model("llama_shallow")
    for name in sys.argv[1:]:
        if name == OWN_LOOP:
            check_own_loop(model)
        else:
            check(model, name, **CASES[name])


def check(
    model: PreTrainedModel,
    name: str,
    lengths: list[int] | None = None,
    kernels: bool = False,
    tolerance: float = 1e-4,
    **fields: Any,
) -> None:
    """Eager and compiled generation agree, and the second compiled cache needs no graph of its own.

    Where numbers are stored in half precision, one may round to the next, which the tolerance allows.
    """
    ids, mask = tiny.token_ids(2, TOKENS, seed=1), torch.ones(2, TOKENS, dtype=torch.long)
    for row, length in enumerate(lengths or []):
        mask[row, : TOKENS - length] = 0
    eager, plain = generate(model, ids, mask, fields, compiled=False)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        with mock.patch.object(tables, "runs_triton", lambda device: kernels):
            tokens, cache = generate(model, ids, mask, fields, compiled=True)
        assert torch.equal(tokens, eager), f"{name}: {tokens.tolist()} instead of {eager.tolist()}"
        found, wanted = (dataclasses.replace(one.report(), decoding=None) for one in (cache, plain))
        assert found == wanted, f"{name}: {found} instead of {wanted}"
        assert counters["stats"]["unique_graphs"] == 1, f"{name}: {counters['stats']['unique_graphs']} graphs"
        assert not counters["graph_break"], f"{name}: {counters['graph_break']}"
        for one, other in zip(cache.layers, plain.layers, strict=True):
            for found, wanted in zip((one.keys, one.values), (other.keys, other.values), strict=True):
                torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-4)


@torch.no_grad()
def check_own_loop(model: PreTrainedModel) -> None:
    """A loop over a compiled model quantizes if it asks for mask sizes before each step, as `generate` does."""
    torch._dynamo.reset()
    counters.clear()
    found = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="eager")):
        cache, tokens = CompressedCache(model, "kivi4", quantizer=_FOUR_BITS, reserve=NEW), []
        logits = model(tiny.token_ids(2, TOKENS, seed=1), **tiny.with_cache(cache)).logits[:, -1:]
        for _ in range(NEW):
            tokens.append(logits.argmax(-1))
            cache.get_mask_sizes(1)
            logits = forward(input_ids=tokens[-1], **tiny.with_cache(cache)).logits
        found.append((torch.cat(tokens, 1).tolist(), cache.report().held_positions, cache.report().kv_bytes))
        assert cache.layers[0].store.packed == 72
    assert found[0] == found[1], f"{found[1]} instead of {found[0]}"
    assert counters["stats"]["unique_graphs"] == 1, f"{counters['stats']['unique_graphs']} graphs"


def generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, fields: dict[str, Any], compiled: bool
) -> tuple[Tensor, CompressedCache]:
    """Greedy tokens, and the cache that held them."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": not compiled}
    if compiled:
        settings["compile_config"] = CompileConfig(fullgraph=True, backend="eager", mode=None)
        settings["compile_config"]._compile_all_devices = True
    cache = CompressedCache(model, **fields, reserve=NEW)
    assert cache.is_compileable
    return model.generate(input_ids=ids, attention_mask=mask, **tiny.with_cache(cache), **settings), cache


if __name__ == "__main__":
    main()
