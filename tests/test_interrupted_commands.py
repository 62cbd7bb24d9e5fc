"""Ctrl-C while a command works or writes ends it with exit code 130 and leaves every old file as it was."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from torch import nn
from typer.testing import CliRunner

from kvcompress.cli import app
from kvcompress.evaluation.plots import save
from kvcompress.evaluation.shapes import dataset
from tests import checkpoints

OLD = b"what was there before\n"
DATA = ("--data", "text:length=30,answer=5", "--samples", "2", "--overwrite")
# each with the files that it replaces
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "calibrate": (
        ("--output", "profile.json", "--budget", "0.5", "--plot", ".", *DATA),
        ("profile.json", "retention.png", "retention.svg"),
    ),
    "tune": (
        ("--output", "tuned.yaml", "--max-ppl-increase", "100%", "--step", "0.5", *DATA),
        ("tuned.yaml",),
    ),
    "bench": (
        ("--prompt-tokens", "20", "--rounds", "1", "--new-tokens", "1", "--reference", "DynamicCache", "--plot", "."),
        ("speed.png", "speed.svg"),
    ),
    "inspect": (("--prompt", "The quick brown fox", "--plot", "."), ("lorenz.png", "lorenz.svg", "retention.png")),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Pictures of an earlier run, by suffix; no other picture is replaced."""
    return {path.suffix: path.read_bytes() for path in save(Figure(), tmp_path_factory.mktemp("drawn") / "old")}


def interrupt_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is interrupted when it is called for that time, from 1."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("moment", ["working", "syncing", "renaming"])
def test_an_interrupted_command_leaves_old_files_whole(
    text: Path,
    drawn: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    moment: str,
) -> None:
    arguments, files = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    old = {name: drawn.get(Path(name).suffix, OLD) for name in files}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    place, name, call = {
        "working": (transformers.LlamaModel, "forward", 1 if command == "inspect" else 2),
        "syncing": (os, "fsync", 1),
        "renaming": (os, "replace", 1),
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(place, name, interrupt_at(call, getattr(place, name)))
        result = CliRunner().invoke(app, [command, "--model", str(text), *arguments])
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    if moment == "renaming":  # nothing is in the way of another try
        result = CliRunner().invoke(app, [command, "--model", str(text), *arguments])
        assert result.exit_code == 0, result.output
        assert all((tmp_path / name).read_bytes() != content for name, content in old.items())


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training() -> Any:
    path = Path(__file__).parent.parent / "examples" / "train_shapes_llava.py"
    spec = importlib.util.spec_from_file_location("train_shapes_llava", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(training: Any, folder: Path) -> Any:
    """A training run of a tiny model, without what it would be trained on."""
    run = training.Run.__new__(training.Run)
    run.folder, run.seconds, run.started = folder, 0.0, 0.0
    run.model, run.heads = checkpoints.text_model(), nn.Linear(2, 2)
    run.reader = SimpleNamespace(processor=checkpoints.text_tokenizer())
    return run


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (lambda run: run.save("checkpoint.pt", "joint", 7, []), "checkpoint.pt"),
        (lambda run: run.export(run.folder), "model.safetensors"),
        (lambda run: run.log(step=7), "metrics.jsonl"),
    ],
    ids=["checkpoint", "export", "log"],
)
def test_interrupted_training_leaves_checkpoint_export_and_log_whole(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Any], None], file: str
) -> None:
    run = run_of(training, tmp_path / "run")
    run.folder.mkdir()
    (run.folder / file).write_bytes(OLD)
    for place, name in (
        (os, "fsync"),
        (os, "replace"),
        (torch, "save"),
        (transformers.LlamaForCausalLM, "save_pretrained"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, interrupt_at(1, getattr(place, name)))
            try:
                write(run)
            except KeyboardInterrupt:
                assert (run.folder / file).read_bytes() == OLD
                assert os.listdir(run.folder) == [file] and os.listdir(tmp_path) == ["run"]
                continue
        (run.folder / file).unlink()  # what is not on the way of this write
        for path in run.folder.iterdir():
            path.unlink()
        (run.folder / file).write_bytes(OLD)
    write(run)
    assert (run.folder / file).read_bytes() != OLD


def test_an_interrupted_drawing_of_scenes_leaves_old_images_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.write_dataset(tmp_path, "test", 2, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in before:
        path.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", interrupt_at(2, os.fsync))
    with pytest.raises(KeyboardInterrupt):
        dataset.write_dataset(tmp_path, "test", 2, 1)
    found = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(found) == set(before)
    assert all(content in (OLD, before[path]) for path, content in found.items())
