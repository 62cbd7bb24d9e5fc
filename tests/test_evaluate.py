"""Evaluation: metrics are what their definitions say, a kill loses nothing, and what is wrong is said in one line."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import DynamicCache
from typer.testing import CliRunner, Result

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cli import app
from kvcompress.cli.grid import duration, progress_line, results_table
from kvcompress.errors import BudgetError, BudgetWarning, ConfigError, UnsupportedModelError
from kvcompress.evaluation import LoadedModel, Progress, evaluate, load_model, read_results, read_samples, results
from kvcompress.evaluation.bootstrap import median_interval, ratio_interval
from kvcompress.evaluation.data import Sample, answer_ids, encode_sample, load_samples
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.grid import FULL_CACHE, Cell, cells_of
from kvcompress.evaluation.likelihood import read_answer
from kvcompress.evaluation.metrics import METRICS
from kvcompress.evaluation.results import samples_path, without_timings
from tests import checkpoints, forks, tiny

QUESTIONS = [
    Sample("fox", "What does the quick brown fox jump over?", "A lazy dog."),
    Sample("liquor", "What should be packed, and how many?", "Five jugs."),
    Sample("sphinx", "Whom is one asked to judge?", "A sphinx, my vow."),
]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text_model(text_folder: Path) -> LoadedModel:
    return load_model(str(text_folder))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_image(tmp_path_factory.mktemp("image"))))


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def questions_file(path: Path) -> Path:
    lines = [{"id": each.name, "question": each.prompt, "answer": each.answer} for each in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


# -- metrics -----------------------------------------------------------------------------------------------------------


def transformers_loss(loaded: LoadedModel, sample: Sample) -> tuple[float, int]:
    """The model's own loss on the answer, in one forward without any cache."""
    inputs, answer = encode_sample(loaded, sample), answer_ids(loaded, sample)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return float(loaded.model(input_ids=ids, labels=labels, use_cache=False, **rest).loss), answer.shape[1]


@pytest.mark.parametrize("config", [None, "full", "prefixkv"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_perplexity_with_everything_kept_is_that_of_transformers_own_loss(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, config: str | None
) -> None:
    loaded: LoadedModel = request.getfixturevalue(f"{kind}_model")
    samples = QUESTIONS
    if kind == "image":
        samples = [
            replace(sample, image=picture(tmp_path / f"{index}.png", (60 * index, 90, 200)))
            for index, sample in enumerate(QUESTIONS)
        ]
    losses = [transformers_loss(loaded, sample) for sample in samples]
    expected = math.exp(sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses))
    budgets = [1.0] if config is not None else []
    rows = evaluate(loaded, samples, [] if config is None else [config], budgets=budgets, metrics=["perplexity"])
    assert rows[-1]["metrics"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    for record, (loss, tokens) in zip(samples, losses, strict=True):
        reading = read_answer(loaded, encode_sample(loaded, record), answer_ids(loaded, record), None)
        assert reading.tokens == tokens and reading.nll / tokens == pytest.approx(loss, abs=1e-4)


def test_perplexity_of_a_compressed_cache_is_that_of_what_each_step_still_holds(text_model: LoadedModel) -> None:
    config = CompressionConfig.preset("prefixkv", budget=0.3)
    sample = QUESTIONS[0]
    inputs, answer = encode_sample(text_model, sample), answer_ids(text_model, sample)
    prompt = inputs["input_ids"].shape[1]
    cache, nats, held = CompressedCache(text_model.model, config), 0.0, []
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    with torch.no_grad():
        for position in range(prompt, ids.shape[1]):
            start = 0 if position == prompt else position - 1
            logits = text_model.model(ids[:, start:position], **tiny.with_cache(cache)).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[ids[0, position]])
            held.append(cache.report().retention)
    reading = read_answer(text_model, inputs, answer, config)
    assert reading.nll == pytest.approx(nats, rel=1e-5) and max(held) <= 0.3
    assert reading.report.retention == held[-1]
    full = read_answer(text_model, inputs, answer, None)
    assert abs(full.nll - reading.nll) > 1e-2  # so that the budget is seen to matter


def test_rouge_of_the_full_cache_against_itself_is_one(text_model: LoadedModel) -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    full, same, cut = evaluate(
        text_model,
        QUESTIONS,
        {"full": "full", "cut": {"budget": 0.1, "scorer": "attention"}},
        metrics=names,
        max_new_tokens=24,
    )
    for name in names:
        wanted = {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}
        assert full["metrics"][name] == wanted and same["metrics"][name] == wanted
        assert 0 <= cut["metrics"][name]["value"] < 1


@pytest.mark.parametrize(
    ("name", "text", "full", "expected"),
    [
        ("rouge1", "the cat sat", "the cat ran", 2 / 3),
        ("rouge2", "the cat sat", "the cat ran", 1 / 2),
        ("rougeL", "sat cat the", "the cat ran", 1 / 3),
        ("rouge1", "sat cat the", "the cat ran", 2 / 3),
        ("rouge1", "a b c d", "a b", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("rougeL", "", "the cat", 0.0),
        ("rougeL", "", "", 1.0),
        ("rougeL", "猫", "猫", 1.0),
    ],
)
def test_rouge_counts_shared_words_pairs_and_subsequences(name: str, text: str, full: str, expected: float) -> None:
    score = METRICS[name].score
    assert score is not None and score(text, full, "") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer", "exact", "contained", "recall"),
    [
        ("A Red  box.", "red box", 1, 1, 0),
        ("It is a red box", "the red box", 0, 1, 0),
        ("It is a red box", "red boxes", 0, 0, 0),
        ("redbox", "red", 0, 0, 1),
        ("x = -1 or x = -5", "-1<AND>-5", 0, 1, 1),
        ("x = -1", "-1<AND>-5", 0, 0, 0.5),
        ("x = 1", "-1", 0, 0, 0),
        ("-1", "1", 0, 0, 1),
        ("b", "a cat<OR>b", 1, 1, 0),
        ("x and z", "x<AND>y<OR>z", 0, 1, 0.5),
        ("x y", "x<AND>y<OR>z", 1, 1, 0.5),
        ("y", "x<AND>y<OR>z", 0, 0, 0),
        ("1,000 people", "1000", 0, 1, 0),
        ("3.5", "35", 0, 0, 0),
        ("anything", "?", 0, 0, 0),
        ("A", "a", 1, 1, 1),
        ("", "a", 0, 0, 0),
    ],
)
def test_answers_are_exact_or_contained_as_the_field_counts_them(
    text: str, answer: str, exact: float, contained: float, recall: float
) -> None:
    found = [METRICS[name].score(text, "", answer) for name in ("exact", "contained", "recall")]  # type: ignore[misc]
    assert found == [exact, contained, recall]


@pytest.mark.parametrize(
    ("text", "answer", "share"),
    [
        ("1 and 3", "1<AND>2<AND>3<AND>4", 0.5),
        ("It is Gandhi.", "Mohandas Gandhi<OR>gandhi", 1),
        ("nobody", "Mohandas Gandhi<OR>gandhi", 0),
        ("x and z", "x<AND>y<OR>z", 1),
    ],
)
def test_a_string_match_wants_all_parts_and_one_choice_of_each(text: str, answer: str, share: float) -> None:
    assert METRICS["string_match"].score(text, "", answer) == share  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 1),
        ("one two three", 1),
        ("one two three four five", 1),
        ("go on. " * 6, 3 / 15),
        ("* " * 40, 1 / 37),
        ("No No no no no", 1 / 2),
        ("猫 犬 鳥 魚 " * 3, 4 / 9),
    ],
)
def test_what_is_distinct_is_the_share_of_runs_of_four_words_or_signs_that_come_once(text: str, share: float) -> None:
    assert METRICS["distinct"].score(text, "", "") == pytest.approx(share)  # type: ignore[misc]


def test_every_metric_tells_its_source() -> None:
    for name, metric in METRICS.items():
        if metric.score is not None:
            told = metric.score.__doc__ or ""
            assert "Source:" in told or "otherwise like `rouge1`" in told, name


def test_an_interval_holds_the_value_follows_the_seed_and_is_as_wide_as_statistics_say() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(5, 2, size=400).tolist()
    mean, low, high = ratio_interval(values, [1] * 400, seed=1)
    assert mean == pytest.approx(np.mean(values)) and low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / 20, rel=0.15)
    assert ratio_interval(values, [1] * 400, seed=1) == (mean, low, high) != ratio_interval(values, [1] * 400, seed=2)
    median, below, above = median_interval(values)
    assert median == np.median(values) and below < median < above
    assert ratio_interval([6.0, 2.0], [3, 1])[0] == 2.0  # sums, not a mean of shares
    assert ratio_interval([3.0], [1]) == (3.0, 3.0, 3.0)


# -- grid --------------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_full_cache_and_every_configuration_at_every_budget(tmp_path: Path) -> None:
    CompressionConfig.preset("uniform").dump(tmp_path / "mine.yaml")
    cells = cells_of(["prefixkv", tmp_path / "mine.yaml", "kivi4"], [0.5, 64])
    assert [(cell.policy, cell.unit, cell.budget) for cell in cells] == [
        (FULL_CACHE, "fraction", 1.0),
        ("prefixkv", "fraction", 0.5),
        ("prefixkv", "tokens", 64),
        ("mine", "fraction", 0.5),
        ("mine", "tokens", 64),
        ("kivi4", "fraction", 1.0),
    ]
    assert [cell.budget for cell in cells_of({"own": "prefixkv"})] == [1.0, 0.2]
    assert cells_of(["prefixkv"], ["1MiB"])[1].budget == 1048576
    with pytest.raises(ConfigError, match=r"'prefixkv @ fraction 0\.5' is there twice"):
        cells_of(["prefixkv"], [0.5, 0.5])
    with pytest.raises(BudgetError):
        cells_of(["prefixkv"], [1.5])


def test_a_row_tells_what_ran_and_what_it_gave(text_model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "deep/grid.jsonl"
    metrics = ["perplexity", "rougeL", "contained"]
    rows = evaluate(
        text_model, QUESTIONS, ["prefixkv"], budgets=[0.3], metrics=metrics, output=path, max_new_tokens=9, seed=4
    )
    assert read_results(path) == rows == json.loads(json.dumps(rows))
    row = rows[1]
    assert (row["policy"], row["budget"], row["samples"], row["skipped"]) == ("prefixkv", 0.3, 3, 0)
    assert (row["model"], row["dtype"], row["data"], row["seed"]) == (text_model.name, "float32", "samples", 4)
    assert row["config"] == CompressionConfig.preset("prefixkv", budget=0.3).model_dump(mode="json")
    assert set(row["versions"]) == {"kvcompress", "torch", "transformers", "python"} and len(row["data_hash"]) == 64
    records = [record for record in read_samples(path) if record["cell"] == row["cell"]]
    assert [record["sample"] for record in records] == ["fox", "liquor", "sphinx"]
    for record, sample in zip(records, QUESTIONS, strict=True):
        prompt = encode_sample(text_model, sample)["input_ids"].shape[1]
        assert record["new_tokens"] == 9 and record["full_kv_bytes"] == (prompt + 8) * 3 * 2 * 2 * 8 * 4
        assert record["retention"] <= 0.3 and record["answer_tokens"] == len(f"{sample.answer}")
    assert row["retention"] == pytest.approx(np.mean([record["retention"] for record in records]))
    assert row["kv_bytes"] == pytest.approx(np.mean([record["kv_bytes"] for record in records]))
    nats, tokens = (sum(record[name] for record in records) for name in ("nll", "answer_tokens"))
    assert row["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens))
    for metric in row["metrics"].values():
        assert metric["ci_low"] <= metric["value"] <= metric["ci_high"]
    assert row["seconds_to_first_token"] > 0 and row["tokens_per_second"] > 0
    if sys.platform == "linux":
        assert row["peak_bytes"] > row["full_kv_bytes"]


def test_kinds_of_samples_are_told_apart(text_model: LoadedModel) -> None:
    samples = [replace(QUESTIONS[0], kind="a"), replace(QUESTIONS[1], kind="b"), replace(QUESTIONS[2], kind="b")]
    row = evaluate(text_model, samples, [], metrics=["perplexity"])[0]
    alone = evaluate(text_model, QUESTIONS[1:], [], metrics=["perplexity"])[0]
    assert {kind: part["samples"] for kind, part in row["by_kind"].items()} == {"a": 1, "b": 2}
    assert row["by_kind"]["b"]["perplexity"] == alone["metrics"]["perplexity"] and "by_kind" not in alone


def test_without_names_the_metrics_follow_from_the_data(text_model: LoadedModel) -> None:
    def measured(samples: list[Sample]) -> list[str]:
        return list(evaluate(text_model, samples, [], max_new_tokens=2)[0]["metrics"])

    assert measured(QUESTIONS) == ["perplexity", "rougeL"]
    assert measured([QUESTIONS[0], replace(QUESTIONS[1], answer=None)]) == ["rougeL"]
    assert measured([replace(QUESTIONS[0], kind="needle")]) == ["perplexity", "recall"]
    shapes = load_model("shapes")
    row = evaluate(shapes, load_samples("shapes:kind=colour", limit=3), [], max_new_tokens=4)[0]
    assert list(row["metrics"]) == ["perplexity", "rougeL", "exact"] and row["metrics"]["exact"]["value"] > 0.5


# -- files and kills ---------------------------------------------------------------------------------------------------


def run_grid(loaded: LoadedModel, path: Path, **changes: Any) -> list[Row]:
    given: dict[str, Any] = {"budgets": [0.3], "metrics": ["perplexity", "rougeL"], "max_new_tokens": 4, **changes}
    samples, configs = given.pop("samples", QUESTIONS), given.pop("configs", ["prefixkv", "streaming"])
    return evaluate(loaded, samples, configs, output=path, **given)


def lasting(path: Path) -> tuple[list[Row], list[Row]]:
    """What two runs must agree on, line by line."""
    return ([without_timings(row) for row in read_results(path)], [without_timings(row) for row in read_samples(path)])


@pytest.fixture(scope="module")
def undisturbed(text_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A grid, with every write in order in `writes.json` beside it."""
    path = tmp_path_factory.mktemp("undisturbed") / "grid.jsonl"
    written: list[tuple[str, str]] = []
    append: Callable[[Path, Row], None] = results._append

    def note(file: Path, line: Row) -> None:
        before = file.read_bytes() if file.exists() else b""
        append(file, line)
        written.append((file.name, file.read_bytes()[len(before) :].decode()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_append", note)
        run_grid(text_model, path)
    path.with_name("writes.json").write_text(json.dumps(written))
    yield path


def killed(undisturbed: Path, path: Path, share: float) -> None:
    """Leaves on disk what a kill leaves after that share of all bytes were written."""
    writes = [(name, text.encode()) for name, text in json.loads(undisturbed.with_name("writes.json").read_text())]
    left = round(share * sum(len(text) for _, text in writes))
    for name, text in writes:
        with path.with_name(name).open("ab") as file:
            file.write(text[:left])
        left -= min(left, len(text))
        if not left:
            break


@pytest.mark.parametrize("share", [0.0, 0.0005, *random.Random(0).sample([n / 97 for n in range(97)], 6), 0.9999, 1.0])
def test_a_run_killed_at_any_byte_ends_like_an_undisturbed_one(
    text_model: LoadedModel, undisturbed: Path, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "grid.jsonl"
    killed(undisturbed, path, share)
    run_grid(text_model, path)
    assert lasting(path) == lasting(undisturbed)


def test_three_kills_in_a_row_change_nothing_and_nothing_is_measured_twice(
    text_model: LoadedModel, undisturbed: Path, tmp_path: Path
) -> None:
    path, measured = tmp_path / "grid.jsonl", []

    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        measured.extend((record["cell"], record["sample"]) for record in progress.records)
        if progress.records and len(measured) % 3 == 2:
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            run_grid(text_model, path, on_progress=kill)
        with samples_path(path).open("ab") as file:
            file.write(b'{"cell": "prefixkv @ fra')
    run_grid(text_model, path, on_progress=lambda progress: measured.extend(
        (record["cell"], record["sample"]) for record in progress.records
    ))  # fmt: skip
    assert lasting(path) == lasting(undisturbed)
    assert len(measured) == len(set(measured)) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_a_file_that_the_next_one_completes(
    text_model: LoadedModel, text_folder: Path, tmp_path: Path
) -> None:
    data, path = questions_file(tmp_path / "questions.jsonl"), tmp_path / "grid.jsonl"
    options = ["--model", text_folder, "--data", data, "--preset", "prefixkv", "--budget", "0.3,0.6"]
    options += ["--metric", "rougeL", "--max-new-tokens", 12]
    command = ["evaluate", *options, "--output", path]
    process = forks.Command(tmp_path / "said", *command)
    beside, deadline = samples_path(path), time.monotonic() + 120
    while not (beside.exists() and beside.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().code < 0, "the run was over before it was killed"
    before = beside.read_bytes()
    resumed = run(*command)
    assert resumed.exit_code == 0, resumed.output
    assert beside.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    whole = tmp_path / "whole.jsonl"
    assert run(*command[:-1], whole).exit_code == 0
    assert lasting(path) == lasting(whole)


def test_a_finished_cell_is_kept_and_a_grid_may_grow(text_model: LoadedModel, tmp_path: Path) -> None:
    path, told = tmp_path / "grid.jsonl", []
    first = run_grid(text_model, path, configs=["prefixkv"])
    grown = run_grid(text_model, path, configs=["streaming", "prefixkv"], on_progress=told.append)
    assert [row["policy"] for row in grown] == [FULL_CACHE, "streaming", "prefixkv"]
    assert [grown[0], grown[2]] == first  # times too
    assert [row["policy"] for row in read_results(path)] == [FULL_CACHE, "prefixkv", "streaming"]
    assert (told[-1].done, told[-1].total, told[-1].measured) == (9, 9, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"metrics": ["rougeL"]}, "metrics was"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4, is 5"),
        ({"samples": QUESTIONS[:2]}, "data_hash was"),
        ({"configs": {"prefixkv": CompressionConfig.preset("uniform")}}, "of another configuration"),
    ],
)
def test_results_of_another_run_are_refused_unless_started_over(
    text_model: LoadedModel, tmp_path: Path, changes: Row, says: str
) -> None:
    path = tmp_path / "grid.jsonl"
    run_grid(text_model, path, configs=["prefixkv"])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="overwrite") as caught:
        run_grid(text_model, path, **{"configs": ["prefixkv"], **changes})
    assert says in str(caught.value) and path.read_bytes() == before
    run_grid(text_model, path, **{"configs": ["prefixkv"], **changes}, overwrite=True)
    assert len(read_results(path)) == 2


def test_files_that_are_no_results_are_refused(text_model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "grid.jsonl"
    run_grid(text_model, path, configs=[])
    content = path.read_bytes()
    for wrong, says in ((b"no json\n", "line 1 is no JSON object"), (b'{"a": 1}\n', "is no file of results")):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match=says):
            run_grid(text_model, path, configs=[])
        with pytest.raises(ConfigError, match=says):
            read_results(path)
    path.write_bytes(content)
    samples_path(path).unlink()
    with pytest.raises(ConfigError, match=r"grid\.samples\.jsonl, which belongs to it, is missing"):
        run_grid(text_model, path, configs=[])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path / "missing.jsonl")


# -- bad samples -------------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_reported_and_skipped_in_every_cell(image_model: LoadedModel, tmp_path: Path) -> None:
    good = [replace(sample, image=picture(tmp_path / "good.png")) for sample in QUESTIONS[:2]]
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no image")
    bad = [
        replace(QUESTIONS[0], name="missing", image=tmp_path / "missing.png"),
        replace(QUESTIONS[0], name="torn", image=torn),
        replace(QUESTIONS[0], name="unanswered", answer=" "),
    ]
    rows = evaluate(image_model, [bad[0], good[0], bad[1], good[1], bad[2]], ["prefixkv"], metrics=["perplexity"])
    alone = evaluate(image_model, good, ["prefixkv"], metrics=["perplexity"])
    for row, other in zip(rows, alone, strict=True):
        assert (row["samples"], row["skipped"]) == (2, 3)
        assert row["metrics"] == other["metrics"]
        assert [skipped["sample"] for skipped in row["skipped_samples"]] == ["missing", "torn", "unanswered"]
    reasons = [skipped["reason"] for skipped in rows[0]["skipped_samples"]]
    assert "missing.png: there is no such file" in reasons[0] and "torn.png: cannot be read" in reasons[1]
    assert "reference answer is empty" in reasons[2]


def test_whatever_a_processor_raises_about_one_sample_is_reported(
    text_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcompress.evaluation import measuring

    encode = measuring.encode_sample

    def fails(loaded: LoadedModel, sample: Sample) -> Any:
        if sample.name == "fox":
            raise ZeroDivisionError("odd\nshape")
        return encode(loaded, sample)

    monkeypatch.setattr(measuring, "encode_sample", fails)
    (row,) = evaluate(text_model, QUESTIONS, [], metrics=["perplexity"])
    assert row["skipped_samples"] == [{"sample": "fox", "reason": "cannot be encoded: ZeroDivisionError: odd shape"}]


@pytest.mark.parametrize("fails_in", [FULL_CACHE, "prefixkv"])
def test_what_the_full_cache_cannot_measure_is_left_out_of_every_row(
    text_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    from kvcompress.evaluation import measuring

    generate, prompt = measuring.generate, encode_sample(text_model, QUESTIONS[1])["input_ids"]

    def fails(loaded: LoadedModel, inputs: Any, config: CompressionConfig | None, **given: Any) -> Any:
        if (config is None) == (fails_in == FULL_CACHE) and torch.equal(inputs["input_ids"], prompt):
            raise torch.OutOfMemoryError("out of memory")
        return generate(loaded, inputs, config, **given)

    monkeypatch.setattr(measuring, "generate", fails)
    full, cut = evaluate(text_model, QUESTIONS, ["prefixkv"], metrics=["rougeL"], max_new_tokens=3)
    bad = [{"sample": "liquor", "reason": "out of memory"}]
    assert cut["skipped_samples"] == bad and full["skipped_samples"] == (bad if fails_in == FULL_CACHE else [])


def test_no_good_sample_no_image_no_metric_no_sample_and_no_place_are_errors(
    text_model: LoadedModel, image_model: LoadedModel, tmp_path: Path
) -> None:
    missing = [replace(QUESTIONS[0], image=tmp_path / "missing.png")]
    with pytest.raises(ConfigError, match=r"none of 1 samples could be evaluated with full cache; .*missing\.png"):
        evaluate(image_model, missing, [])
    with pytest.raises(UnsupportedModelError, match=r"has images, but .* is a text model \(llama\)"):
        evaluate(text_model, missing, [])
    with pytest.raises(ConfigError, match="unknown metric 'rouge'; did you mean 'rougeL'"):
        evaluate(text_model, QUESTIONS, [], metrics=["rouge"])
    with pytest.raises(ConfigError, match="metric: give at least one of perplexity"):
        evaluate(text_model, QUESTIONS, [], metrics=[])
    with pytest.raises(ConfigError, match="data: holds no samples"):
        evaluate(text_model, [], [])
    for place in (tmp_path, questions_file(tmp_path / "file") / "below.jsonl"):
        with pytest.raises(ConfigError, match="cannot be written"):
            evaluate(text_model, QUESTIONS, [], output=place)


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_item_is_one_processs_and_gathering_restores_their_order(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.utils

    for items in ([], [1], list(range(7)), list(range(10))):
        parts = [Processes(rank, count).mine(items) for rank in range(count)]
        everything = [(rank, part) for rank, part in enumerate(parts)]
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda given, told=everything: told)
        for rank in range(count):
            assert Processes(rank, count).gather(parts[rank]) == items


def test_two_processes_give_the_results_of_one(text_model: LoadedModel, text_folder: Path, tmp_path: Path) -> None:
    options = ["--model", text_folder, "--data", questions_file(tmp_path / "questions.jsonl"), "--max-new-tokens", 5]
    options += ["--preset", "prefixkv", "--budget", "0.3", "--metric", "perplexity,rougeL", "--device", "cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", "-m", "kvcompress", "evaluate"]
    command += [*map(str, options), "--json", "--output", str(tmp_path / "two.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as launchers set it: sums of floats may depend on the number of threads
    try:
        assert run("evaluate", *options, "--output", tmp_path / "one.jsonl").exit_code == 0
    finally:
        torch.set_num_threads(threads)
    one, two = lasting(tmp_path / "one.jsonl"), lasting(tmp_path / "two.jsonl")
    assert one == two
    assert [without_timings(row) for row in json.loads(done.stdout)["results"]] == one[0]  # printed once


KEEPING = {  # each with what it lets a cache hold more than its budget
    "protected": {"preset": "prefixkv", "budget": {"fraction": 0.2, "recent": 30}},
    "decode": {"preset": "prefixkv", "evictor": {"name": "topk", "decode": "none"}},
    "within": {"preset": "prefixkv"},
}


@pytest.mark.parametrize("budget", [0.2, 12, "9KB"])
def test_caches_that_hold_more_than_their_budget_are_named_once_in_tokens(
    text_model: LoadedModel, budget: float | int | str
) -> None:
    configs = {
        name: CompressionConfig.preset(given["preset"]).override(
            **{field: value for field, value in given.items() if field != "preset"}
        )
        for name, given in KEEPING.items()
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = evaluate(text_model, QUESTIONS, configs, budgets=[budget], metrics=["contained"], max_new_tokens=20)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, BudgetWarning)]
    over = [row for row in rows if row["policy"] in ("protected", "decode")]
    assert len(told) == 1 and told[0].startswith("2 of 4 caches held more than their budget: ")
    for row in over:
        assert f"{row['cell']} held {row['held_tokens']:,.0f} of {row['seen_tokens']:,.0f} tokens per layer" in told[0]
    assert "within" not in told[0] and all(row["held_tokens"] == row["seen_tokens"] for row in rows[:1])
    assert "Compare caches by what they held" in told[0]
    table = Console(width=200, record=True, file=io.StringIO())
    table.print(results_table(rows))
    text = table.export_text()
    assert all(f"{row['held_tokens']:,.0f} of {row['seen_tokens']:,.0f}" in text for row in rows)


# -- command line ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_prints_a_table_or_json(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = questions_file(tmp_path / "questions.jsonl")
    CompressionConfig.preset("uniform", budget=0.9).dump(tmp_path / "mine.yaml")
    options = ["evaluate", "--model", text_folder, "--data", data, "--samples", 2, "--max-new-tokens", 3]
    options += ["--preset", "prefixkv,streaming", "--config", tmp_path / "mine.yaml", "--budget", "0.3", "--budget", 9]
    options += ["--metric", "contained", "--output", tmp_path / "grid.jsonl", "--set", "budget.recent=2"]
    table = run(*options)
    assert table.exit_code == 0 and table.stdout.count("prefixkv") == 2 and "9 tokens" in table.stdout
    for word in (FULL_CACHE, "streaming", "mine", "contained", "retention", "tokens/s", "grid.jsonl", "2 samples"):
        assert word in table.stdout
    told = json.loads(run(*options, "--json").stdout)
    assert told["results"] == read_results(tmp_path / "grid.jsonl") and len(told["results"]) == 7
    assert all(row["config"]["budget"]["recent"] == 2 for row in told["results"][1:])
    assert told["results"][0]["data"] == str(data)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "missing.json"], "neither a file"),
        (["--data", "shapes"], "has images, but"),
        (["--metric", "rogue1"], "did you mean 'rouge1'"),
        (["--preset", "prefixvk"], "did you mean 'prefixkv'"),
        (["--preset", "prefixkv,prefixkv"], "is there twice"),
        (["--preset", "kvzip"], "take question: unseen"),
        (["--budget", "1.5"], "a fraction lies in"),
        (["--output", "/proc/nowhere/grid.jsonl"], "cannot be written"),
        (["--config", "missing.yaml"], "cannot be read"),
        (["--images", "missing"], "is no folder"),
        (["--output", "grid.csv"], "the file name must end in .jsonl"),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr(
    text_folder: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    defaults = ["--model", text_folder, "--max-new-tokens", 2]
    if "--data" not in arguments:
        defaults += ["--data", questions_file(tmp_path / "questions.jsonl")]
    result = run("evaluate", *defaults, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr
    assert says in json.loads(run("evaluate", *defaults, *arguments, "--json").stdout)["error"]["message"]


def test_skipped_samples_are_warned_about(text_folder: Path, tmp_path: Path) -> None:
    data = questions_file(tmp_path / "questions.jsonl")
    with data.open("a") as file:
        file.write('\n{"id": "odd", "question": "What?", "answer": ""}')
    result = run("evaluate", "--model", text_folder, "--data", data, "--metric", "perplexity")
    assert result.exit_code == 0 and "3 samples, question seen, 1 skipped" in " ".join(result.stdout.split())
    assert "warning: sample 'odd' was skipped: its reference answer is empty" in result.stderr


def test_the_time_left_is_that_of_the_samples_left_at_the_pace_so_far() -> None:
    cells = [Cell(FULL_CACHE, None), *cells_of(["prefixkv"])[1:]]
    told = progress_line(Progress(cells[1], cells, done=60, total=100, measured=10), seconds=20.0)
    assert str(told) == "prefixkv @ fraction 0.2 (2 of 2): 60 of 100 samples, about 1 min 20 s left"
    assert "left" not in str(progress_line(Progress(cells[0], cells, 50, 100, 0), 1.0))
    assert [duration(seconds) for seconds in (4.4, 60, 7500)] == ["4 s", "1 min 0 s", "2 h 5 min"]


def test_intervals_stand_below_their_values_where_the_terminal_is_narrow(text_model: LoadedModel) -> None:
    rows = evaluate(text_model, QUESTIONS, [], metrics=["perplexity"])
    tables = [results_table(rows), results_table(rows, wide=False).renderables[0]]  # type: ignore[union-attr]
    wide, narrow = (next(iter(table.columns[3].cells)) for table in tables)  # type: ignore[union-attr]
    assert "(" in str(wide) and str(wide).replace(" (", "\n(") == narrow


def test_no_word_is_cut_where_the_terminal_is_narrow(text_model: LoadedModel) -> None:
    """What caches say, and what they cost, are two tables then."""
    metrics = ["perplexity", "rougeL", "exact"]
    rows = evaluate(text_model, QUESTIONS[:1], ["prefixkv+int4"], budgets=[0.5], metrics=metrics, max_new_tokens=3)
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(results_table(rows, wide=False))
    words = shown.export_text().split()
    assert {"full", "cache", "prefixkv+int4", "budget", "kept", *metrics, "retention", "held", "tokens/s"} <= {*words}
    assert words.count("prefixkv+int4") == 2


def test_a_dynamic_cache_is_the_reference(text_model: LoadedModel) -> None:
    sample = QUESTIONS[0]
    inputs = encode_sample(text_model, sample)
    output = text_model.model.generate(
        **inputs, **tiny.with_cache(DynamicCache()), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    ids = output[0, inputs["input_ids"].shape[1] :]
    rows: list[Row] = []
    evaluate(
        text_model,
        [sample],
        [],
        metrics=["rougeL"],
        max_new_tokens=6,
        on_progress=lambda progress: rows.extend(progress.records),
    )
    assert rows[0]["text"] == text_model.tokenizer.decode(ids, skip_special_tokens=True)
