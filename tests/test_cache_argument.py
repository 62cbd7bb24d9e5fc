"""A compressed cache under each name that transformers has for it: the same answers, refusals and reductions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvcompress import CompressedCache
from kvcompress.cache import argument
from kvcompress.errors import UnsupportedModeError
from tests import tiny

pytestmark = pytest.mark.quick
NAMES = ("cache", "past_key_values")


@pytest.fixture(autouse=True)
def the_old_name_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        yield


def test_the_installed_name_is_the_one_that_generate_uses() -> None:
    assert argument.installed_name() == tiny.CACHE
    assert set(argument.NAMES) == set(NAMES)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, {"scorer": "attention"}, {"reducer": "lightkv"}], ids=str)
def test_a_call_finds_the_cache_under_either_name(name: str, fields: dict[str, Any]) -> None:
    model, inputs = tiny.model("llava_deep"), tiny.inputs("llava_deep", 20, seed=1)
    reports = []
    for key in (name, tiny.CACHE):
        cache = CompressedCache(model, "prefixkv", budget=0.5, **fields)
        logits = [model(**inputs, **{key: cache}).logits, model(tiny.token_ids(1, 1, 2), **{key: cache}).logits]
        reports.append((cache.report(), logits))
    (report, logits), (wanted, wanted_logits) = reports
    assert report == wanted and report.tokens_seen == inputs["input_ids"].shape[1] + 1
    assert report.image_tokens and all(map(torch.equal, logits, wanted_logits))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_checked_under_either_name(name: str) -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(1, 10, 0)
    with pytest.raises(UnsupportedModeError, match="labels"):
        model(ids, labels=ids, **{name: CompressedCache(model, "prefixkv")})


@pytest.mark.parametrize("name", NAMES)
def test_generate_uses_the_cache_under_either_name(name: str) -> None:
    model, cache = tiny.model("llama"), CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    model.generate(**tiny.inputs("llama", 20, seed=1), **{name: cache}, max_new_tokens=3)
    assert cache.get_seq_length() == 22
