"""Results files: nothing of a user's is destroyed, one run writes at a time, and what two wrote is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from kvcompress import CompressionConfig
from kvcompress.cli import app
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError
from kvcompress.evaluation import LoadedModel, evaluate, load_model, read_results, read_samples
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.plots import check_pictures
from kvcompress.evaluation.results import samples_path
from tests import checkpoints, forks

QUESTIONS = [Sample("fox", "Over what?", "A dog."), Sample("jugs", "How many?", "Five.")]
RUN = '{"run": {"model": "'
CELL = '{"cell": "prefixkv @ fra'

# What a user may have under a name that is then given as --output, and beside it.
USERS: dict[str, str] = {
    "questions.jsonl": '{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n',
    "torn.jsonl": '{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}',
    "questions.json": '[{"question": "q", "answer": "a"}]',
    "profile.json": LayerProfile(budgets=[0.5], retention=[[0.5]]).model_dump_json(),
    "config.yaml": "budget: 0.2\nscorer: attention\n",
    "notes.txt": "first\nsecond\nlast, without an end",
    "line.txt": "alone",
    "quote.txt": '{"c',
    "binary.bin": "\0\x01\ufffd",
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text_model(text_folder: Path) -> LoadedModel:
    return load_model(str(text_folder))


def run_grid(loaded: LoadedModel, path: Path, **changes: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"budgets": [0.3], "metrics": ["contained"], "max_new_tokens": 2, **changes}
    return evaluate(loaded, given.pop("data", QUESTIONS), ["streaming"], output=path, **given)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def held(folder: Path) -> dict[str, bytes | str]:
    """Every file and link of a folder, locks left out."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.endswith(".lock")
    }


# -- a user's files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("beside", [False, True])
def test_a_file_that_is_no_results_is_refused_and_stays_as_it_was(
    text_model: LoadedModel, tmp_path: Path, name: str, beside: bool
) -> None:
    path = (tmp_path / name).with_suffix(".jsonl")  # whatever else it is, its name is that of results
    (samples_path(path) if beside else path).write_text(USERS[name], encoding="utf-8")
    before = held(tmp_path)
    with pytest.raises(ConfigError, match=r"output .*(no file of|no JSON object|is missing).*overwrite"):
        run_grid(text_model, path)
    assert held(tmp_path) == before
    if beside:  # only the file that was named may be overwritten
        with pytest.raises(ConfigError, match="output"):
            run_grid(text_model, path, overwrite=True)
        assert held(tmp_path) == before
    else:
        run_grid(text_model, path, overwrite=True)
        assert len(read_results(path)) == 2


def test_the_data_are_no_place_for_the_results_whatever_is_allowed(text_model: LoadedModel, tmp_path: Path) -> None:
    path, link = tmp_path / "questions.jsonl", tmp_path / "link.jsonl"
    path.write_text(USERS["questions.jsonl"])
    link.symlink_to(path)
    before = held(tmp_path)
    for output in (path, link):
        with pytest.raises(ConfigError, match="is the file of the data"):
            run_grid(text_model, output, data=str(path), overwrite=True)
    assert held(tmp_path) == before


def test_a_link_to_a_file_that_is_not_there_yet_stays_a_link(text_model: LoadedModel, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to("grid.jsonl")
    rows = run_grid(text_model, link)
    assert link.is_symlink() and read_results(tmp_path / "grid.jsonl") == rows == read_results(link)


OUTPUTS: dict[str, list[str]] = {
    "evaluate": ["--preset", "streaming", "--max-new-tokens", "2"],
    "calibrate": ["--budget", "0.5"],
    "tune": ["--max-ppl-increase", "50%", "--step", "0.5"],
}


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("name", ["questions.json", "profile.json", "config.yaml"])
def test_no_command_replaces_a_file_without_being_told_to_and_says_so_before_the_model_is_loaded(
    tmp_path: Path, command: str, name: str
) -> None:
    output = (tmp_path / name).with_suffix(".jsonl" if command == "evaluate" else Path(name).suffix)
    output.write_text(USERS[name])
    before = held(tmp_path)
    given = [command, "--model", tmp_path / "no-model", "--data", "text", "--output", output]
    result = run(*given, *OUTPUTS[command])
    assert result.exit_code == 1 and result.stderr.startswith("error: output ") and "--overwrite" in result.stderr
    assert held(tmp_path) == before


def test_calibrate_replaces_a_file_when_told_to(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text(USERS["questions.jsonl"])
    given = ["calibrate", "--model", text_folder, "--data", tmp_path / "a.jsonl", "--budget", 0.5, "--overwrite"]
    assert run(*given, "--output", tmp_path / "profile.json").exit_code == 0
    assert LayerProfile.load(tmp_path / "profile.json").budgets == [0.5]


def test_a_picture_that_others_drew_is_never_replaced(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "lorenz.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    before = held(tmp_path)
    with pytest.raises(ConfigError, match=r"lorenz\.png: is a file that kvcompress has not drawn"):
        check_pictures(tmp_path)
    assert held(tmp_path) == before
    (tmp_path / "lorenz.png").unlink()
    check_pictures(tmp_path)


# -- two runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_start_at_once_are_kept_apart(text_folder: Path, tmp_path: Path) -> None:
    """One does the work, and no other writes while it does; each ends well or says why not."""
    data, path = tmp_path / "a.jsonl", tmp_path / "grid.jsonl"
    data.write_text(USERS["questions.jsonl"])
    command = ["evaluate", "--model", text_folder, "--data", data, "--output", path]
    command += ["--preset", "streaming,prefixkv", "--budget", "0.3", "--metric", "contained", "--max-new-tokens", "8"]
    started = [forks.Command(tmp_path / f"said{number}", *command) for number in range(3)]
    ended = [process.wait() for process in started]
    for code, _, said in ended:
        assert code == 0 or (code == 1 and "another process is writing to it" in said), said
    assert any(code == 0 for code, *_ in ended)
    cells = [row["cell"] for row in read_results(path)]
    assert len(cells) == len(set(cells)) == 3 and len(read_samples(path)) == 6


def test_nobody_writes_while_a_run_does_and_anybody_may_afterwards(text_model: LoadedModel, tmp_path: Path) -> None:
    path, refused = tmp_path / "grid.jsonl", []

    def second(_: object) -> None:
        with pytest.raises(ConfigError, match="another process is writing to it") as caught:
            run_grid(text_model, path, overwrite=bool(refused))
        refused.append(caught.value)

    rows = run_grid(text_model, path, on_progress=second)
    assert refused and run_grid(text_model, path) == rows


BY_TWO: dict[str, Callable[[list[str], list[str]], tuple[list[str], list[str]]]] = {
    "cell": lambda cells, samples: ([*cells, cells[-1]], samples),
    "sample": lambda cells, samples: (cells, [*samples, samples[-1]]),
    "run": lambda cells, samples: (cells, [samples[0], *samples]),
    "everything": lambda cells, samples: (cells * 2, samples * 2),
}


@pytest.mark.parametrize("kind", BY_TWO)
def test_a_file_that_two_runs_wrote_is_named_as_such(text_model: LoadedModel, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "grid.jsonl"
    run_grid(text_model, path)
    files = [path, samples_path(path)]
    changed = BY_TWO[kind](*(file.read_text().splitlines() for file in files))
    for file, lines in zip(files, changed, strict=True):
        file.write_text("".join(f"{line}\n" for line in lines))
    before = held(tmp_path)
    with pytest.raises(ConfigError, match="two runs wrote to the file at the same time; --overwrite"):
        run_grid(text_model, path)
    with pytest.raises(ConfigError, match="two runs wrote"):
        (read_results if kind == "cell" else read_samples)(path)
    assert held(tmp_path) == before


@pytest.mark.parametrize("field", ["cell", "policy", "metrics", "config", "budget", "skipped_samples", "kv_bytes"])
@pytest.mark.parametrize("value", [None, "missing", 3, [3], {"a": 3}])
def test_a_line_of_another_form_is_told_by_its_field(tmp_path: Path, field: str, value: Any) -> None:
    row: dict[str, Any] = {
        "cell": "a", "policy": "a", "budget": 0.5, "budget_unit": "fraction", "model": "m", "dtype": "float32",
        "data": "d", "samples": 1, "skipped": 0, "skipped_samples": [], "config": None, "retention": 0.5,
        "metrics": {"contained": {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}}, "kv_bytes": 1, "full_kv_bytes": 2,
        "seconds_to_first_token": 0.1, "tokens_per_second": None, "peak_bytes": None,
    }  # fmt: skip
    path = tmp_path / "grid.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_results(path) == [row]
    fits = {"config": (None, {"a": 3}), "budget": (3,), "kv_bytes": (3,), "cell": ("missing",), "policy": ("missing",)}
    if value in fits.get(field, ()) and not (value == "missing" and field in ("cell", "policy")):
        return
    changed = {name: one for name, one in {**row, field: value}.items() if not (name == field and value == "missing")}
    path.write_text(json.dumps(changed) + "\n")
    with pytest.raises(ConfigError, match=f"is no file of results: line 1: {field}"):
        read_results(path)


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_loses_no_line_and_the_next_run_goes_on(
    text_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, room = tmp_path / "grid.jsonl", os.write, 1500

    def short(handle: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, os.strerror(28))
        taken = write(handle, bytes(data[:room]))
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(ConfigError, match=r"output .*: cannot be written: No space left on device"):
        run_grid(text_model, path)
    monkeypatch.undo()
    before = samples_path(path).read_bytes()
    assert before.endswith(b"\n")
    rows = run_grid(text_model, path)
    assert samples_path(path).read_bytes().startswith(before) and read_results(path) == rows
    assert CompressionConfig(**rows[1]["config"]).budget.fraction == 0.3
