"""Compiled decode steps: the tokens and the report of eager ones, in one graph for all steps and for a second cache."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.compiled_codes import CASES, OWN_LOOP


@pytest.mark.parametrize("case", [*CASES, OWN_LOOP])
def test_forty_steps_are_one_graph_that_serves_the_next_cache_too(case: str) -> None:
    """In a process of its own: the type checks that tests put on every function are none of the compiler's business."""
    done = subprocess.run([sys.executable, "-m", "tests.compiled_codes", case], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
