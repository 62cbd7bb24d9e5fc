"""Every pair of neighbouring policies either runs or is refused with a reason, as the documentation says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.config.composition import NEIGHBOURS, Pair, as_markdown, pairs, policies_of, presets_as_markdown
from kvcompress.errors import ConfigError
from tests import tiny
from tests.strategies import THOROUGH

STAGES = ("scorer", "allocator", "evictor", "merger", "quantizer", "reducer")
LABELS = {stage: list(policies_of(stage)) for stage in STAGES}
ALL = list(itertools.chain(*(pairs(*stages) for stages in NEIGHBOURS)))
VALID = [pair for pair in ALL if pair.config is not None]
Names = frozenset[tuple[str, str]]  # two stages, each with the label of its policy


def names(pair: Pair) -> Names:
    """What a pair is called, in a set."""
    return frozenset(zip(pair.stages, pair.labels, strict=True))


def labels(config: CompressionConfig) -> dict[str, str]:
    """The label of the policy of each stage that has one."""
    chosen = {stage: getattr(config, stage) for stage in STAGES}
    return {
        stage: next(label for label, policy in LABELS[stage] if policy == given)
        for stage, given in chosen.items()
        if given is not None
    }


def names_in(config: CompressionConfig) -> set[Names]:
    """The pairs of neighbours in a configuration."""
    found = labels(config)
    return {
        frozenset([(first, found[first]), (second, found[second])])
        for first, second in NEIGHBOURS
        if first in found and second in found
    }


def covering() -> list[CompressionConfig]:
    """Configurations of up to six stages that contain every valid pair at least once: a sixth as many as pairs."""
    valid = {names(pair): pair.config for pair in VALID}
    left, rows = dict(valid), []
    while left:
        missing, config = next(iter(left.items()))
        for stage in STAGES:
            if stage in dict(missing):
                continue
            others = {other: label for other, label in labels(config).items() if other != stage}
            gains = []
            for number, (label, policy) in enumerate(LABELS[stage]):
                made = [
                    frozenset([(stage, label), (other, others[other])])
                    for first, second in NEIGHBOURS
                    for other in {first, second} - {stage}
                    if stage in (first, second) and other in others
                ]
                if all(pair in valid for pair in made):
                    gains.append((-sum(pair in left for pair in made), number, policy))
            for gain, _, policy in sorted(gains, key=lambda found: found[:2]):
                if gain == 0:
                    break
                try:  # stages that are no neighbours may rule each other out too
                    config = CompressionConfig(**{**dict(config), stage: policy})
                    break
                except ConfigError:
                    continue
        for pair in names_in(config):
            left.pop(pair, None)
        rows.append(config)
    return rows


CONFIGS = [pair.config for pair in VALID] if THOROUGH else covering()


def test_every_valid_pair_is_in_a_configuration_that_runs() -> None:
    assert set().union(*map(names_in, CONFIGS)) >= {names(pair) for pair in VALID}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(labels(config).values()).replace(", ", "-"))
@pytest.mark.parametrize("sees", ["text", "images"])
@torch.no_grad()
def test_a_valid_combination_runs(config: CompressionConfig, sees: str) -> None:
    """A prompt, decode steps and another turn: finite logits, and layers within what the budget allows.

    A reducer sees an image of one grid, or of several, in a model that gives it something to do.
    """
    family = {"text": "llama", "images": "llava"}[sees]
    if config.reducer is not None:
        family = tiny.LARGE_IMAGE_MODELS[sees == "images"]
    model = tiny.model(family)
    cache = CompressedCache(model, config)
    logits = model(**tiny.inputs(family, tokens=300, seed=1), **tiny.with_cache(cache)).logits
    for number, tokens in enumerate([1, 1, 1, 4, 1]):
        assert logits.isfinite().all()
        logits = model(tiny.token_ids(1, tokens, seed=number), **tiny.with_cache(cache)).logits
    report = cache.report()
    if config.reducer is not None:
        images = [count for (count,) in report.image_tokens]
        assert images == sorted(images, reverse=True) and images[2] < tiny.image_tokens(family)
        assert (images[0] == tiny.image_tokens(family)) == (0 not in config.reducer.acts_after(len(images)))
        assert [count for (count,) in report.layer_tokens] == [308 + count for count in images]
        for held, given in zip(report.layer_lengths, report.layer_tokens, strict=True):
            assert held <= given
    if report.layer_budgets is not None:
        more = 1 if config.evictor is not None and config.evictor.cuts_every else 0  # the step since the last turn
        assert report.retention <= 0.5 + more / report.tokens_seen
        for held, most in zip(report.layer_lengths, report.layer_budgets, strict=True):
            assert held <= most
    if config.quantizer is not None:
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
