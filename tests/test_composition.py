"""Every pair of neighbouring policies either runs or is refused with a reason, as the documentation says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcompress import CompressedCache
from kvcompress.config.composition import NEIGHBOURS, Pair, as_markdown, pairs, presets_as_markdown
from tests import tiny

ALL = list(itertools.chain(*(pairs(*stages) for stages in NEIGHBOURS)))
VALID = [pair for pair in ALL if pair.config is not None]


def label(pair: Pair) -> str:
    """A readable test id."""
    return "-".join((*pair.stages, *pair.labels)).replace(", ", "-")


@pytest.mark.parametrize("pair", VALID, ids=label)
@pytest.mark.parametrize("sees", ["text", "images"])
@torch.no_grad()
def test_a_valid_pair_runs(pair: Pair, sees: str) -> None:
    """A prompt, decode steps and another turn: finite logits, and layers within what the budget allows.

    A reducer sees an image of one grid, or of several, in a model that gives it something to do.
    """
    family = {"text": "llama", "images": "llava"}[sees]
    if pair.config.reducer is not None:
        family = tiny.LARGE_IMAGE_MODELS[sees == "images"]
    model = tiny.model(family)
    cache = CompressedCache(model, pair.config)
    logits = model(**tiny.inputs(family, tokens=300, seed=1), **tiny.with_cache(cache)).logits
    for number, tokens in enumerate([1, 1, 1, 4, 1]):
        assert logits.isfinite().all()
        logits = model(tiny.token_ids(1, tokens, seed=number), **tiny.with_cache(cache)).logits
    report = cache.report()
    if pair.config.reducer is not None:
        images = [count for (count,) in report.image_tokens]
        assert images == sorted(images, reverse=True) and images[0] == tiny.image_tokens(family) > images[2]
        assert [count for (count,) in report.layer_tokens] == [308 + count for count in images]
        for held, given in zip(report.layer_lengths, report.layer_tokens, strict=True):
            assert held <= given
    if report.layer_budgets is not None:
        assert report.retention <= 0.5
        for held, most in zip(report.layer_lengths, report.layer_budgets, strict=True):
            assert held <= most
    if pair.config.quantizer is not None:
        assert report.kv_bytes < report.retention * report.full_kv_bytes


def test_what_is_refused_has_a_reason_and_a_way_out() -> None:
    refused = [pair for pair in ALL if pair.config is None]
    assert refused and all("choose" in pair.reason for pair in refused)


@pytest.mark.parametrize(
    ("page", "write"), [("composition.md", as_markdown), ("policies/presets.md", presets_as_markdown)]
)
def test_the_pages_say_what_the_code_does(page: str, write: Callable[[], str]) -> None:
    """`python tools/composition.py` rewrites them."""
    path = Path(__file__).parent.parent / "docs" / page
    assert path.read_text(encoding="utf-8") == write()
