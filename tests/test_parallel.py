"""A model whose heads are shared out over processes holds, and says, what it does in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvcompress.errors import UnsupportedModelError
from kvcompress.parallel import ALONE, HeadGroup, head_group
from tests import tensor_parallel, tiny

PROCESSES = 2


def launched(folder: Path) -> list[dict[str, Any]]:
    """What each of several processes that share the heads of the tiny models found."""
    for name in tensor_parallel.MODELS:
        tiny.build(name).save_pretrained(folder / name)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    result = subprocess.run(
        [sys.executable, *launch, "-m", "tests.tensor_parallel", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


def own_sets(positions: Any, rank: int, kv_heads: int) -> Any:
    """What one process should hold of the positions `[layers][batch][sets]` of all heads."""
    own = slice(rank * kv_heads // PROCESSES, (rank + 1) * kv_heads // PROCESSES)
    return [[sets if len(sets) == 1 else sets[own] for sets in layer] for layer in positions]


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")  # saving models tells of their generation settings
def test_every_process_holds_and_says_what_one_process_does(tmp_path: Path) -> None:
    ranks = launched(tmp_path)  # once for everything, since starting processes takes longest

    wrong = []
    for label, name, way, fields in tensor_parallel.cases():
        model = tiny.model(name)
        kv_heads = model.config.get_text_config().num_key_value_heads
        alone = json.loads(json.dumps(tensor_parallel.played(model, name, way, fields)))
        for rank, found in enumerate(ranks):
            expected = {**alone, "positions": own_sets(alone["positions"], rank, kv_heads)}
            expected["kv_bytes"] = found[label]["kv_bytes"]
            expected["packed"] = own_sets(alone["packed"], rank, kv_heads)
            of_heads = alone["head_lengths"]
            if of_heads is not None:
                own = own_sets(of_heads, rank, kv_heads)
                expected["lengths"] = [[round(sum(heads) / len(heads)) for heads in rows] for rows in own]
                expected["head_lengths"] = own if kv_heads > PROCESSES else None
            expected["logits"] = pytest.approx(alone["logits"], abs=1e-5)
            wrong += [f"{label}: {key}, rank {rank}" for key in expected if found[label][key] != expected[key]]
        rows, slot = len(alone["lengths"][0]), 2 * 8 * 4
        grown = 0 if alone["head_lengths"] is None else 3 * rows * kv_heads * 16 * slot  # each grows when it must
        apart = abs(sum(found[label]["kv_bytes"] for found in ranks) - alone["kv_bytes"])
        if "quantizer" not in label and apart > grown:
            wrong.append(f"{label}: bytes of the processes do not add up")
    assert not wrong

    for found in ranks:
        prompt, step = found["sent"]["model"]
        assert found["sent"]["prefixkv"] == [prompt + 3, step]  # once a layer for a prompt, never for a step
        assert found["sent"]["uniform"] == [prompt + 3, step]
        assert found["sent"]["streaming"] == [prompt, step]
        assert found["sent"]["lowest score"][1] > step
        assert found["bare decoder"] == PROCESSES
        assert found["refused"].startswith("UnsupportedModelError: model: each of the 2 processes must hold")
    assert ranks[0]["whole"] == ranks[1]["whole"]
    model = tiny.model("llama")
    alone = json.loads(json.dumps(tensor_parallel.played(model, "llama", "generate", {})))
    assert ranks[0]["whole"] == {**alone, "logits": pytest.approx(alone["logits"], abs=1e-5)}


class Mesh:
    """A device mesh of so many processes along each axis."""

    def __init__(self, **axes: int) -> None:
        self.mesh_dim_names = tuple(axes)
        self.ndim = len(axes)
        self.device_type = "cpu"
        self._sizes = tuple(axes.values())

    def size(self, axis: int) -> int:
        return self._sizes[axis]

    def __getitem__(self, name: str) -> Mesh:
        return self

    def get_group(self) -> str:
        return "group"

    def get_local_rank(self) -> int:
        return 1


def attentions(*rows: tuple[int, int, int], head_dim: int = 8) -> list[nn.Module]:
    """Attention modules whose projections have so many rows each."""
    layers = []
    for counts in rows:
        layer = nn.Module()
        layer.head_dim = head_dim  # type: ignore[assignment]
        for name, count in zip(("q_proj", "k_proj", "v_proj"), counts, strict=True):
            setattr(layer, name, nn.Linear(4, count))
        layers.append(layer)
    return layers


def test_equal_shares_of_whole_heads_make_a_group_and_whole_layers_make_none() -> None:
    shared, whole = attentions((32, 16, 16), (32, 16, 16)), attentions((64, 32, 32))
    assert head_group(shared, 8, 4, Mesh(pp=1, fsdp=1, tp=2)) == HeadGroup("group", 1, 2, "cpu")
    assert head_group(whole, 8, 4, Mesh(pp=1, fsdp=1, tp=2)) is ALONE
    assert head_group(whole, 8, 4, Mesh(fsdp=2)) is ALONE
    assert head_group(whole, 8, 4, None) is ALONE


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "mesh", "said"),
    [
        ([(24, 12, 12)], 6, 3, Mesh(tp=2), "layer 0: k_proj has 12 of 24 rows"),  # half a head each
        ([(32, 32, 32)], 8, 4, Mesh(tp=2), "layer 0: k_proj has 32 of 32 rows"),  # key/value heads held by everyone
        ([(32, 16, 16), (64, 32, 32)], 8, 4, Mesh(tp=2), "layer 1: q_proj has 64 of 64 rows"),
        ([(24, 16, 16)], 8, 4, Mesh(tp=2), "layer 0: q_proj has 24 of 64 rows"),
        ([(32, 16, 16)], 8, 4, Mesh(pp=2, tp=2), "pipeline parallelism"),
    ],
)
def test_heads_shared_out_in_other_ways_are_refused(
    rows: list[tuple[int, int, int]], heads: int, kv_heads: int, mesh: Mesh, said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        head_group(attentions(*rows), heads, kv_heads, mesh)


def test_fused_projections_are_refused_with_a_way_out() -> None:
    fused = nn.ModuleDict({"qkv_proj": nn.Linear(4, 32)})
    with pytest.raises(UnsupportedModelError, match="q_proj has no weight here"):
        head_group([fused], 4, 4, Mesh(tp=2))


def test_a_process_alone_gives_back_what_it_got() -> None:
    tensor = torch.randn(2, 4, 5)
    for method in (ALONE.gather, ALONE.own, ALONE.mean):
        assert method(tensor) is tensor


def test_a_rank_owns_its_run_of_heads_and_shares_a_single_set() -> None:
    heads, one = torch.arange(6).view(1, 6, 1), torch.ones(1, 1, 5)
    group = HeadGroup("group", rank=1, size=3)
    assert group.own(heads).flatten().tolist() == [2, 3]
    assert group.own(one) is one
    assert group.first(2) == 2
