"""Calibration: what it estimates is what caches do, and what `kvcompress calibrate` prints, writes and refuses."""

from __future__ import annotations

import functools
import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kvcompress import CompressedCache, CompressionConfig, __version__
from kvcompress.cli import app
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import BudgetWarning, ConfigError
from kvcompress.evaluation import LoadedModel, load_model
from kvcompress.evaluation.calibration import calibrate, retentions
from kvcompress.evaluation.data import Sample, data_hash, encode_sample, load_samples
from tests import forks, tiny
from tests.test_profile import write_prefixkv


@functools.cache
def shapes() -> LoadedModel:
    return load_model("shapes")


@functools.cache
def scenes(count: int = 3) -> list[Sample]:
    return load_samples("shapes", limit=count)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- what it estimates -------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("preset", ["prefixkv", "snapkv", "pyramidkv", "vlcache", "cake", "prefixkv+int4", "streaming"])
def test_one_prefill_gives_what_a_cache_of_each_budget_keeps(preset: str) -> None:
    """Whatever the allocator reads: nothing, importance, or statistics."""
    config = CompressionConfig.preset(preset)
    config = config.override(budget=config.budget.model_copy(update={"recent": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        found = retentions(shapes(), config, scenes(1), (0.2, 0.55, 0.9))[0]
        for budget, shares in zip((0.2, 0.55, 0.9), found.tolist(), strict=True):
            cache = CompressedCache(shapes().model, config, budget=budget)
            shapes().model(**encode_sample(shapes(), scenes(1)[0]), **tiny.with_cache(cache))
            seen = cache.report().tokens_seen
            assert [rows[0] for rows in cache.report().layer_lengths] == [round(share * seen) for share in shares]


@torch.inference_mode()
def test_heads_are_estimated_where_the_allocator_sizes_them(tmp_path: Path) -> None:
    """A profile of heads, from its file too, gives them what the allocator gave the only sample; others are refused."""
    config = CompressionConfig.preset("headprefix")
    calibrate(shapes(), config, scenes(1), budgets=(0.3,)).dump(tmp_path / "heads.json")
    profile = LayerProfile.load(tmp_path / "heads.json")
    assert (profile.layers, profile.heads) == (8, len(profile.retention[0]) // 8) and profile.heads > 1
    layers = [
        sum(profile.retention[0][at : at + profile.heads]) / profile.heads for at in range(0, 8 * profile.heads, 4)
    ]
    assert profile.layer_retention == [pytest.approx(layers)]
    held = []
    for cache in (
        CompressedCache(shapes().model, config, budget=0.3),
        CompressedCache(shapes().model, "prefixkv", budget=0.3, profile=tmp_path / "heads.json"),
    ):
        shapes().model(**encode_sample(shapes(), scenes(1)[0]), **tiny.with_cache(cache))
        held.append(cache.report().head_lengths)
    assert held[0] == held[1] is not None
    with pytest.raises(ConfigError, match="are not 3 heads for each"):
        LayerProfile(budgets=[0.5], retention=[[0.5] * 8], heads=3)


def test_a_profile_is_mean_and_spread_over_the_samples() -> None:
    config = CompressionConfig.preset("prefixkv")
    told: list[int] = []
    profile = calibrate(shapes(), config, scenes(), budgets=(0.6, 0.2), data="shapes", on_sample=told.append)
    single = [calibrate(shapes(), config, [sample], budgets=(0.2, 0.6)) for sample in scenes()]
    each = torch.tensor([one.retention for one in single], dtype=torch.float64)
    assert profile.budgets == [0.2, 0.6] and profile.samples == 3 and told == [1, 2, 3]
    torch.testing.assert_close(torch.tensor(profile.retention, dtype=torch.float64), each.mean(0))
    torch.testing.assert_close(torch.tensor(profile.spread, dtype=torch.float64), each.std(0))
    assert single[0].spread == [[0.0] * 8] * 2
    assert (profile.data, profile.data_hash, profile.version) == ("shapes", data_hash(scenes()), __version__)
    assert profile.config == config
    for budget, shares in zip(profile.budgets, profile.retention, strict=True):
        assert sum(shares) / 8 == pytest.approx(budget, abs=0.01)  # tokens are whole


@torch.inference_mode()
def test_a_cache_with_the_profile_of_a_prompt_keeps_what_it_was_estimated_to() -> None:
    """So layer sizes from expensive scores serve a cache that scores none."""
    config = CompressionConfig.preset("prefixkv", budget=0.4)
    profile = calibrate(shapes(), config, scenes(1), budgets=(0.4,))
    inputs = encode_sample(shapes(), scenes(1)[0])
    with_scores = CompressedCache(shapes().model, config)
    without = CompressedCache(shapes().model, "streaming", budget=0.4, profile=profile)
    for cache in (with_scores, without):
        shapes().model(**inputs, **tiny.with_cache(cache))
    assert without.report().layer_lengths == with_scores.report().layer_lengths
    assert len({rows[0] for rows in without.report().layer_lengths}) > 1


def test_sinks_and_recents_over_the_budget_are_told_once() -> None:
    config = CompressionConfig.preset("prefixkv", budget={"fraction": 0.5, "sink": 10, "recent": 10})
    with pytest.warns(BudgetWarning, match="in 3 of 3 samples the budget of") as caught:
        retentions(shapes(), config, scenes(), (0.01, 0.02))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("config", "samples", "budgets", "says"),
    [
        ("prefixkv", 0, (0.5,), "samples: there are none"),
        ("prefixkv", 1, (), "budgets: must be fractions"),
        ("prefixkv", 1, (0.5, 1.5), "got 1.5"),
        ("prefixkv", 1, (0.0,), "got 0.0"),
        ("full", 1, (0.5,), "keeps everything"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(config: str, samples: int, budgets: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        calibrate(shapes(), CompressionConfig.preset(config), scenes()[:samples], budgets=budgets)


def test_ten_samples_give_the_retention_of_many() -> None:
    """Mean absolute difference over layers and budgets, on scenes that are not among the ten."""
    found = retentions(shapes(), CompressionConfig.preset("prefixkv"), scenes(40), (0.2, 0.5, 0.8))
    assert (found[:10].mean(0) - found[10:].mean(0)).abs().mean() < 0.05


# -- the command -------------------------------------------------------------------------------------------------------

ON_SHAPES = ("calibrate", "--model", "shapes", "--data", "shapes", "--samples", 2)


def test_the_command_writes_what_python_gives(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    result = run(*ON_SHAPES, "--budget", "0.3,0.6", "--output", path)
    assert result.exit_code == 0, result.output
    wanted = calibrate(shapes(), CompressionConfig.preset("prefixkv"), scenes(2), budgets=(0.3, 0.6), data="shapes")
    assert LayerProfile.load(path) == wanted
    table = result.stdout.splitlines()
    for layer in range(8):
        row = next(line for line in table if line.split()[:1] == [str(layer)])
        for retention, spread in zip(wanted.retention, wanted.spread, strict=True):
            assert f"{retention[layer]:.3f} ±{spread[layer]:.3f}" in row
    CompressedCache(shapes().model, "prefixkv", profile=path)


def test_json_is_the_profile(tmp_path: Path) -> None:
    result = run(*ON_SHAPES, "--preset", "snapkv", "--budget", 0.5, "--json", "--output", tmp_path / "profile.json")
    assert result.exit_code == 0, result.output
    assert LayerProfile(**json.loads(result.stdout)) == LayerProfile.load(tmp_path / "profile.json")
    assert json.loads(result.stdout)["config"]["scorer"]["name"] == "snapkv"


def test_prefixkv_s_files_become_a_profile(tmp_path: Path) -> None:
    written = write_prefixkv(tmp_path / "confs", "prefixkv_llava-v1.5-7b_")
    path = tmp_path / "profile.json"
    result = run("calibrate", "--from-prefixkv", tmp_path / "confs", "--output", path)
    assert result.exit_code == 0, result.output
    profile = LayerProfile.load(path)
    assert profile.budgets[0] == pytest.approx(0.1)
    assert profile.retention[0] == pytest.approx([1 - share for share in written[0.9]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--output", "empty.jsonl/p.json"), "cannot be written"),
        (("--output", "p.txt"), "must end in one of .json"),
        (("--output", "p.json", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--output", "p.json", "--data", "empty.jsonl"), "no samples"),
        (("--output", "p.json", "--budget", "1.5"), "fractions above 0 and up to 1; got 1.5"),
        (("--output", "p.json", "--budget", "64MiB"), "shares of the tokens"),
        (("--output", "p.json", "--preset", "full"), "keeps everything"),
        (("--output", "p.json", "--preset", "prefxkv"), "did you mean 'prefixkv'"),
        (("--output", "p.json", "--from-prefixkv", "nowhere"), "has no .json file"),
    ],
)
def test_what_goes_wrong_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    result = run(*ON_SHAPES, *arguments)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith("error: ") and says in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """Each reads its share of three prompts; the first writes, bit for bit the same."""
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    wanted = ("calibrate", "--model", "shapes", "--data", "shapes", "--samples", 3, "--device", "cpu", "--budget", 0.4)
    assert run(*wanted, "--output", alone).exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        forks.Command(
            tmp_path / f"said{rank}", *wanted, "--output", together,
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in "01"
    ]  # fmt: skip
    ended = [process.wait() for process in started]
    assert [process.code for process in ended] == [0, 0], ended
    assert together.read_text() == alone.read_text()
    assert [process.stdout.count("wrote ") for process in ended] == [1, 0]
