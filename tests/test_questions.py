"""Questions seen and unseen: a context is compressed once, before what is asked about it, and results say which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcompress import CompressionConfig
from kvcompress.cli import app
from kvcompress.errors import ConfigError
from kvcompress.evaluation import LoadedModel, evaluate, load_model, plots, read_results, results
from kvcompress.evaluation.data import Asker, Sample, answer_ids, asking, data_hash, encode_sample, load_samples
from kvcompress.evaluation.results import samples_path, without_timings
from kvcompress.evaluation.tuning import Bound, tune
from kvcompress.reuse import Document
from tests import checkpoints

CONTEXT = "The red key is under the green mat. The dog sleeps in the garden."
ASKED = [("Where is the key?", "under the mat"), ("Who sleeps?", "the dog"), ("Where?", "in the garden")]
PRESETS = ("full", "prefixkv+int4", "snapkv", "kvzip")


def about(context: str, number: int = 0) -> list[Sample]:
    return [
        Sample(f"{number}-{index}", f"{context}\n\n{question}", answer, context=context)
        for index, (question, answer) in enumerate(ASKED)
    ]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_text(tmp_path_factory.mktemp("plain"), None)))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_image(tmp_path_factory.mktemp("image"))))


def seeing(loaded: LoadedModel, *, text: bool) -> list[Sample]:
    from PIL import Image

    if not loaded.sees_images:
        return about(CONTEXT)
    picture = Image.effect_noise((8, 8), 90).convert("RGB")
    samples = [replace(sample, picture=picture) for sample in about(CONTEXT)]
    return samples if text else [replace(sample, prompt=sample.question, context=None) for sample in samples]


def texts(output: Path, cell: str) -> list[str]:
    return [one["text"] for one in results.read_samples(output) if one["cell"] == cell]


# -- one copy, asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text_model", "plain_model", "image_model"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_unseen_question_is_answered_as_a_document_answers_it(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, preset: str
) -> None:
    loaded: LoadedModel = request.getfixturevalue(kind)
    samples = seeing(loaded, text=True)
    config = CompressionConfig.preset(preset) if preset == "full" else CompressionConfig.preset(preset, budget=0.4)
    output = tmp_path / "grid.jsonl"
    evaluate(loaded, samples, {"c": config}, metrics=["rouge1"], question="unseen", output=output, max_new_tokens=6)
    images = [] if samples[0].picture is None else [samples[0].picture]
    reader = loaded.processor or loaded.tokenizer
    document = Document(loaded.model, reader, CONTEXT, images=images, config=config)
    wanted = [document.ask(question, max_new_tokens=6) for question, _ in ASKED]
    assert texts(output, read_results(output)[1]["cell"]) == wanted


@pytest.mark.parametrize(("kind", "text"), [("text_model", True), ("image_model", True), ("image_model", False)])
def test_with_everything_kept_it_is_the_same_whether_a_question_was_seen(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, text: bool
) -> None:
    loaded: LoadedModel = request.getfixturevalue(kind)
    samples = seeing(loaded, text=text)
    found: dict[str, list[Any]] = {}
    for mode in ("seen", "unseen"):
        output = tmp_path / f"{mode}.jsonl"
        evaluate(
            loaded, samples, ["full"], metrics=["perplexity", "rougeL"], question=mode, output=output, max_new_tokens=4
        )  # type: ignore[arg-type]
        found[mode] = results.read_samples(output)
    for seen, unseen in zip(found["seen"], found["unseen"], strict=True):
        assert seen["text"] == unseen["text"] and seen["prompt_tokens"] == unseen["prompt_tokens"]
        assert seen["nll"] == pytest.approx(unseen["nll"], abs=1e-4)


def test_questions_on_one_context_are_asked_from_one_compressed_copy(
    text_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str | None] = []

    class Counted(Document):
        def __init__(self, model: Any, processor: Any, text: str | None = None, **given: Any) -> None:
            read.append(text)
            super().__init__(model, processor, text, **given)

    monkeypatch.setattr(asking, "Document", Counted)
    other = CONTEXT.replace("red", "blue")
    samples = [*about(CONTEXT), *about(other, 1)]
    configs = {name: CompressionConfig.preset(name, budget=0.5) for name in ("prefixkv", "snapkv")}
    wanted: dict[str, Any] = {"metrics": ["perplexity", "contained"], "question": "unseen", "max_new_tokens": 2}
    rows = evaluate(text_model, samples, configs, **wanted)
    assert read == [CONTEXT, other] * 2
    mixed = [sample for pair in zip(about(CONTEXT), about(other, 1), strict=True) for sample in pair]
    again = evaluate(text_model, mixed, configs, **wanted)
    for one, two in zip(rows, again, strict=True):
        assert one["metrics"]["perplexity"]["value"] == pytest.approx(two["metrics"]["perplexity"]["value"])


@pytest.mark.parametrize("change", ["context", "picture", "config"])
def test_a_copy_is_kept_for_its_own_context_image_and_configuration_alone(
    image_model: LoadedModel, change: str
) -> None:
    first, *_ = seeing(image_model, text=True)
    second, config = first, CompressionConfig.preset("streaming", budget=0.5)
    other = config
    if change == "context":
        second = about(CONTEXT.replace("red", "blue"))[0]
        second = replace(second, picture=first.picture)
    elif change == "picture":
        second = replace(first, picture=first.picture.transpose(0))  # type: ignore[union-attr]
    else:
        other = CompressionConfig.preset("streaming", budget=0.3)
    asker = Asker()
    _, before = asker.ask(image_model, first, config)
    _, found = asker.ask(image_model, second, other)
    _, alone = Asker().ask(image_model, second, other)
    pairs = list(zip(found, alone, strict=True))
    assert all(a.equal(b) for one, two in pairs for a, b in zip(one, two, strict=True))
    assert any(a.shape != b.shape or not a.equal(b) for one, two in zip(found, before, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip


# -- which it was ------------------------------------------------------------------------------------------------------


def test_rows_tables_and_pictures_say_whether_a_question_was_seen(text_model: LoadedModel, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    questions = [{"question": question, "answer": answer} for question, answer in ASKED]
    data.write_text(json.dumps({"context": CONTEXT, "questions": questions}) + "\n")
    given = ["evaluate", "--model", text_model.name, "--data", str(data), "--preset", "streaming", "--budget", "0.5"]
    rows: list[dict[str, Any]] = []
    for mode in ("seen", "unseen"):
        command = [*given, "--metric", "contained", "--max-new-tokens", "2", "--question", mode]
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0 and f"question {mode}" in shown.stdout
        found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["results"]
        assert {row["question"] for row in found} == {mode}
        label = plots.plot_results(found)["contained"].axes[0].get_ylabel()
        assert ("question unseen" in label) == (mode == "unseen")
        rows += found
    assert {name for name in plots.plot_results(rows) if name.startswith("contained")} == {
        f"contained-{''.join(c if c.isalnum() or c in '._+' else '-' for c in name).strip('-')}"
        for name in [
            f"{text_model.name.strip('/')}-{str(data).strip('/')}-question-{mode}" for mode in ("seen", "unseen")
        ]
    }


def test_a_results_file_goes_on_with_questions_asked_the_same_way_alone(
    text_model: LoadedModel, tmp_path: Path
) -> None:
    output = tmp_path / "grid.jsonl"
    wanted: dict[str, Any] = {"metrics": ["perplexity"], "output": output}
    first = evaluate(text_model, about(CONTEXT), ["streaming"], **wanted)
    with pytest.raises(ConfigError, match='question was "seen", is "unseen"'):
        evaluate(text_model, about(CONTEXT), ["streaming"], question="unseen", **wanted)
    lines = samples_path(output).read_text().splitlines()
    run = json.loads(lines[0])
    del run["run"]["question"]  # as files were before
    samples_path(output).write_text("\n".join([json.dumps(run), *lines[1:]]) + "\n")
    again = evaluate(text_model, about(CONTEXT), ["streaming"], **wanted)
    assert [without_timings(row) for row in again] == [without_timings(row) for row in first]


def test_tuning_asks_as_it_is_told(text_model: LoadedModel) -> None:
    config = {"streaming": CompressionConfig.preset("streaming")}
    found = tune(text_model, about(CONTEXT), config, [Bound("perplexity", 9e9)], step=0.5, question="unseen")
    assert {row["question"] for row in (found.full, *(trial.row for trial in found.trials))} == {"unseen"}


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_a_question_without_a_context_cannot_be_unseen(command: str, text_model: LoadedModel) -> None:
    with pytest.raises(
        ConfigError, match=r"sample '1' has neither a 'context' nor an image; give it one, or take seen"
    ):
        evaluate(text_model, [*about(CONTEXT), Sample("1", "Why?", "Because")], [], question="unseen")
    with pytest.raises(ConfigError, match="question: must be seen or unseen; got 'blind'"):
        asking.check_mode("blind", about(CONTEXT))
    bounds = ["--max-ppl-increase", "2%"] if command == "tune" else []
    result = CliRunner().invoke(app, [command, "--model", "nowhere", "--question", "unseen", *bounds])
    assert result.exit_code == 1 and "has neither a 'context' nor an image" in result.stderr


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_may_hold_several_questions_on_one_context(tmp_path: Path) -> None:
    record = {
        "id": "a",
        "context": "Rome.",
        "kind": "city",
        "questions": [
            {"question": "Where?", "answer": "Italy"},
            {"prompt": "Why?", "answer": 1, "kind": "why", "id": "b", "answer_prefix": " Since ", "max_new_tokens": 5},
        ],
    }
    wanted = [
        Sample("a-0", "Rome.\n\nWhere?", "Italy", kind="city", context="Rome."),
        Sample("b", "Rome.\n\nWhy?", "1", None, None, "why", None, "Rome.", "Since", 5),
    ]
    for name, content in (("a.jsonl", record), ("a.json", [record]), ("b.json", {"x": record})):
        (tmp_path / name).write_text(json.dumps(content))
        assert load_samples(str(tmp_path / name)) == wanted
    assert [sample.question for sample in wanted] == ["Where?", "Why?"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"questions": []}, "'questions' must be a list of objects"),
        ({"questions": ["Why?"]}, "'questions' must be a list of objects"),
        ({"questions": [{"question": "a"}], "answer": "b"}, "unknown field 'answer'; known: questions, context"),
        ({"questions": [{"question": "a", "context": "b"}]}, "question 0: unknown field 'context'"),
        ({"questions": [{"question": "a"}, {"answer": "b"}]}, "question 1: must have 'question'"),
        ({"questions": [{"question": "a", "max_new_tokens": 0}]}, "'max_new_tokens' must be a whole number from 1"),
        ({"question": "a", "answer_prefix": 1}, "'answer_prefix' must be a text; got int"),
    ],
)
def test_what_is_no_list_of_questions_is_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"context": "Rome.", **fields}]))
    with pytest.raises(ConfigError, match=f"entry 0.*{says}"):
        load_samples(str(tmp_path / "a.json"))


def test_a_prompt_begins_with_its_context_and_goes_on() -> None:
    for prompt in ("Why? Rome.", "Rome.", "Rome.\n\n"):
        with pytest.raises(ConfigError, match="sample 'a': its prompt must begin with its context"):
            Sample("a", prompt, None, context="Rome.")


def test_a_hash_of_data_knows_contexts_prefixes_and_limits() -> None:
    one = Sample("a", "Rome.\n\nWhy?\n\nSo?", "b")
    others = [replace(one, **given) for given in (
        {}, {"context": "Rome."}, {"context": "Rome.\n\nWhy?"}, {"answer_prefix": "c"}, {"max_new_tokens": 1}
    )]  # fmt: skip
    assert len({data_hash([each]) for each in others}) == len(others)


# -- the beginning of an answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ends"), [("text_model", "A:It is"), ("plain_model", "? It is")])
@pytest.mark.parametrize("mode", ["seen", "unseen"])
def test_the_beginning_of_an_answer_is_the_end_of_what_a_model_reads(
    request: pytest.FixtureRequest, kind: str, ends: str, mode: str
) -> None:
    loaded: LoadedModel = request.getfixturevalue(kind)
    sample = replace(about(CONTEXT)[0], answer_prefix="It is")
    inputs = encode_sample(loaded, sample) if mode == "seen" else Asker().ask(loaded, sample, None)[0]
    assert str(loaded.tokenizer.decode(inputs["input_ids"][0])).endswith(ends)
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    assert loaded.tokenizer.decode(answer_ids(loaded, sample)[0]) == " under the mat"


@pytest.mark.parametrize("mode", ["seen", "unseen"])
def test_a_question_may_have_its_own_limit_on_its_answer(text_model: LoadedModel, tmp_path: Path, mode: Any) -> None:
    first, second, third = about(CONTEXT)
    samples = [replace(first, max_new_tokens=2), second, replace(third, max_new_tokens=7)]
    output = tmp_path / "grid.jsonl"
    evaluate(text_model, samples, [], metrics=["rouge1"], max_new_tokens=4, question=mode, output=output)
    assert [one["new_tokens"] for one in results.read_samples(output)] == [2, 4, 7]
