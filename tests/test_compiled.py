"""Decoding by compiled steps: one graph for all steps and caches, and the laws that steps in Python keep."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from kvcompress import CompressedCache
from kvcompress.config.presets import PRESETS
from tests import tiny
from tests.strategies import THOROUGH

# Whose steps cannot be compiled, since positions count what each layer got, which the host knows.
IN_PYTHON = {"pyramiddrop"}
# By age, by score, without scores, in periods, quantized, head by head; the thorough profile takes all others as well.
KINDS = ["prefixkv", "h2o", "streaming", "every", "prefixkv+int4", "headprefix"]
OTHERS = [name for name in PRESETS if name not in (*IN_PYTHON, *KINDS)]


def looked_at(*arguments: str) -> dict[str, dict[str, Any]]:
    """What tests/compiled_decoding.py says about presets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_decoding", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["preset"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(found) == [argument for argument in arguments if argument != "--cuda"]
    return found


@pytest.mark.parametrize("names", [KINDS[:2], KINDS[2:], *([OTHERS] if THOROUGH else [])], ids=" ".join)
def test_compiled_steps_keep_the_laws(names: list[str]) -> None:
    """Tokens and what layers hold are those of steps in Python, in padded rows and alone, at any budget, and after."""
    for name, said in looked_at(*names).items():
        assert said == {
            "preset": name,
            "compileable": True,
            "decoding": "compiled",
            "graphs": 1,
            "more graphs": 0,
            "breaks": 0,
            "tokens": True,
            "held": True,
            "after": True,
            "rows": True,
            "identity": True,
        }


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["prefixkv", "h2o", "full"])
def test_generated_code_on_a_gpu_gives_the_tokens_of_steps_in_python(name: str) -> None:
    """In float32 and in a padded batch, for a second cache too."""
    said = looked_at("--cuda", name)[name]
    assert said == {"preset": name, "decoding": ["eager", "compiled", "compiled"], "tokens": True}


@pytest.mark.parametrize("name", PRESETS)
def test_a_cache_says_whether_its_steps_compile(name: str) -> None:
    """Not where positions are a layer's own or freed slots are merged, and never while the past is recorded."""
    cache = CompressedCache(tiny.model("llava" if "light" in name else "llama"), name)
    assert cache.is_compileable == (name not in IN_PYTHON)
    cache.activate_past_recording()
    assert not cache.is_compileable


def test_steps_that_merge_what_they_free_run_in_python() -> None:
    cache = CompressedCache(tiny.model("llama"), "prefixkv", merger={"name": "threshold", "decoding": True})
    assert not cache.is_compileable
