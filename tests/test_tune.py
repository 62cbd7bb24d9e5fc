"""Tuning: bisection against trying every budget, and what `kvcompress tune` prints, writes and refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from kvcompress import CompressionConfig
from kvcompress.cli import app
from kvcompress.errors import ConfigError
from kvcompress.evaluation import LoadedModel, evaluate, load_model, read_results, tuning
from kvcompress.evaluation.tuning import Bound, most_trials, tune


class Losses:
    """Stands in for `evaluate`: metrics as functions of policy and budget, and what was asked for."""

    def __init__(self, **metrics: Any) -> None:
        self.metrics, self.asked = metrics, []

    def __call__(self, loaded: Any, data: Any, configs: Any, **settings: Any) -> list[dict[str, Any]]:
        rows = [self.row("full cache", 1.0)]
        for name, config in configs.items():
            budget = config.budget.fraction
            self.asked.append((name, budget))
            rows.append(self.row(name, budget))
        return rows

    def row(self, name: str, budget: float) -> dict[str, Any]:
        metrics = {metric: {"value": of(name, budget)} for metric, of in self.metrics.items()}
        return {"metrics": metrics, "kv_bytes": 1000 * budget}


@functools.cache
def shapes() -> LoadedModel:
    return load_model("shapes")


def search(monkeypatch: pytest.MonkeyPatch, losses: Losses, *bounds: Bound, presets: Any, step: float) -> Any:
    monkeypatch.setattr(tuning, "evaluate", losses)
    configs = {name: CompressionConfig.preset(name) for name in presets}
    return tune(shapes(), "shapes", configs, bounds, step=step)


@given(edge=st.floats(0, 1), step=st.sampled_from([0.5, 0.3, 0.1, 0.07, 0.05, 0.01]))
def test_bisection_finds_what_trying_every_budget_finds(edge: float, step: float) -> None:
    """Where less budget is never better; and it tries few."""
    losses = Losses(exact=lambda name, budget: float(budget >= edge))
    with pytest.MonkeyPatch.context() as patch:
        found = search(patch, losses, Bound("exact", 0.5), presets=["prefixkv"], step=step)
    every = [round(turn * step, 9) for turn in range(1, 101) if round(turn * step, 9) < 1] + [1.0]
    assert found.winner.budget == min(budget for budget in every if budget >= edge)
    assert found.winner.config.budget.fraction == found.winner.budget
    tried = [budget for _, budget in losses.asked]
    assert len(set(tried)) == len(tried) <= most_trials({"prefixkv": found.winner.config}, step)


def test_every_bound_must_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses(exact=lambda name, budget: budget, perplexity=lambda name, budget: 10 / budget)
    accuracy, perplexity = Bound("exact", 0.5, relative=True), Bound("perplexity", 1.25, relative=True)
    for bounds, wanted in (((accuracy,), 0.5), ((perplexity,), 0.8), ((accuracy, perplexity), 0.8)):
        assert search(monkeypatch, losses, *bounds, presets=["prefixkv"], step=0.1).winner.budget == wanted


def test_the_winner_holds_the_fewest_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = {"prefixkv": 0.4, "uniform": 0.3, "snapkv": 0.6, "full cache": 0.0}
    losses = Losses(exact=lambda name, budget: float(budget >= edges[name]))
    found = search(monkeypatch, losses, Bound("exact", 1.0), presets=["prefixkv", "uniform", "snapkv"], step=0.1)
    assert {name: found.best(name).budget for name in ("prefixkv", "uniform", "snapkv")} == {
        name: edges[name] for name in ("prefixkv", "uniform", "snapkv")
    }
    assert (found.winner.policy, found.winner.budget) == ("uniform", 0.3)


def test_what_is_out_of_bounds_with_all_tokens_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses(exact=lambda name, budget: 0.2)
    found = search(monkeypatch, losses, Bound("exact", 0.5), presets=["prefixkv", "kivi4"], step=0.01)
    assert found.winner is None and losses.asked == [("prefixkv", 1.0), ("kivi4", 1.0)]
    losses = Losses(exact=lambda name, budget: 1.0)
    found = search(monkeypatch, losses, Bound("exact", 1.0), presets=["kivi4"], step=0.1)
    assert len(found.trials) == 1 and found.winner.config == CompressionConfig.preset("kivi4")


@pytest.mark.parametrize(
    ("bounds", "presets", "step", "says"),
    [
        ([], ["prefixkv"], 0.1, "bounds: there are none"),
        ([Bound("exact", 1)], [], 0.1, "configs: there are none"),
        ([Bound("exact", 1)], ["prefixkv"], 0.0, "step: must be above 0"),
        ([Bound("exact", 1)], ["prefixkv"], 0.7, "at most 0.5; got 0.7"),
        ([Bound("exakt", 1)], ["prefixkv"], 0.1, "did you mean 'exact'"),
    ],
)
def test_nothing_to_search_is_refused(
    monkeypatch: pytest.MonkeyPatch, bounds: list[Bound], presets: list[str], step: float, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        search(monkeypatch, Losses(), *bounds, presets=presets, step=step)


# -- the command -------------------------------------------------------------------------------------------------------

ON_SHAPES = ("tune", "--model", "shapes", "--data", "shapes:kind=description", "--samples", 2)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_winner_can_be_used_at_once_and_is_within_the_bound(tmp_path: Path) -> None:
    """Measured again from the file, by itself; and one step less is not."""
    output, results = tmp_path / "tuned.yaml", tmp_path / "trials.jsonl"
    given = (*ON_SHAPES, "--preset", "prefixkv,uniform", "--max-ppl-increase", "20%", "--step", 0.25, "--json")
    done = run(*given, "--output", output, "--results", results)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    config = CompressionConfig.load(output)
    assert config == CompressionConfig(**told["config"]) and config.budget.fraction == told["budget"]
    less = max(0.05, told["budget"] - 0.25)
    rows = evaluate(
        shapes(), "shapes:kind=description", {"it": config, "less": config.override(budget=less)}, limit=2,
        metrics=["perplexity"],
    )  # fmt: skip
    full, own, smaller = (row["metrics"]["perplexity"]["value"] for row in rows)
    assert told["bounds"] == [{"metric": "perplexity", "worst": pytest.approx(1.2 * full)}]
    assert own <= 1.2 * full < smaller
    before = results.read_bytes()
    assert len(read_results(results)) == 1 + len(told["trials"])
    again = run(*given, "--output", output, "--results", results)  # finds every trial done
    assert json.loads(again.stdout) == told and results.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give --max-ppl-increase, --min-accuracy or both"),
        (("--max-ppl-increase", "much"), "max-ppl-increase: must be a share"),
        (("--min-accuracy", "95"), "min-accuracy: must be a share from 0 to 1"),
        (("--min-accuracy", "0.9", "--metric", "perplexity"), "is no accuracy"),
        (("--max-ppl-increase", "2%", "--step", "0.9"), "at most 0.5"),
        (("--max-ppl-increase", "2%", "--output", "tuned.txt"), "must end in one of"),
        (("--min-accuracy", "1.0", "--metric", "exact", "--preset", "streaming", "--max-new-tokens", 1), "loosen them"),
    ],
)
def test_what_goes_wrong_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*ON_SHAPES, *(("--output", "tuned.yaml") if "--output" not in arguments else ()), *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and says in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
