"""The preset `auto`: what it chooses for which prompt, that it then is what it chose, and that it is the default."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress
from kvcompress import Budget, CompressedCache, CompressionConfig, Document, KVCompressError, compressing
from kvcompress.cache.report import CacheReport
from kvcompress.cli.configuration import read_config
from kvcompress.config import auto
from kvcompress.config.auto import SHORT, Prompt
from kvcompress.evaluation import evaluate
from kvcompress.reuse.chat import Chat
from tests import checkpoints, tiny
from tests.vision import FAMILIES

pytestmark = pytest.mark.quick
HOW: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
TEXT, IMAGE = auto.TEXT[0].preset, auto.IMAGE[0].preset
LONG = SHORT + 40


def padded(name: str) -> dict[str, Any]:
    """Two rows, the second of which is short."""
    inputs = tiny.inputs(name, LONG, seed=3, batch=2)
    inputs["attention_mask"][1, : LONG - 20] = 0
    return inputs


# Each kind of prompt: the model, its inputs, what is chosen, and whether it is kept whole.
KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]], str, bool]] = {
    "text": ("llama", lambda: tiny.inputs("llama", LONG, seed=1), TEXT, False),
    "padded": ("llama", lambda: padded("llama"), TEXT, False),
    "text, sees images": ("llava", lambda: tiny.prompt("llava", [LONG], seed=1), TEXT, False),
    "image": ("llava_36", lambda: tiny.inputs("llava_36", LONG, seed=1), IMAGE, False),
    "image last": ("llava_next", lambda: tiny.prompt("llava_next", [LONG, 0], seed=1), IMAGE, False),
    "short": ("llama", lambda: tiny.inputs("llama", SHORT, seed=1), TEXT, True),
    "short image": ("llava", lambda: tiny.inputs("llava", 20, seed=1), IMAGE, True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
WAYS: dict[str, dict[str, Any]] = {"at once": {}, "in chunks": {"prefill_chunk_size": 16}}


def said(cache: CompressedCache, name: str, inputs: dict[str, Any], **how: Any) -> Tensor:
    output: Tensor = tiny.model(name).generate(**inputs, **tiny.with_cache(cache), **{**HOW, **how})
    return output


def told_apart(report: CacheReport) -> CacheReport:
    """A report without what a cache that chose nothing has not."""
    return dataclasses.replace(report, preset=None, notes=[])


def as_chosen(preset: str, whole: bool, **fields: Any) -> CompressionConfig:
    config = CompressionConfig.preset(preset, budget=0.4, **fields)
    return config.override(budget=config.budget.model_copy(update={"whole": SHORT if whole else 0}))


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in KINDS for way in WAYS if way == "at once" or "image" not in kind],  # those come in one
)
def test_a_cache_is_that_of_the_preset_which_suits_its_prompt(kind: str, way: str) -> None:
    name, make, preset, whole = KINDS[kind]
    cache = CompressedCache(tiny.model(name), "auto", budget=0.4)
    own = CompressedCache(tiny.model(name), as_chosen(preset, whole))
    assert cache.config.auto and cache.report().preset is None
    assert torch.equal(said(cache, name, make(), **WAYS[way]), said(own, name, make(), **WAYS[way]))
    assert cache.config == own.config
    assert told_apart(cache.report()) == told_apart(own.report())
    assert cache.report().preset == preset


@every_kind
def test_the_report_says_what_was_chosen_and_why(kind: str) -> None:
    name, make, preset, whole = KINDS[kind]
    cache, inputs = CompressedCache(tiny.model(name), "auto", budget=0.4), make()
    said(cache, name, inputs)
    note, *_ = cache.report().notes
    assert note.startswith(f"auto chose {preset}: the first prompt has {int(inputs['attention_mask'].sum(1).max())} ")
    assert ("none of an image" in note) == ("pixel_values" not in inputs)
    assert (f"up to {SHORT} are kept whole" in note) == whole
    assert preset in cache.report()._repr_html_() and cache.report().to_dict()["preset"] == preset


@pytest.mark.parametrize("budget", [0.1, 0.9])
def test_a_short_prompt_is_kept_whole_and_what_follows_is_held_to_the_budget(budget: float) -> None:
    cache = CompressedCache(tiny.model("llama"), "auto", budget=budget)
    said(cache, "llama", tiny.inputs("llama", SHORT - 9, seed=1), max_new_tokens=40)
    seen = SHORT - 9 + 39
    assert cache.get_seq_length() == seen
    assert {row[0] for row in cache.report().layer_lengths} == {max(SHORT, int(budget * seen))}


def test_amounts_are_kept_to_also_for_short_prompts() -> None:
    for budget in (20, "4KiB"):
        cache = CompressedCache(tiny.model("llama"), "auto", budget=budget, scorer="attention", evictor="streaming")
        said(cache, "llama", tiny.inputs("llama", 60, seed=1))
        assert cache.report().retention < 0.6


def test_a_first_chunk_by_hand_decides() -> None:
    model, ids = tiny.model("llama"), tiny.token_ids(1, 2 * SHORT, seed=2)
    cache = CompressedCache(model, "auto", budget=0.4)
    with torch.no_grad():
        for part in ids.split(64, dim=1):
            model(part, **tiny.with_cache(cache))
            assert cache.report().notes[0].startswith(f"auto chose {TEXT}: the first prompt has 64 tokens")
    assert cache.report().layer_lengths == [[SHORT]] * 3


def test_later_turns_change_no_choice() -> None:
    name = "llava_36"
    cache = CompressedCache(tiny.model(name), "auto", budget=0.4)
    first = said(cache, name, tiny.prompt(name, [LONG], seed=1))
    before = cache.config
    turn = tiny.prompt(name, [9, 0, 9], seed=2)
    turn["input_ids"] = torch.cat([first, turn["input_ids"]], 1)
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    said(cache, name, turn)
    assert cache.config == before and cache.report().preset == TEXT


@every_kind
def test_a_cache_that_was_saved_or_copied_goes_on_with_what_it_chose(kind: str, tmp_path: Path) -> None:
    name, make, *_ = KINDS[kind]
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), "auto", budget=0.4)
    said(cache, name, make())
    cache.save(tmp_path / "saved")
    others = [copy.deepcopy(cache), CompressedCache.load(model, tmp_path / "saved")]
    for other in others:
        assert other.config == cache.config and other.report() == cache.report()
    next_ids, logits = tiny.token_ids(len(make()["input_ids"]), 1, seed=8), []
    with torch.no_grad():
        for one in (cache, *others):
            logits.append(model(next_ids, **tiny.with_cache(one)).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    for one in others:
        one.reset()
        assert one.config == CompressionConfig.preset("auto", budget=0.4)


def test_a_saved_cache_that_has_seen_nothing_chooses_when_it_is_read_again(tmp_path: Path) -> None:
    model = tiny.model("llava_36")
    CompressedCache(model, "auto", budget=0.4, quantizer="quanto4").save(tmp_path / "empty")
    cache = CompressedCache.load(model, tmp_path / "empty")
    assert cache.config == CompressionConfig.preset("auto", budget=0.4, quantizer="quanto4")
    said(cache, "llava_36", tiny.inputs("llava_36", LONG, seed=1))
    assert cache.report().preset == IMAGE


def test_after_a_reset_another_prompt_decides() -> None:
    name = "llava_36"
    cache = CompressedCache(tiny.model(name), "auto", budget=0.4)
    for kind in ("text", "image", "text"):
        parts = [LONG, 0, 5] if kind == "image" else [LONG]
        own = CompressedCache(tiny.model(name), as_chosen(IMAGE if kind == "image" else TEXT, False))
        assert torch.equal(said(cache, name, tiny.prompt(name, parts, 4)), said(own, name, tiny.prompt(name, parts, 4)))
        assert told_apart(cache.report()) == told_apart(own.report())
        cache.reset()
        assert cache.config.auto and cache.report().preset is None


def test_a_call_that_is_refused_leaves_the_choice_open() -> None:
    name = "llava_36"
    model, cache = tiny.model(name), CompressedCache(tiny.model(name), "auto", budget=0.4)
    with pytest.raises(KVCompressError), torch.no_grad():
        model(**tiny.prompt(name, [LONG], 1), **tiny.with_cache(cache), output_attentions=True)
    with pytest.raises(ValueError, match="no_such_argument"):
        said(cache, name, tiny.prompt(name, [LONG], 1), no_such_argument=1)
    with torch.no_grad():
        model(**tiny.prompt(name, [LONG, 0], 1), **tiny.with_cache(cache))
    assert cache.report().preset == IMAGE


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize(
    "fields",
    [
        {"quantizer": "quanto4"},
        {"merger": "lookm"},
        {"reducer": "lightkv"},
        {"allocator": "prefix", "scorer": "attention"},
        {"evictor": "streaming"},
        {"scorer": None},
        {"budget": Budget(tokens=70, sink=2)},
        {"budget": 1.0, "evictor": None},
    ],
    ids=str,
)
def test_what_is_set_by_hand_goes_before_what_is_chosen(kind: str, fields: dict[str, Any]) -> None:
    cache = CompressedCache(tiny.model("llava_36"), "auto", **fields)
    said(cache, "llava_36", tiny.prompt("llava_36", [LONG, 0] if kind == "image" else [LONG], 1))
    assert not cache.config.auto
    for stage, given in fields.items():
        chosen = getattr(cache.config, stage)
        if stage != "budget":
            assert (given is None and chosen is None) or chosen.name == str(given).rstrip("4")
        elif isinstance(given, Budget):
            assert (chosen.tokens, chosen.sink) == (70, 2)
            assert chosen.recent == CompressionConfig.preset(cache.report().preset or "").budget.recent
        else:
            assert chosen.keeps_everything


def test_what_goes_with_nothing_that_could_be_chosen_is_refused_at_once() -> None:
    for fields, words in [
        ({"evictor": None}, "nothing could be evicted"),
        ({"budget": 1.5}, r"a fraction lies in \(0, 1\]"),
        ({"allocator": "prefix", "scorer": None}, "reads importance, but scorer is none"),
    ]:
        with pytest.raises(KVCompressError, match=words):
            CompressionConfig.preset("auto", **fields)


def test_it_is_a_value_that_says_what_was_set_alone() -> None:
    config = CompressionConfig.preset("auto", budget=0.3, merger="none")
    assert config.model_dump(mode="json") == {"auto": True, "budget": {"fraction": 0.3}, "merger": None}
    assert CompressionConfig(**config.model_dump()) == config == CompressionConfig.read(config.model_dump())
    assert config != CompressionConfig.preset("auto", budget=0.3)
    assert config.override(budget=0.5).model_dump()["budget"] == {"fraction": 0.5}
    assert "auto=True" in repr(config) and "allocator" not in repr(config)
    assert CompressionConfig.preset("auto", scorer=CompressionConfig.preset(TEXT).scorer) != CompressionConfig.preset(
        "auto"
    )
    assert "auto" not in CompressionConfig.preset("full").model_dump()


@pytest.mark.parametrize("budget", [0.2, 0.5, 7, "1MiB", Budget(fraction=0.3, sink=2)])
@pytest.mark.parametrize("prompt", [Prompt(LONG, False), Prompt(LONG, True), Prompt(9, False)], ids=str)
def test_a_budget_keeps_the_sinks_and_recents_of_what_is_chosen(prompt: Prompt, budget: Any) -> None:
    chosen = CompressionConfig.preset("auto", budget=budget).for_prompt(prompt)
    own = CompressionConfig.preset(chosen.preset).budget
    given = Budget.parse(budget)
    sink = 2 if isinstance(budget, Budget) else own.sink
    assert (chosen.config.budget.sink, chosen.config.budget.recent) == (sink, own.recent)
    for amount in ("fraction", "tokens", "bytes"):
        assert getattr(chosen.config.budget, amount) == getattr(given, amount)
    assert chosen.config.budget.whole == (SHORT if prompt.is_short and given.fraction else 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["budget=0.3"], {"budget": {"fraction": 0.3}}),
        (["budget.sink=2"], {"budget": {"fraction": 0.2, "sink": 2}}),
        (["budget.sink=2", "budget=64"], {"budget": {"tokens": 64, "sink": 2}}),
        (["evictor=none", "budget=1.0"], {"evictor": None, "budget": {"fraction": 1.0}}),
    ],
    ids=str,
)
def test_settings_on_the_command_line_are_laid_on_top(settings: list[str], expected: dict[str, Any]) -> None:
    assert read_config(None, None, None, settings).model_dump(mode="json") == {"auto": True, **expected}


def test_a_parameter_of_what_is_yet_to_be_chosen_is_refused() -> None:
    with pytest.raises(
        KVCompressError, match=r"scorer\.window: the preset auto chooses the scorer .* --set scorer=NAM"
    ):
        read_config(None, None, None, ["scorer.window=3"])


def test_whole_goes_with_a_fraction_alone() -> None:
    assert Budget(fraction=0.2, whole=9).whole == 9
    for amount in ({"tokens": 5}, {"bytes": "1MiB"}):
        with pytest.raises(KVCompressError, match="whole goes with a fraction"):
            Budget(**amount, whole=9)


def test_it_is_the_default_everywhere() -> None:
    for function, parameter in [
        (CompressedCache, "config"),
        (Document, "config"),
        (Chat, "config"),
        (compressing, "config"),
        (kvcompress.compressing, "config"),
    ]:
        assert inspect.signature(function).parameters[parameter].default == "auto"
    assert inspect.signature(evaluate).parameters["configs"].default == ("auto",)
    assert read_config(None, None, None, []) == CompressionConfig.preset("auto")
    document = Document(checkpoints.text_model(), checkpoints.text_tokenizer(), "the key is under the mat")
    assert document.report().preset == TEXT
    with compressing(tiny.model("llama")) as session:
        tiny.model("llama").generate(**tiny.inputs("llama", 20, seed=1), **HOW)
    assert session.config.auto and session.reports[0].preset == TEXT


# -- documents ---------------------------------------------------------------------------------------------------------

STORY = "The red key is under the green mat. The dog sleeps in the garden, and the cat is out. " * 2


def document(**fields: Any) -> Document:
    return Document(checkpoints.text_model(), checkpoints.text_tokenizer(), STORY, budget=0.4, **fields)


def test_a_document_of_text_is_repeated() -> None:
    """Nobody knows yet what will be asked; it is then what the preset makes of it."""
    chosen, named = document(), document(config="kvzip")
    note = chosen.report().notes[0]
    assert chosen.report().preset == "kvzip"
    assert note.startswith("auto chose kvzip: ") and "nobody knows yet what will be asked" in note
    assert told_apart(chosen.report()) == told_apart(named.report())
    assert chosen.ask("where is the key?", max_new_tokens=5) == named.ask("where is the key?", max_new_tokens=5)


@pytest.mark.parametrize(
    ("fields", "preset"),
    [
        ({"quantizer": "quanto4"}, "kvzip"),
        ({"scorer": "kvzip"}, "kvzip"),
        ({"scorer": "snapkv"}, TEXT),
        ({"allocator": "prefix"}, TEXT),
    ],
)
def test_a_document_is_repeated_where_nothing_else_was_set(fields: dict[str, Any], preset: str) -> None:
    assert document(**fields).report().preset == preset


@pytest.mark.parametrize("name", ["llama", "lfm2", *(name for name, family in FAMILIES.items() if family.axes > 1)])
def test_models_that_cannot_repeat_are_not_asked_to(name: str) -> None:
    cache = CompressedCache(tiny.model(name), "auto", budget=0.4)
    cache.choose_for_questions(tiny.inputs("llama", LONG, seed=1))
    assert cache.config.scorer.reconstructs == (name == "llama")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "llava_36"])
def test_documents_are_repeated_unless_they_are_short(name: str) -> None:
    for tokens, repeats in ((SHORT - tiny.image_tokens(name) * (name == "llava_36"), False), (LONG, True)):
        cache = CompressedCache(tiny.model(name), "auto", budget=0.4)
        cache.choose_for_questions(tiny.inputs(name, tokens, seed=1))
        assert cache.config.scorer.reconstructs == repeats  # type: ignore[union-attr]
