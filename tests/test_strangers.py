"""Models of strangers: no code that lies in a folder is run, whatever its files ask for."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvcompress
from kvcompress.errors import KVCompressError
from kvcompress.evaluation import load_model
from tests import checkpoints

PACKAGE = Path(kvcompress.__file__).parent
SOURCES = [
    *PACKAGE.rglob("*.py"),
    *(PACKAGE.parent / "examples").glob("*.py"),
    *(PACKAGE.parent / "tools").glob("*.py"),
]
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\npathlib.Path('ran').touch()\n"


def calls(source: Path) -> list[ast.Call]:
    """Every call that may fetch code: `from_pretrained`, `from_config`, `pipeline`, `torch.hub.load`."""
    found = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = ("from_pretrained", "from_config", "pipeline")
    return [call for call in found if getattr(call.func, "attr", getattr(call.func, "id", "")) in names]


def test_every_call_that_loads_something_refuses_its_code() -> None:
    found = [(source, call) for source in SOURCES for call in calls(source)]
    assert len([source for source, _ in found if source.name == "models.py"]) == 6
    for source, call in found:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{source}:{call.lineno}"


def test_nothing_is_unpickled_and_no_yaml_is_read_but_by_the_one_reader() -> None:
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for word in ("pickle.load", "trust_remote_code=True", "weights_only=False", "eval(compile", "shell=True"):
            assert word not in text, source
        if source != PACKAGE / "files/reading.py":
            for word in ("yaml.load", "yaml.safe_load", "json.load("):
                assert word not in text, source
        if source not in (PACKAGE / "files/pictures.py", PACKAGE.parent / "tools/pictures.py"):
            assert "Image.open" not in text, source


def with_code(path: Path, **asks: object) -> None:
    """Adds to a JSON file of a folder what asks for code that lies beside it."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **asks}))
    path.with_name("strange.py").write_text(CODE)


ASKS: dict[str, Callable[[Path], None]] = {
    "config": lambda folder: with_code(
        folder / "config.json", model_type="strange", auto_map={"AutoConfig": "strange.Config"}
    ),
    "model": lambda folder: with_code(folder / "config.json", auto_map={"AutoModelForCausalLM": "strange.Model"}),
    "llava": lambda folder: with_code(
        folder / "config.json", auto_map={"AutoModelForImageTextToText": "strange.Model"}
    ),
    "tokenizer": lambda folder: with_code(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]},
        tokenizer_class="Strange",
    ),
    "processor": lambda folder: with_code(
        folder / "processor_config.json", auto_map={"AutoProcessor": "strange.Processor"}, processor_class="Strange"
    ),
    "kernel": lambda folder: with_code(folder / "config.json", attn_implementation="stranger/kernel"),
    "custom generate": lambda folder: (
        (folder / "custom_generate").mkdir(),
        (folder / "custom_generate/generate.py").write_text(CODE),
        None,
    )[-1],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "text": checkpoints.save_text(tmp_path_factory.mktemp("text")),
        "image": checkpoints.save_image(tmp_path_factory.mktemp("image")),
    }


@pytest.mark.parametrize("kind", ASKS)
def test_a_folder_with_code_is_loaded_without_it_or_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    shutil.copytree(folders["image" if kind in ("llava", "processor") else "text"], folder)
    ASKS[kind](folder)
    try:
        load_model(str(folder))
    except KVCompressError as error:
        assert "\n" not in str(error)
    assert not list(tmp_path.rglob("ran"))


def test_nor_does_yes_on_stdin_run_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["text"], folder)
    ASKS["config"](folder)
    command = [sys.executable, "-m", "kvcompress", "generate", "--model", str(folder), "--prompt", "a"]
    this = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}  # the package that is tested, from whatever folder
    done = subprocess.run(
        command, input="y\n" * 100, capture_output=True, text=True, cwd=tmp_path, env=this, timeout=200
    )
    assert done.returncode == 1 and done.stderr.startswith("error: model "), done.stderr
    assert not list(tmp_path.rglob("ran"))
