"""Progress bars of the Python API: on stderr, to the end, and only for those who ask."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvcompress import CompressionConfig, Document
from kvcompress.evaluation import LoadedModel, evaluate, load_model
from kvcompress.evaluation.benchmark import benchmark
from kvcompress.evaluation.calibration import calibrate
from kvcompress.evaluation.captions import caption_images
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.tuning import Bound, tune
from tests import checkpoints

SAMPLES = [Sample(name, prompt="where is the key " * 12, answer="here") for name in ("one", "two")]
BOUNDS = [Bound("perplexity", 9.0, relative=True)]
HALF = CompressionConfig.preset("uniform", budget=0.5)


@pytest.fixture(scope="module")
def text() -> LoadedModel:
    return LoadedModel("tiny", checkpoints.text_model(), checkpoints.text_tokenizer())


def document(loaded: LoadedModel, folder: Path, **given: Any) -> Any:
    asked = Document(loaded.model, loaded.tokenizer, "the key is under the mat " * 4, config=HALF)
    return asked.ask(["where?", "who?", "when?"], max_new_tokens=2, batch_size=2, **given)


def captions(loaded: LoadedModel, folder: Path, **given: Any) -> Any:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / name)
    sighted = load_model("shapes")
    return caption_images(sighted, sorted(folder.glob("*.png")), "what?", HALF, 2, batch_size=2, **given)


def measured(loaded: LoadedModel, folder: Path, **given: Any) -> Any:
    settings = {"prompt_tokens": [20], "rounds": 1, "new_tokens": 2, "references": ["DynamicCache"]}
    return [one.policy for one in benchmark(loaded, [("uniform", HALF)], **settings, **given)]


WORKS: dict[str, tuple[Callable[..., Any], str]] = {
    "calibrate": (lambda m, f, **g: calibrate(m, HALF, SAMPLES, budgets=[0.5], **g), "prompts read .* 2/2 "),
    "evaluate": (lambda m, f, **g: evaluate(m, SAMPLES, {"mine": HALF}, metrics=["perplexity"], **g), "mine .* 4/4 "),
    "tune": (
        lambda m, f, **g: tune(m, SAMPLES, {"mine": HALF}, [Bound("perplexity", 9.0, True)], step=0.5, **g),
        "mine .* 4/4 ",
    ),
    "benchmark": (measured, "rounds .* 4/4 "),
    "ask": (document, "questions .* 3/3 "),
    "caption": (captions, "images .* 3/3 "),
}


@pytest.mark.parametrize("name", WORKS)
def test_progress_is_shown_to_the_end_on_stderr_where_it_is_asked_for(
    name: str, text: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, says = WORKS[name]
    work(text, tmp_path, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert any(re.search(says, line) for line in shown.err.splitlines()), shown.err
    work(text, tmp_path)
    quiet = capsys.readouterr()
    assert quiet.out == "" and quiet.err == ""
