"""Compiled steps over quantized tokens, and as kernels are called: one graph for all steps and the next cache."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.compiled_codes import CASES, OWN_LOOP
from tests.strategies import THOROUGH

# The thorough profile takes all others as well.
KINDS = [
    "prefixkv+int4",
    "kivi4, nothing quantized yet",
    "headprefix+int4",
    "kivi4, as kernels are called",
    "a quantizer of one's own",
]
OTHERS = [name for name in (*CASES, OWN_LOOP) if name not in KINDS]


@pytest.mark.parametrize("names", [KINDS[:2], KINDS[2:], *([OTHERS] if THOROUGH else [])], ids="; ".join)
def test_forty_steps_are_one_graph_that_serves_the_next_cache_too(names: list[str]) -> None:
    """In a process of its own: the type checks that tests put on every function are none of the compiler's business."""
    done = subprocess.run([sys.executable, "-m", "tests.compiled_codes", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
