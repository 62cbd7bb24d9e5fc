"""The smallest budget whose loss stays within bounds, by bisection."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvcompress.config import CompressionConfig
from kvcompress.errors import BudgetWarning, ConfigError
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.metrics import METRICS, check_metrics
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.repetition import check_asked
from kvcompress.evaluation.results import Row
from kvcompress.evaluation.runner import Progress, evaluate

STEP = 0.01


@dataclass(frozen=True)
class Bound:
    """What a metric may come to.

    Args:
        metric: a name in `METRICS`.
        limit: the worst value allowed: the highest for perplexity, the lowest for all others.
        relative: whether the limit is a multiple of what the full cache has.
    """

    metric: str
    limit: float
    relative: bool = False

    def worst(self, full: Row) -> float:
        """The worst value allowed, given the full cache's results."""
        return self.limit * _value(full, self.metric) if self.relative else self.limit

    def holds(self, row: Row, full: Row) -> bool:
        """Whether a cache's results are within the bound; both are rounded to nine digits, as sums of floats are."""
        value, worst = round(_value(row, self.metric), 9), round(self.worst(full), 9)
        return value >= worst if METRICS[self.metric].higher_is_better else value <= worst


@dataclass(frozen=True)
class Trial:
    """One budget that was tried.

    Attributes:
        policy: name of the configuration.
        config: with the budget.
        budget: the fraction.
        within: whether every bound holds.
        row: its results, as `evaluate` gives them.
    """

    policy: str
    config: CompressionConfig
    budget: float
    within: bool
    row: Row


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        full: the full cache's results.
        trials: every budget that was tried, in that order.
    """

    full: Row
    trials: list[Trial]

    def best(self, policy: str) -> Trial | None:
        """The smallest budget of a configuration within the bounds; None if not even all tokens are."""
        within = [trial for trial in self.trials if trial.policy == policy and trial.within]
        return min(within, key=lambda trial: trial.budget, default=None)

    @property
    def winner(self) -> Trial | None:
        """The configuration within the bounds that holds the fewest bytes; None if there is none."""
        found = [best for policy in dict.fromkeys(trial.policy for trial in self.trials) if (best := self.best(policy))]
        return min(found, key=lambda trial: trial.row["kv_bytes"], default=None)


def tune(
    loaded: LoadedModel,
    data: str | Sequence[Sample],
    configs: Mapping[str, CompressionConfig],
    bounds: Sequence[Bound],
    *,
    step: float = STEP,
    results: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    progress: bool = False,
    processes: Processes | None = None,
    **settings: Any,
) -> Tuning:
    """Finds for each configuration the smallest budget, in multiples of a step, that stays within every bound.

    All tokens are tried first: a configuration that is out of bounds even then (quantizers lose something too) is done.
    From there on the range is halved, on the assumption that less budget is never better. Where that is not so, the
    budget found is still one that was measured to be within, but smaller ones may be too. A configuration that never
    evicts is tried as it is.

    Args:
        loaded: the model.
        data: as for `evaluate`.
        configs: policies by name; of their budgets, sinks and recents count.
        bounds: what must hold, all of it.
        step: distance of the budgets, above 0 and at most 0.5.
        results: a .jsonl file for the results of all trials, with which a stopped run goes on; None keeps none.
        on_progress: is told how far each trial is, in the first process alone.
        progress: whether a bar on stderr shows it for each trial, likewise.
        processes: as for `evaluate`; all find the same.
        **settings: of `evaluate`: images, limit, max_new_tokens, question, seed, source.

    Raises:
        ConfigError: if there is no bound or no configuration, the step is out of range, or `evaluate` refuses.
    """
    if not bounds or not configs:
        raise ConfigError(f"{'bounds' if configs else 'configs'}: there are none; give at least one")
    if not 0 < step <= 0.5:
        raise ConfigError(f"step: must be above 0 and at most 0.5; got {step}")
    check_asked(settings.get("question", "seen"), configs)
    metrics = check_metrics(bound.metric for bound in bounds)
    processes = Processes.current() if processes is None else processes
    with tempfile.TemporaryDirectory() as folder:  # the full cache is evaluated once, then read from the file
        file = results or Path(folder) / "trials.jsonl"
        settings |= {"metrics": metrics, "output": file, "on_progress": on_progress, "processes": processes}
        settings["progress"] = progress
        full = evaluate(loaded, data, {}, **settings)[0]

        def measure(policy: str, config: CompressionConfig, budget: float) -> Trial:
            own = config if config.evictor is None else config.override(budget=budget)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BudgetWarning)  # small budgets are tried on purpose
                row = evaluate(loaded, data, {policy: own}, **settings)[1]
            return Trial(policy, own, budget, all(bound.holds(row, full) for bound in bounds), row)

        trials: list[Trial] = []
        for policy, config in configs.items():
            trials += _bisect(partial(measure, policy, config), config, step)
    return Tuning(full, trials)


def most_trials(configs: Mapping[str, CompressionConfig], step: float) -> int:
    """Budgets that tuning tries at most, the full cache not counted."""
    halvings = (_steps(step) - 1).bit_length()
    return sum(1 if config.evictor is None else 1 + halvings for config in configs.values())


def _bisect(measure: Callable[[float], Trial], config: CompressionConfig, step: float) -> list[Trial]:
    """Trials of one configuration: all tokens, then halves of what is left."""
    trials = [measure(1.0)]
    low, high = 0, _steps(step)
    while trials[0].within and config.evictor is not None and high - low > 1:
        middle = (low + high) // 2
        trials.append(measure(round(middle * step, 9)))
        low, high = (low, middle) if trials[-1].within else (middle, high)
    return trials


def _steps(step: float) -> int:
    """Number of the last budget, all tokens, where they are numbered by steps."""
    return math.ceil(1 / step - 1e-9)


def _value(row: Row, metric: str) -> float:
    return float(row["metrics"][metric]["value"])
