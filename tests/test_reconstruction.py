"""Scores by reconstruction: what the model looks at to repeat a prompt, against dense attention, and in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvcompress import Budget, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.cache.argument import cache_argument
from kvcompress.evaluation import evaluate
from kvcompress.evaluation.benchmark import benchmark
from kvcompress.evaluation.calibration import calibrate
from kvcompress.evaluation.captions import caption_images
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.tuning import Bound, tune
from kvcompress.policies.base import Scorer
from kvcompress.policies.scorers.kvzip import KVzip
from tests import tiny, type_checker
from tests.reference import Reference, held

BUDGET = Budget(tokens=12, sink=1, recent=2)
CONFIG = CompressionConfig(
    budget=BUDGET, scorer="kvzip", allocator="uniform", evictor={"name": "topk", "granularity": "head"}
)


class Tokenizer:
    """A token for every two letters; maybe with a chat template."""

    def __init__(self, template: bool = False) -> None:
        self.chat_template = "some" if template else None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [2 + (ord(a) + ord(b)) % 90 for a, b in zip(text[::2], text[1::2], strict=False)] or [7]}

    def apply_chat_template(self, turn: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return f"<user>{turn[0]['content']}<end><assistant>"


def fed(tokenizer: Tokenizer, ids: list[int], chunk: int) -> list[list[int]]:
    """What is said to have a row repeated, part by part."""
    words = {
        "whole": tokenizer("\n\nRepeat the previous context exactly.", False)["input_ids"],
        "part": tokenizer("\n\nRepeat the part of the previous context exactly, starting with ", False)["input_ids"],
        "answer": tokenizer("<end><assistant>" if tokenizer.chat_template else "\n", False)["input_ids"],
    }
    found = []
    for start in range(0, len(ids), chunk):
        request = [*words["part"], *ids[max(0, start - 8) : start]] if start else words["whole"]
        found.append([*request, *words["answer"], *ids[start : start + chunk]])
    return found


def highest(name: str, inputs: dict[str, Any], parts: list[list[int]], chunk: int) -> list[Tensor]:
    """The highest probability that a query of its own part gives each prompt token, `[kv_heads, tokens]` per layer.

    Shared among the first four tokens, the part, and what is fed to have it repeated.
    """
    tokens = inputs["input_ids"].shape[1]
    best: list[list[Tensor]] = [[], [], []]
    images = {key: value for key, value in inputs.items() if key == "pixel_values"}
    for number, part in enumerate(parts):
        dense, own = Reference(name), slice(number * chunk, min((number + 1) * chunk, tokens))
        dense.run(inputs, [])
        more = images if tiny.IMAGE_TOKEN in part else {}
        dense.run({"input_ids": torch.tensor([part]), **more}, [[[list(range(tokens))]]] * 3)
        for layer, module in enumerate(dense.layers):
            weights = module.weights[0].unflatten(0, (dense.kv_heads, -1)).flatten(1, 2)
            asked, first = weights[..., own], weights[..., : min(4, own.start)]
            among = asked.sum(-1) + first.sum(-1) + weights[..., tokens:].sum(-1)
            best[layer].append((asked / among.unsqueeze(-1)).amax(1))
    return [torch.cat(of_parts, 1) for of_parts in best]


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("chunk", [2048, 17, 40])
@pytest.mark.parametrize("name", ["llama", "llama_mha"])
def test_each_head_keeps_what_repeating_the_prompt_looks_at(name: str, chunk: int, template: bool) -> None:
    """By dense attention over the whole prompt, the request and the part; nothing of the repetition is kept."""
    inputs, tokenizer = tiny.inputs(name, 50, seed=4), Tokenizer(template)
    cache = CompressedCache(tiny.model(name), CONFIG)
    cache.score_by_reconstruction(tokenizer, inputs, chunk=chunk)
    best = highest(name, inputs, fed(tokenizer, inputs["input_ids"][0].tolist(), chunk), chunk)
    assert cache.report().tokens_seen == 50
    for layer, heads in enumerate(best):
        for head, scores in enumerate(heads.tolist()):
            loose = sorted(range(1, 48), key=lambda column: -scores[column])
            assert sorted(held(cache)[layer][0][head]) == sorted([0, 48, 49, *loose[:9]])
    dense = Reference(name)
    dense.run(inputs, [])
    dense.check_stored(cache)


def test_a_question_does_not_outdo_what_the_repetition_looked_at() -> None:
    """Of a second turn too a slot has the highest probability that any query gave it, by dense attention."""
    inputs, tokenizer = tiny.inputs("llama", 50, seed=4), Tokenizer()
    question = {"input_ids": tiny.inputs("llama", 7, seed=5)["input_ids"]}
    cache = CompressedCache(tiny.model("llama"), CONFIG)
    cache.score_by_reconstruction(tokenizer, inputs)
    best = highest("llama", inputs, fed(tokenizer, inputs["input_ids"][0].tolist(), 2048), 2048)
    before, dense = held(cache), Reference("llama")
    dense.run(inputs, [])
    dense.run(question, before)
    tiny.model("llama")(**question, **cache_argument(cache))
    lost = 0
    for layer, module in enumerate(dense.layers):
        weights = module.weights[0].unflatten(0, (dense.kv_heads, -1)).flatten(1, 2).amax(1)
        for head, asked in enumerate(weights.tolist()):
            scores = [max(one, other) for one, other in zip(asked, best[layer][head].tolist() + [0.0] * 7, strict=True)]
            there = {*before[layer][0][head], *range(50, 57)}
            loose = sorted(there - {0, 55, 56}, key=lambda column: -scores[column])
            assert sorted(held(cache)[layer][0][head]) == sorted([0, 55, 56, *loose[:9]])
            by_question = sorted(there - {0, 55, 56}, key=lambda column: -asked[column])
            lost += set(loose[:9]) != set(by_question[:9])
    assert lost  # so that the question alone would have chosen otherwise


class Whole(KVzip):
    """Scores all that it is shown, whatever part is asked about."""

    name: ClassVar[str] = "whole"
    score_part = Scorer.score_part


def test_a_scorer_need_not_know_of_parts() -> None:
    """One that only says how it scores slots is shown a layer that holds what is near the part, and keeps the same."""
    inputs, kept = tiny.inputs("llama", 50, seed=4), []
    for scorer in (KVzip(), Whole()):
        cache = CompressedCache(tiny.model("llama"), CONFIG, scorer=scorer)
        cache.score_by_reconstruction(Tokenizer(), inputs, chunk=17)
        kept.append(held(cache))
    assert kept[0] == kept[1]


def test_an_image_is_repeated_with_its_pixels() -> None:
    inputs, tokenizer = tiny.inputs("llava_36", 12, seed=5), Tokenizer()
    cache = CompressedCache(tiny.model("llava_36"), CONFIG)
    cache.score_by_reconstruction(tokenizer, inputs, chunk=5)
    ids = inputs["input_ids"][0].tolist()
    best = highest("llava_36", inputs, fed(tokenizer, ids, len(ids)), len(ids))
    for layer, heads in enumerate(best):
        for head, scores in enumerate(heads.tolist()):
            loose = sorted(range(1, len(ids) - 2), key=lambda column: -scores[column])
            assert sorted(held(cache)[layer][0][head]) == sorted([0, len(ids) - 2, len(ids) - 1, *loose[:9]])


@pytest.mark.parametrize("left", [True, False])
def test_a_row_of_a_padded_batch_is_scored_as_alone(left: bool) -> None:
    """Parts are cut from each row's own first token on; then rows go on with a question of their own."""
    model, lengths = tiny.model("llama"), [50, 21, 38]
    rows = [tiny.token_ids(1, length, seed=length)[0] for length in lengths]
    ids, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(50 - len(own), 50) if left else slice(0, len(own))
        ids[row, place], mask[row, place] = own, 1
    batch = CompressedCache(model, CONFIG)
    batch.score_by_reconstruction(Tokenizer(), {"input_ids": ids, "attention_mask": mask}, chunk=16)
    question = tiny.token_ids(3, 4, seed=9)
    mask = torch.cat([mask, torch.ones_like(question)], 1)
    positions = (mask.cumsum(1) - 1)[:, -4:]
    with torch.no_grad():
        logits = model(question, attention_mask=mask, position_ids=positions, **tiny.with_cache(batch)).logits
    for row, own in enumerate(rows):
        alone = CompressedCache(model, CONFIG)
        alone.score_by_reconstruction(Tokenizer(), {"input_ids": own[None]}, chunk=16)
        with torch.no_grad():
            wanted = model(question[row : row + 1], **tiny.with_cache(alone)).logits
        torch.testing.assert_close(logits[row : row + 1], wanted, rtol=0, atol=2e-5)


def test_many_questions_are_asked_of_copies_of_one_document() -> None:
    """Through `generate`, with the whole conversation's ids, as after any prompt."""
    model, document = tiny.model("llama"), tiny.inputs("llama", 60, seed=6)
    cache = CompressedCache(model, CONFIG, budget=0.3)
    cache.score_by_reconstruction(Tokenizer(), document)
    before = held(cache)
    for seed in (1, 2):
        twin = copy.deepcopy(cache)
        ids = torch.cat([document["input_ids"], tiny.token_ids(1, 5, seed)], 1)
        model.generate(ids, attention_mask=torch.ones_like(ids), **tiny.with_cache(twin), max_new_tokens=6)
        assert twin.report().retention <= 0.3
        assert twin.report().tokens_seen == 70
    assert held(cache) == before


def test_rows_of_different_lengths_are_refused_where_padding_between_would_count() -> None:
    """In windows; rows of one length are repeated as they are alone."""
    model, inputs = tiny.model("gemma2"), tiny.inputs("gemma2", 40, seed=2, batch=2)
    short = {**inputs, "attention_mask": (torch.arange(40) >= torch.tensor([[0], [9]])).long()}
    cache = CompressedCache(model, CONFIG)
    with pytest.raises(KVCompressError, match=r"attention_mask: rows of different lengths .*; repeat them one by one"):
        cache.score_by_reconstruction(Tokenizer(), short)
    assert not cache.is_initialized
    cache.score_by_reconstruction(Tokenizer(), inputs)
    for row in range(2):
        alone = CompressedCache(model, CONFIG)
        alone.score_by_reconstruction(Tokenizer(), {name: given[row : row + 1] for name, given in inputs.items()})
        found, wanted = (one.report().held_positions for one in (cache, alone))
        assert [layer[row] for layer in found if layer] == [layer[0] for layer in wanted if layer]


def test_an_image_that_is_repeated_cannot_be_reduced() -> None:
    cache = CompressedCache(tiny.model("llava_36"), CONFIG, reducer="fastv")
    with pytest.raises(KVCompressError, match=r"reducer fastv: an image that is repeated .*; choose reducer=None"):
        cache.score_by_reconstruction(Tokenizer(), tiny.inputs("llava_36", 20, seed=1))
    assert not cache.is_initialized
    cache.score_by_reconstruction(Tokenizer(), {"input_ids": tiny.token_ids(1, 20, seed=1)})


@pytest.mark.parametrize(
    ("fields", "inputs", "options", "says"),
    [
        ({"scorer": "snapkv"}, {}, {}, "scorer snapkv: score_by_reconstruction wants .*scorer='kvzip'"),
        ({"allocator": "sparsity"}, {}, {}, "allocator sparsity: reads statistics .*choose another"),
        ({}, {"input_ids": None}, {}, "inputs: must hold input_ids.*; got None"),
        ({}, {"input_ids": torch.ones(1, 20)}, {}, r"inputs: must hold input_ids.*; got torch.float32 of \(1, 20\)"),
        ({}, {"input_ids": torch.ones(20).long()}, {}, r"inputs: must hold input_ids.*; got torch.int64 of \(20,\)"),
        (
            {},
            {"input_ids": torch.ones(0, 20).long()},
            {},
            r"inputs: must hold input_ids.*; got torch.int64 of \(0, 20\)",
        ),
        ({}, {"attention_mask": torch.zeros(1, 20)}, {}, "attention_mask: all rows are padding alone"),
        (
            {},
            {"attention_mask": torch.ones(20)},
            {},
            r"attention_mask: must be .*\(1, 20\).*; got torch.float32 of \(20,\)",
        ),
        ({}, {"attention_mask": torch.ones(1, 19).bool()}, {}, r"attention_mask: .*; got torch.bool of \(1, 19\)"),
        (
            {},
            {"attention_mask": torch.ones(1, 1, 20, 20)},
            {},
            r"attention_mask: .*; got torch.float32 of \(1, 1, 20, 20\)",
        ),
        ({}, {"attention_mask": [[1] * 20]}, {}, "attention_mask: must be .*; got "),
        ({}, {}, {"inputs": "a text"}, "inputs: must hold input_ids.*; got 'a text'"),
        ({}, {}, {"inputs": None}, "inputs: must hold input_ids.*; got None"),
        ({}, {}, {"chunk": 0}, "chunk: .*at least 1; got 0"),
        ({}, {}, {"chunk": "a"}, "chunk: .*at least 1; got 'a'"),
        ({}, {}, {"chunk": 2.5}, "chunk: .*at least 1; got 2.5"),
        ({}, {}, {"chunk": True}, "chunk: .*at least 1; got True"),
        ({}, {}, {"chunk": None}, "chunk: .*at least 1; got None"),
        ({}, {}, {"tokenizer": None}, "tokenizer: must be the model's, .*; got None"),
        ({}, {}, {"tokenizer": "gpt2"}, "tokenizer: must be the model's, .*; got 'gpt2'"),
    ],
)
def test_wrong_uses_are_refused_before_anything_is_read(
    fields: dict[str, Any], inputs: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    cache = CompressedCache(tiny.model("llama"), CONFIG, **fields)
    prompt = {**tiny.inputs("llama", 20, seed=1), **inputs}
    with type_checker.off(), pytest.raises(KVCompressError, match=says):
        cache.score_by_reconstruction(**{"tokenizer": Tokenizer(), "inputs": prompt, **options})
    assert not cache.is_initialized


def test_a_cache_that_has_seen_tokens_is_refused_and_one_that_failed_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, seed=1)
    cache = CompressedCache(model, CONFIG)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no such tokenizer")

    with pytest.raises(OSError, match="no such tokenizer"):
        cache.score_by_reconstruction(broken, inputs)
    assert not cache.is_initialized
    with monkeypatch.context() as late, pytest.raises(OSError, match="no such tokenizer"):
        late.setattr("kvcompress.cache.undoing.compress", broken)  # the last thing that is done
        cache.score_by_reconstruction(Tokenizer(), inputs)
    assert not cache.is_initialized
    cache.score_by_reconstruction(Tokenizer(), inputs)
    with pytest.raises(KVCompressError, match=r"reads the prompt itself, into an empty cache; this one has seen 20"):
        cache.score_by_reconstruction(Tokenizer(), inputs)
    assert cache.report().tokens_seen == 20


ANY = object.__new__(LoadedModel)
SAMPLES = [Sample("one", "where is the key?", "under the mat")]
KVZIP = CompressionConfig.preset("kvzip")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: evaluate(ANY, SAMPLES, ["kvzip"]), r"kvzip @ .*question: seen\) does not do; take question: unseen"),
        (lambda: tune(ANY, SAMPLES, {"kvzip": KVZIP}, [Bound("exact", 1.0)]), "kvzip: .*take question: unseen"),
        (lambda: next(benchmark(ANY, [("kvzip", KVZIP)])), "kvzip: .*a benchmark does not do; time cache.score_by"),
        (lambda: calibrate(ANY, KVZIP, SAMPLES), "config: .*calibration does not do"),
        (lambda: caption_images(ANY, [], "what is it?", KVZIP, 4), "config: .*captioning does not do; .*Document"),
    ],
    ids=["evaluate", "tune", "bench", "calibrate", "captions"],
)
def test_who_reads_prompts_once_refuses_a_scorer_that_wants_a_repetition(use: Callable[[], Any], says: str) -> None:
    """Before the model is asked for anything, which has nothing in it here."""
    with pytest.raises(KVCompressError, match=rf"{says}.*or choose another scorer"):
        use()
