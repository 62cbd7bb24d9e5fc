"""The pictures of the documentation show what the code gives, and say what they are of."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA: dict[str, dict[str, Any]] = json.loads((ROOT / "docs/images/data.json").read_text(encoding="utf-8"))
COUNTED = sorted({*DATA} - {"quality", "speed"})
# A band stands for something; of one look into a prompt there is none.
WITH_BANDS = ("quality", "speed", "evaluation-shapes", "evaluation-smollm2")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tools/pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(facts: Any) -> list[float]:
    if isinstance(facts, dict):
        return [number for key in sorted(facts) for number in numbers(facts[key])]
    if isinstance(facts, list):
        return [number for each in facts for number in numbers(each)]
    return [float(facts)] if isinstance(facts, (int, float)) else []


def test_every_picture_is_the_one_that_was_drawn_from_its_data(tool: ModuleType) -> None:
    files = {path.stem: path for path in (ROOT / "docs/images").glob("*.png")}
    assert set(files) == set(DATA) == set(tool.PICTURES)
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == DATA[name]["sha256"], f"{name}: draw it again"


@pytest.mark.parametrize("name", COUNTED)
def test_counted_figures_are_those_that_the_code_gives(name: str, tool: ModuleType) -> None:
    """To the token, but for what rounding on another processor may turn: one number of fifty."""
    caption, facts, _ = tool.PICTURES[name]()
    assert caption == DATA[name]["caption"]
    if name.startswith("patches"):  # in which order a set of columns comes says nothing
        pairs = [
            (set(now), set(then))
            for layers in zip(facts["held"], DATA[name]["facts"]["held"], strict=True)
            for now, then in zip(*layers, strict=True)
        ]
        assert sum(len(now ^ then) for now, then in pairs) <= 0.04 * sum(len(then) for _, then in pairs)
        return
    now, then = numbers(json.loads(json.dumps(facts))), numbers(DATA[name]["facts"])
    assert len(now) == len(then)
    other = sum(abs(a - b) > 0.01 + 0.005 * abs(b) for a, b in zip(now, then, strict=True))
    assert other <= len(now) // 50, (now, then)


@pytest.mark.parametrize(("policy", "budget"), [("full cache", 1.0), ("prefixkv", 0.3), ("snapkv", 0.5)])
def test_perplexities_in_the_picture_are_those_of_the_code(policy: str, budget: float, tool: ModuleType) -> None:
    (values,) = (each[2] for each in DATA["quality"]["facts"]["groups"] if each[:2] == [policy, budget])
    assert tool.group_perplexities(policy, budget, groups=1) == pytest.approx(values[:1], rel=0.05)


@pytest.mark.parametrize("name", sorted(DATA))
def test_a_picture_says_its_model_preset_samples_prompt_and_band(name: str) -> None:
    caption = DATA[name]["caption"]
    assert re.search(r"ShapesLLaVA|SmolLM2-135M", caption) and re.search(r"prompts? of [\w ]*?\d[\d,]* tokens", caption)
    assert re.search(r"one prompt|\d+ (held-out )?(scenes|texts)", caption)
    assert "preset" in caption or name == "quality"  # whose legend names them
    assert ("bands" in caption) == (name in WITH_BANDS)


@pytest.mark.parametrize("page", ["README.md", "docs/pictures.md"])
def test_times_stand_with_processor_and_date_on_their_pages(page: str) -> None:
    facts = DATA["speed"]["facts"]
    words = (ROOT / page).read_text(encoding="utf-8")
    assert facts["measured"]["processor"] in words and facts["measured"]["date"] in words
    per_token = {(row["policy"], row["budget"]): row["seconds_per_token"] for row in facts["rows"]}
    ratio = per_token["auto", 0.2] / next(value for (name, _), value in per_token.items() if name == "DynamicCache")
    (said,) = re.findall(r"a token of `auto` at 20 % takes ([\d.]+)\s+times", " ".join(words.split()))
    assert float(said) == pytest.approx(ratio, abs=0.006)
