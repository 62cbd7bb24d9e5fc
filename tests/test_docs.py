"""What the documents show runs: Python blocks, command lines, and the examples in docstrings."""

from __future__ import annotations

import doctest
import functools
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvcompress import CompressedCache, restore
from kvcompress.cache.argument import cache_argument
from kvcompress.cli import app, demo
from kvcompress.evaluation import smollm2
from kvcompress.integrations import base
from tests import checkpoints, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the answers on a page must hold, so that it shows no nonsense: each so often.
SAID = {
    "README.md": {"red box is in the garden.": 2, "auto chose text": 1, "['7', 'large white triangle']": 1},
    "testing.md": {
        "The smallest example: AllocationInput(importance=[[[0.0]], [[0.0]]], total=[1], floor=[[0], [0]]": 1,
    },
    "reuse.md": {
        "The red box is in the garden": 3,
        "Anna put the red box in the garden.": 1,
        "The capital of Italy is Rome.": 1,
        "[' behind the house": 1,
        "' in the kitchen.": 1,
    },
}
# What the commands of a page print, by how they begin; demos answer with all, half and less of the cache.
PRINTED = {
    "README.md": {
        "kvcompress policies": {"prefix": 1, "lightkv": 1, "h2o": 1},
        "kvcompress generate --prompt-file": {
            "The red box is in the garden.": 2,
            "19.9%": 1,
            "auto chose text": 1,
            "The answers are the same.": 1,
        },
        "kvcompress evaluate": {"full cache": 1, "prefixkv+merge": 1, "uniform": 1, "question unseen": 1},
        "kvcompress calibrate": {"wrote profile.json": 1},
        "kvcompress bench": {"DynamicCache": 1, "auto": 1},
        "kvcompress demo --text": {"is used to iterate over": 3, "sequence": 3},
        "kvcompress demo --image": {"row 1 column 1: small green cross. row 1 column 2: large green square.": 3},
    },
    "cli.md": {
        "kvcompress generate --prompt-file -": {"The red box is in the garden.": 1, "19.9%": 1},
        "kvcompress generate --prompt-file story.txt": {"The red box is in the garden.": 2, "19.9%": 1},
        'kvcompress generate --prompt "What is the capital': {"The capital of France is Paris": 1},
        "kvcompress inspect": {"retention over all layers 20.0%": 1},
    },
}


@pytest.fixture(scope="module", autouse=True)
def smollm2_is_read_once() -> Iterator[None]:
    """Reading its file takes longer than what most of the documents do with it; in the dtype whose answers are read."""
    read = functools.cache(smollm2.load)

    def load(dtype: torch.dtype) -> Any:
        model, tokenizer = read(torch.float32)
        restore(model)
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "load", load)
        yield


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def command_lines(page: Path, start: str = "kvcompress") -> list[str]:
    joined = "\n".join(blocks(page, "sh") + blocks(page, "bash") + blocks(page, "console")).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from kvcompress import ALLOCATORS

    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})
    out = capsys.readouterr().out
    assert out
    for words, times in SAID.get(page.name, {}).items():
        assert out.count(words) >= times, out


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in command_lines(page)], ids=lambda given: str(given)
)
def test_command_lines_run(page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1200")  # so that no answer is broken over lines
    monkeypatch.setattr(demo, "_ANSWER_TOKENS", 20)
    if page.name != "README.md" and line.startswith("kvcompress demo"):
        line += " --help"  # the same line as README's
    for before in command_lines(page, "python -c"):  # they write what the commands after them read
        _, _, code, _, file = shlex.split(before)
        with redirect_stdout(io.StringIO()) as written:
            exec(code, {})
        Path(file).write_text(written.getvalue())
    line, _, stdin = line.partition(" < ")
    result = CliRunner().invoke(app, shlex.split(line)[1:], input=Path(stdin).read_text() if stdin else None)
    assert result.exit_code == 0, result.output
    assert "warning: the budget" not in result.stderr, result.output  # an example has a budget that can be met
    for start, expected in PRINTED.get(page.name, {}).items():
        if line.startswith(start):
            assert all(result.stdout.count(words) >= times for words, times in expected.items()), result.output


def test_every_command_of_the_first_page_has_an_answer_to_be_read() -> None:
    for line in command_lines(ROOT / "README.md"):
        assert any(line.startswith(start) for start in PRINTED["README.md"]), line


MADE = re.findall(r"`(CompressedCache\(model.*?\))`", (ROOT / "docs" / "moving.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("made", MADE)
def test_a_cache_that_stands_for_another_packages_can_be_made(made: str) -> None:
    model = tiny.model("llama")
    cache = eval(made, {"model": model, "CompressedCache": CompressedCache})
    model.generate(**tiny.inputs("llama", 1000, seed=0), **cache_argument(cache), max_new_tokens=3)
    keeps_all = cache.config.evictor is None
    assert (cache.report().retention == 1.0) if keeps_all else (0.1 < cache.report().retention < 0.21)


def test_what_pages_print_is_of_their_commands() -> None:
    for page in PAGES:
        for start in PRINTED.get(page.name, ()):
            assert any(line.startswith(start) for line in command_lines(page)), start


def test_no_command_compares_a_cache_that_keeps_a_short_prompt_whole() -> None:
    for line in [line for page in PAGES for line in command_lines(page) if "--compare" in line]:
        assert "--prompt-file" in line, line


@pytest.mark.parametrize(
    "name",
    [
        "kvcompress.policies.registry",
        "kvcompress.config.compression",
        "kvcompress.cache.cache",
        "kvcompress.evaluation.inspection",
        "kvcompress.evaluation.benchmark",
        "kvcompress.reuse.chat",
        "kvcompress.reuse.document",
        "kvcompress.reuse.session",
    ],
)
def test_examples_in_docstrings_run(name: str, tmp_path: Path) -> None:
    given = {
        "model": checkpoints.text_model() if ".reuse." in name else tiny.model("llama"),
        "tokenizer": checkpoints.text_tokenizer(),
        "folder": tmp_path,
        "inputs": tiny.inputs("llama", 40, seed=0),
        "CompressedCache": CompressedCache,
    }
    results = doctest.testmod(importlib.import_module(name), extraglobs=given)
    assert results.attempted and not results.failed
