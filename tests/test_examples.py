"""The examples run, on tiny models."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvcompress import ALLOCATORS
from kvcompress.evaluation import models
from tests import checkpoints

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_text_is_asked_with_all_and_with_a_fifth_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "_fast_dtype", lambda device: torch.float32)  # whose answers are read here
    run("text.py", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out
    assert "100%: The red box is in the garden" in lines and "20%: The red box is in the garden" in lines
    assert "retention 100.0%" in lines and "retention 19." in lines


def test_a_batch_of_images_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("llava_batch.py", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    for asked, right in zip(lines[0:4:2], lines[1:4:2], strict=True):
        assert asked.endswith(right.removeprefix("  right: ")), (asked, right)
    assert "row 1 column 1: large white square." in lines[4]
    assert "3 x " in lines[6] and "auto chose image" in lines[7]


def test_files_are_asked_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.save_image(tmp_path / "llava")
    for number in range(2):
        Image.new("RGB", (9, 12), (number, 90, 200)).save(tmp_path / f"{number}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    run("llava_batch.py", *files, "--model", model, "--question", "what is it?", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out
    assert lines.count("what is it?") == 2 and "right:" not in lines


def test_every_example_is_run_here() -> None:
    run_here = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))
    trains = {"train_shapes_llava.py", "train_pages_llava.py"}  # for hours, and minutes; parts are tested elsewhere
    assert {*run_here, *trains} == {file.name for file in EXAMPLES.glob("*.py")}


def test_pytest_alone_runs_a_file_of_the_clone(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    plugins = ("-p", "no:xdist", "-p", "no:timeout", "-p", "no:cacheprovider")  # what the extra `testing` lacks
    command = [sys.executable, "-m", "pytest", *plugins, "-c", EXAMPLES.parent / "pyproject.toml", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_documents_are_stored_and_asked(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"The key of {name} is under the mat. " * 3)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    run("document_store.py", "add", tmp_path / "store", *files, "--model", text, monkeypatch=monkeypatch)
    capsys.readouterr()
    run("document_store.py", "ask", tmp_path / "store", "Where is it?", "--model", text, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out
    assert "one: Where is it?" in lines and "two: Where is it?" in lines


def test_pipelines_and_a_streamer_are_compressed(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("pipelines.py", "--text", text, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out
    assert lines.count("retention 50.0%") + lines.count("retention 49.") == 3, lines
    assert "row 1 column 1: small yellow circle" in lines


def test_an_own_allocator_keeps_its_laws_and_runs(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    names = run("own_allocator.py", text, monkeypatch=monkeypatch)
    kept = [int(number) for number in capsys.readouterr().out.split("[")[1].rstrip("]\n").split(",")]
    assert kept[0] < kept[1] < kept[2]
    names["test_every_law_of_allocators_holds"]()
    names["test_later_layers_get_no_less_where_all_have_the_same_bounds"]()


def test_a_task_of_the_harness_runs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install 'kvcompress[lm-eval]'")
    names = run("lm_eval_task.py", text, monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("accuracy") == 4
    names["write_task"](tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "whereabouts.jsonl").read_text().splitlines()]
    assert sorted(line["right"] for line in lines) == [0, 0, 1, 1, 2, 2]  # one answer to all is right in a third
    for line in lines:
        right = line["answers"][line["right"]].removeprefix("The ")
        assert f"Anna put the {right.replace(' is in', ' in')}" in line["text"]
        assert len(line["text"].split()) * 0.2 > 4 + 32, "a fifth must be more than what the preset text protects"
