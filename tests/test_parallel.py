"""A model whose heads are shared out over processes holds, and says, what it does in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompress.errors import UnsupportedModelError
from kvcompress.parallel import ALONE, head_group
from tests import tensor_parallel, tiny

PROCESSES = 2
CASES = {label: rest for label, *rest in tensor_parallel.cases()}
Played = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Played]:
    """What each of two processes found, case by case."""
    folder = tmp_path_factory.mktemp("models")
    for name in tensor_parallel.MODELS:
        tiny.build(name).save_pretrained(folder / name)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    result = subprocess.run(
        [sys.executable, *launch, "-m", "tests.tensor_parallel", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


def own_sets(columns: Any, rank: int, kv_heads: int) -> Any:
    """What one process should hold of the columns `[layers][batch][sets][tokens]` of all heads."""
    own = slice(rank * kv_heads // PROCESSES, (rank + 1) * kv_heads // PROCESSES)
    return [[sets if len(sets) == 1 else sets[own] for sets in layer] for layer in columns]


@pytest.mark.filterwarnings("ignore::kvcompress.errors.BudgetWarning")
@pytest.mark.parametrize("label", CASES)
def test_every_process_holds_and_says_what_one_process_does(label: str, ranks: list[Played]) -> None:
    name, way, fields = CASES[label]
    model = tiny.model(name)
    alone, kv_heads = tensor_parallel.played(model, name, way, fields), model.config.get_text_config().num_key_value_heads
    for rank, found in enumerate(ranks):
        assert found[label]["tokens"] == alone["tokens"]
        assert found[label]["lengths"] == alone["lengths"]
        assert found[label]["columns"] == own_sets(alone["columns"], rank, kv_heads)
        assert found[label]["croppable"] == alone["croppable"]
    if not CASES[label][2].get("quantizer"):
        assert sum(found[label]["kv_bytes"] for found in ranks) == alone["kv_bytes"]
