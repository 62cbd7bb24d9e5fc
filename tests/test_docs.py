"""What the documents show runs: Python blocks, command lines, and the examples in docstrings."""

from __future__ import annotations

import doctest
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcompress import CompressedCache, restore
from kvcompress.cli import app
from kvcompress.evaluation import smollm2
from kvcompress.integrations import base
from tests import checkpoints, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SLOW = ("kvcompress demo",)  # minutes; `make demo` runs it
# What the answers on a page must hold, so that it shows no nonsense; what its commands print, by how they begin.
SAID = {"README.md": (" garden.", "auto chose text", "['7', 'nothing']", "The red box is in the garden.")}
PRINTED = {'kvcompress generate --prompt "What is the capital of France?"': ("Paris", "The answers are the same.")}


@pytest.fixture(scope="module", autouse=True)
def smollm2_is_read_once() -> Iterator[None]:
    """Reading its file takes longer than what most of the documents do with it."""
    read = functools.cache(smollm2.load)

    def load(*given: Any) -> Any:
        model, tokenizer = read(*given)
        restore(model)
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "load", load)
        yield


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def command_lines(page: Path) -> list[str]:
    joined = "\n".join(blocks(page, "sh") + blocks(page, "bash") + blocks(page, "console")).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line.startswith("kvcompress")]


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
    for words in SAID.get(page.name, ()):
        assert words in out, out


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in command_lines(page)], ids=lambda given: str(given)
)
def test_command_lines_run(page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if line.startswith(_SLOW):
        line += " --help"
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    for start, expected in PRINTED.items():
        if line.startswith(start):
            assert all(words in result.output for words in expected), result.output


def test_what_must_be_said_is_asked_on_the_page() -> None:
    assert all((ROOT / page).exists() for page in SAID)
    lines = command_lines(ROOT / "README.md")
    assert all(any(line.startswith(start) for line in lines) for start in PRINTED)


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
