"""The grid that reads a prompt once: what it compresses from there is what a cache of its own holds and says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.grid_pages import page_methods
from benchmarks.grid_readings import BUDGETS, Follow, Prompt, Way, compressed, followed, measured
from benchmarks.grid_readings import Reading as Reads
from benchmarks.grid_scenes import scene_methods
from benchmarks.grid_tables import outcomes
from benchmarks.grid_text import many_methods, needle_methods
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.evaluation.pages import KINDS
from tests import tiny

WAYS = {
    f"{method} {name}": way
    for methods in (needle_methods(), scene_methods(), many_methods(), page_methods())
    for method, ways in methods.items()
    for name, way in ways.items()
    if way.config.scorer is None or not way.config.scorer.reconstructs
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_prompt_read_once_is_compressed_as_if_it_were_read_anew(way: Way) -> None:
    """Heads keep the same tokens, and what follows is as likely, at every budget, whatever was cut before."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 60, seed=3)
    follow = Follow(tiny.token_ids(1, 6, seed=5), first=2)
    with torch.inference_mode():
        reading = Reads(SimpleNamespace(model=model), inputs)
        scored = reading.scored(way.config)
        for budget in (*BUDGETS, 0.8):
            config = way.config.override(budget=budget)
            cache, alone = compressed(scored, config), CompressedCache(model, config)
            model(**inputs, **tiny.with_cache(alone))
            for held, wanted in zip(cache.report().layer_lengths, alone.report().layer_lengths, strict=True):
                assert held == wanted
            assert cache.report().kv_bytes == alone.report().kv_bytes
            own, theirs = (followed(model, one, reading.logits, follow) for one in (cache, alone))
            assert own == theirs


def test_ways_that_share_scores_share_their_scorer() -> None:
    """Scores are taken once for a method, by its first way; another way's would be cut by scores of a stranger."""
    loaded, inputs = SimpleNamespace(model=tiny.model("llama")), tiny.inputs("llama", 20, seed=3)
    prompt = Prompt("0", "seen", inputs, {"answer": Follow(tiny.token_ids(1, 2, seed=5))})
    mixed = {name: Way(CompressionConfig.preset(name), (0.5,)) for name in ("tova", "snapkv")}
    with torch.inference_mode(), pytest.raises(ValueError, match="the ways of 'mixed' have different scorers"):
        list(measured(loaded, prompt, {"mixed": mixed}))


@pytest.mark.parametrize("task", ["unseen", "seen"])
def test_questions_of_every_kind_about_pages_are_one_task(task: str, tmp_path: Path) -> None:
    """Pages are asked by turns for what they show, which is one figure; reading them aloud is another."""
    known = {"task": task, "method": "full", "way": "", "budget": 1.0}
    rows = [
        known | {"prompt": f"{number} {kind}", "found": {kind: [[0.5, 3, 1]]}}
        for number, shown in enumerate(KINDS)
        for kind in (shown, "read")
    ]
    file = tmp_path / "pages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {key[0]: len(prompts) for key, prompts in outcomes(file).items()} == {
        f"{task} question": len(KINDS),
        f"{task} read": len(KINDS),
    }
