"""A report says in words what takes more than the budget, with the bytes or tokens that it is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress import Budget, CompressedCache, CompressionConfig
from kvcompress.cache.report import CacheReport
from kvcompress.config.presets import PRESETS
from kvcompress.errors import BudgetWarning
from kvcompress.markup import size
from tests import tiny
from tests.test_reconstruction import Tokenizer

SLOT = 2 * 2 * 8 * 4  # bytes: keys and values of two heads of eight dimensions


def reported(
    config: str | CompressionConfig, tokens: int, new: int = 0, rows: int = 1, pad: int = 0, **fields: Any
) -> CacheReport:
    """After a prompt, whose first row is padded, and some steps."""
    cache = CompressedCache(tiny.model("llama"), config, **fields)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :pad] = 0
    with torch.no_grad():
        for number in range(new + 1):
            ids = tiny.token_ids(rows, 1 if number else tokens, seed=number)
            if number:
                mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
            tiny.model("llama")(ids, **given, **tiny.with_cache(cache))
    return cache.report()


def held(report: CacheReport) -> int:
    return sum(map(sum, report.layer_lengths))


@pytest.mark.parametrize("config", ["prefixkv", "uniform", "streaming", "snapkv"])
def test_a_cache_within_its_budget_says_nothing(config: str) -> None:
    assert reported(config, 400, new=3, budget=100).notes == []


@pytest.mark.parametrize("tokens", [4, 30])
@pytest.mark.parametrize("config", ["auto", "full", "text"])
def test_more_than_a_cache_of_every_token_is_explained(config: str, tokens: int) -> None:
    """Of a short prompt, which takes less than the room that is made for what comes, whatever the budget allows."""
    report = reported(config, tokens, new=1)
    assert report.kv_bytes > report.full_kv_bytes
    assert any("slots without a token: buffers grow in blocks" in note for note in report.notes)


def test_the_protected_beyond_a_budget_are_counted() -> None:
    report = reported("streaming", 60, budget=Budget(tokens=6, sink=4, recent=8))
    assert held(report) == 3 * 12
    assert report.notes[0] == (
        "the first 4 and last 8 tokens stay in every layer whatever the budget: over all layers 18 tokens more than it "
        "says"
    )


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("fields", "coming", "slots"),
    [
        ({"scorer": "attention"}, "the token to come takes", 1),
        ({"scorer": "attention", "allocator": "adakv"}, "the token to come takes", 1),
        ({"scorer": "attention", "quantizer": "quanto4"}, "the token to come takes", 1),
        ({"evictor": "streaming"}, "the token to come takes", 1),
        ({"scorer": "attention", "evictor": {"name": "every", "period": 16}}, "the 16 tokens to come take", 16),
    ],
    ids=["topk", "heads", "quantized", "streaming", "every"],
)
def test_bytes_without_room_for_what_comes_are_told(
    fields: dict[str, Any], coming: str, slots: int, steps: int
) -> None:
    """Once in a warning, and in every report; a byte less than what every slot takes is too little."""
    least = 2 * 3 * slots * SLOT  # two rows, three layers
    says = f"the budget of {least - 1:,} bytes is below the {least:,} that {coming} in all layers and rows, so nothing"
    for nbytes, told in ((least - 1, 1), (least, 0)):
        config = CompressionConfig(budget=Budget(bytes=nbytes, sink=0, recent=0), **fields)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BudgetWarning)
            report = reported(config, 20, new=steps, rows=2)
        notes = [note for note in report.notes if note.startswith(says)]
        assert len(notes) == told
        assert [str(one.message) for one in caught if one.category is BudgetWarning] == notes
        assert steps or held(report) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"config": "full", "tokens": 30, "new": 3},
        {"config": "full", "tokens": 40, "rows": 2, "pad": 25},
        {"config": "prefixkv", "tokens": 40, "rows": 2, "pad": 25, "budget": 0.5},
    ],
    ids=["blocks", "padded", "padded-half"],
)
def test_slots_without_a_token_are_told_in_bytes(given: dict[str, Any]) -> None:
    """Held tokens and these make up all that is allocated."""
    report = reported(**given)
    (note,) = (note for note in report.notes if "slots without a token" in note)
    assert note.startswith(f"{size(report.kv_bytes - SLOT * held(report))} of the keys and values are slots without")


def test_what_a_quantizer_leaves_in_full_precision_is_told_in_bytes() -> None:
    quantizer = {"name": "quanto4", "group": 8, "residual": 8}
    report = reported("full", 45, quantizer=quantizer)
    (note,) = (note for note in report.notes if note.startswith("quantizer quanto: "))
    full = 45 - (45 - 8) // 8 * 8
    assert note == (
        f"quantizer quanto: {size(3 * full * SLOT)} are in full precision, the last 8 tokens of each layer and those "
        "that have not filled a group of 8 yet"
    )


def test_what_a_merger_remembers_is_told_in_bytes() -> None:
    report = reported("prefixkv", 60, new=4, budget=0.3, merger="threshold")
    (note,) = (note for note in report.notes if note.startswith("merger threshold: remembers "))
    assert note.startswith("merger threshold: remembers 24 bytes of what was merged, counted with the index; ")
    assert not any("merger" in note for note in reported("prefixkv", 60, budget=0.3).notes)


KVZIP = {"config": "kvzip", "budget": Budget(tokens=12, sink=1, recent=2)}
REPEATED = "scorer kvzip: nothing was repeated"


def notes_of(cache: CompressedCache, start: str) -> list[str]:
    return [note for note in cache.report().notes if note.startswith(start)]


def test_a_scorer_that_wants_a_repetition_says_where_none_was(tmp_path: Path) -> None:
    """Under a plain forward, in a copy and on disk; not once a prompt was repeated; again after a reset."""
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 40, seed=2)
    read, repeated = CompressedCache(model, **KVZIP), CompressedCache(model, **KVZIP)
    assert notes_of(read, REPEATED) == []  # nothing was ranked yet
    with torch.no_grad():
        model(**inputs, **tiny.with_cache(read))
    repeated.score_by_reconstruction(Tokenizer(), inputs)
    for cache, says in ((read, 1), (repeated, 0)):
        cache.save(tmp_path / str(says))
        for one in (cache, copy.deepcopy(cache), CompressedCache.load(model, tmp_path / str(says))):
            assert len(notes_of(one, REPEATED)) == says
    assert "cache.score_by_reconstruction(tokenizer, inputs)" in notes_of(read, REPEATED)[0]
    repeated.reset()
    with torch.no_grad():
        model(**inputs, **tiny.with_cache(repeated))
    assert len(notes_of(repeated, REPEATED)) == 1


@pytest.mark.parametrize("preset", [name for name, (_, fields) in PRESETS.items() if "reducer" in fields])
def test_a_reducer_says_where_no_image_was_seen(preset: str) -> None:
    model = tiny.model("llava_deep")
    for name, says in (("llava_deep", 0), ("llama", 1)):
        cache = CompressedCache(model, preset)
        with torch.no_grad():
            model(**tiny.inputs(name, 20, seed=1), **tiny.with_cache(cache))
        assert len(notes_of(cache, "reducer ")) == says
    assert notes_of(cache, "reducer ")[0].endswith("no image was seen, so every layer was given every token")
