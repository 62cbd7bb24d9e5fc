"""`benchmarks.gpu` with tiny models: its code runs through on a CPU, and nothing it leaves out is left out silently."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from benchmarks import gpu, random_models, steps
from kvcompress import CompressedCache
from kvcompress.cache import capture
from tests.test_captured import Recorder

APP = typer.Typer()
APP.command()(gpu.main)
# What each section compares.
CACHES = {
    "decode": {*(f"{name}Cache, {held}" for name in ("Dynamic", "Static") for held in ("1 token", "20 %", "100 %"))}
    | {"prefixkv", "full"},
    "generate": {"DynamicCache", "prefixkv, captured", "prefixkv, eager", "full, captured"},
    "prefill": {"DynamicCache", "full", "snapkv", "uniform, key_norm", "the kernel alone"}
    | {f"prefixkv, {queries}" for queries in ("exact", "stride:4", "window:32")},
    "llava": {"DynamicCache", "full", "prefixkv", "lightkv", "prefixkv+lightkv"},
    "quantized": {"bfloat16", "4 bits", "8 bits"},
    "heads": {"heads alike", "tokens of their own", "sizes by scores", "sizes 10 to 1"},
    "compiled": {"prefixkv", "StaticCache, compiled", "prefixkv, captured", "prefixkv, compiled"},
}


def run(tmp_path: Path, *arguments: str) -> tuple[Result, dict[str, list[dict[str, Any]]]]:
    """What a run says, and the rows of its file by section."""
    output = tmp_path / "figures" / "gpu.json"
    result = CliRunner().invoke(APP, ["--tiny", "--output", str(output), *arguments])
    rows = defaultdict(list)
    for row in json.loads(output.read_text()):
        rows[row["section"]].append(row)
    return result, rows


@pytest.mark.parametrize("section", [name for name in CACHES if name != "compiled"])
def test_a_section_measures_every_cache_or_says_why_not(section: str, tmp_path: Path) -> None:
    """And says which machine and versions its figures are of."""
    result, rows = run(tmp_path, "--section", section)
    assert result.exit_code == 0, result.output
    assert set(rows) == {"machine", section}
    assert rows["machine"][0].keys() >= {"python", "torch", "triton", "transformers"}
    *measured, took = rows[section]
    assert took["took_s"] > 0 and {row.get("cache", "the kernel alone") for row in measured} == CACHES[section]
    assert not any("error" in row for row in measured)
    if section == "llava":
        told = {row["cache"]: row["longest"] for row in measured if "longest" in row}
        assert told.keys() == CACHES["llava"] and all("aten::mm" in longest for longest in told.values())
    if not torch.cuda.is_available():
        skipped = {row["skipped"] for row in measured if row.get("mode") == "captured"}
        assert skipped <= {"there are no graphs of a cpu device", "this cache decodes step by step in Python"}
        assert skipped or section in ("generate", "prefill")


def test_compiled_steps_are_measured_too(tmp_path: Path) -> None:
    """In a process of its own, since checks of every shape cannot be traced."""
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--section", "compiled", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [row for row in json.loads(output.read_text()) if row["section"] == "compiled"]
    assert {row["cache"] for row in rows if "cache" in row} == CACHES["compiled"]
    assert rows[0]["mode"] == "compiled" and rows[0]["until_compiled_s"] > 0


def test_captured_steps_are_measured_where_there_are_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the graph that `generate` would capture: a recorder stands in for it on a CPU."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(capture.GRAPHS, "cpu", Recorder)
    result, rows = run(tmp_path, "--section", "decode")
    assert result.exit_code == 0, result.output
    captured = [row for row in rows["decode"] if row.get("mode") == "captured"]
    assert {row["cache"] for row in captured} == {"prefixkv", "full"}
    for name in ("ms", "until_captured_s", "over_floor_by_bytes", "to_static_20", "faster_than_static"):
        assert [row[name] > 0 or name == "over_floor_by_bytes" for row in captured if name in row] == [True, True]


@torch.no_grad()
def test_captured_steps_add_a_token_each_as_steps_in_python_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is timed is what decoding does."""
    monkeypatch.setitem(capture.GRAPHS, "cpu", Recorder)
    model = random_models.of_kind("gqa", torch.device("cpu"), tiny=True)
    held = []
    for kind in (steps.captured, steps.in_python):
        cache = CompressedCache(model, "prefixkv", budget=0.5)
        steps.read(model, cache, input_ids=torch.arange(4, 84).view(2, 40))
        step = kind(model, cache, 2)
        for _ in range(6):
            step()
        keys = [layer.keys for layer in cache.layers]
        held.append((keys, cache.report().tokens_seen, cache.report().held_positions))
    torch.testing.assert_close(held[0][0], held[1][0], rtol=0, atol=0.01)  # bfloat16
    assert held[0][1:] == held[1][1:] and held[0][1] == 46


def test_without_a_cuda_device_figures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way out, and before anything is made or written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(APP, ["--output", str(tmp_path / "gpu.json")])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "needs a CUDA device" in result.output and "--tiny" in result.output and "make bench" in result.output


def test_what_would_begin_too_late_is_left_out_with_a_word(tmp_path: Path) -> None:
    """And the run ends well."""
    result, rows = run(tmp_path, "--minutes", "0")
    assert result.exit_code == 0 and set(rows) == {"machine", *CACHES}
    for section in CACHES:
        assert any("--minutes" in row.get("left_out", "") for row in rows[section])


def test_what_fails_is_a_line_and_the_others_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status says so in the end."""

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_codes", fails)
    result, rows = run(tmp_path, "--section", "quantized", "--section", "decode")
    assert result.exit_code == 1 and "1 could not be measured" in result.output
    assert [row["error"] for row in rows["quantized"] if "error" in row] == ["OutOfMemoryError: CUDA out of memory"]
    assert {row["cache"] for row in rows["decode"] if "cache" in row} == CACHES["decode"]
