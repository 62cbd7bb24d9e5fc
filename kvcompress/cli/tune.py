"""`kvcompress tune`: how small the cache can be before a loss that the user names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from kvcompress.cli.configuration import check_output, import_modules
from kvcompress.cli.console import output as result_console
from kvcompress.cli.console import print_json, reported, warn, working
from kvcompress.cli.evaluate import configurations, split
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    DtypeName,
    ModelName,
    Modules,
    Overwrite,
    Question,
    QuestionMode,
)
from kvcompress.config import CompressionConfig
from kvcompress.errors import BudgetWarning, ConfigError
from kvcompress.evaluation.data import Sample, check_mode, load_samples
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.metrics import METRICS, PERPLEXITY, check_metrics
from kvcompress.evaluation.repetition import check_asked
from kvcompress.evaluation.results import check_results_file
from kvcompress.evaluation.runner import Progress
from kvcompress.evaluation.tuning import STEP, Bound, Tuning, most_trials, tune
from kvcompress.files.writing import OVERWRITE
from kvcompress.markup import size

EPILOG = """
[bold]Examples[/bold]

kvcompress tune --model shapes --data shapes:kind=cell --samples 20 --min-accuracy 95% --output tuned.yaml

kvcompress tune --data text --samples 4 --preset text,snapkv --max-ppl-increase 2% --step 0.05 --output tuned.yaml

kvcompress generate --config tuned.yaml --prompt "Hello"
"""


def tune_command(
    model: ModelName = "smollm2",
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="A .json, .jsonl or .txt file, or shapes, pages, needle, text; see docs/evaluation.md.",
        ),
    ] = "text",
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the images of a file are; beside it if left out.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Named configurations; repeatable, or with commas.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A .yaml or .json configuration; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Sets a field of every configuration; repeatable."),
    ] = None,
    modules: Modules = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="2% or 0.02: how much perplexity may rise over the full cache's."),
    ] = None,
    min_accuracy: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="0.95: of all answers right; 95%: of those right with the full cache."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What accuracy is: exact (scenes), recall (needles), contained (all others), ..."
        ),
    ] = None,
    step: Annotated[float, typer.Option(metavar="SHARE", help="Budgets are multiples of it.")] = STEP,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N; all, or the built-in data's own number.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a generated answer.")] = 64,
    question: QuestionMode = Question.seen,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of generated data and of draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The winner's configuration: .yaml, .yml or .json.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .jsonl for all trials; a stopped run goes on there.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Finds the smallest budget whose loss stays within bounds, and writes it as a configuration."""
    with reported(as_json=as_json, debug=debug), warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # small budgets are tried on purpose
        import_modules(modules or [])
        configs = configurations(split(preset), config or [], settings or [])
        check_asked(question.value, configs)
        chosen = load_samples(data, images=images, limit=samples, seed=seed)
        check_mode(question.value, chosen)
        bounds = _bounds(max_ppl_increase, min_accuracy, metric, chosen)
        processes = Processes.current(device)
        try:
            if output is not None:
                # a run that goes on from former trials may find the file that it has written
                goes_on = results is not None and results.exists()
                processes.from_first(lambda: check_output(output, overwrite=overwrite or goes_on))
            if results is not None:
                processes.from_first(lambda: check_results_file(results))
            loaded = load_with_spinner(model, dtype.value, processes.device)
            with working("the full cache") as spinner:
                trials = most_trials(configs, step)
                found = tune(
                    loaded,
                    chosen,
                    configs,
                    bounds,
                    step=step,
                    results=results,
                    on_progress=lambda progress: spinner.update(_line(progress, trials)),
                    processes=processes,
                    source=data,
                    max_new_tokens=max_new_tokens,
                    question=question.value,
                    seed=seed,
                )
        finally:
            processes.leave()
        if processes.first:
            if found.winner is not None and output is not None:
                _write(found.winner.config, output, overwrite=overwrite)
            _conclude(found, list(configs), bounds, output, as_json=as_json)


def _bounds(increase: str | None, accuracy: str | None, metric: str | None, samples: list[Sample]) -> list[Bound]:
    found = []
    if increase is not None:
        found.append(Bound(PERPLEXITY, 1 + _share("max-ppl-increase", increase), relative=True))
    if accuracy is not None:
        drawn = all(sample.picture is not None for sample in samples)
        usual = "exact" if drawn else "recall" if all(sample.kind == "needle" for sample in samples) else "contained"
        check_metrics([metric or usual])
        if not METRICS[metric or usual].higher_is_better:
            raise ConfigError(f"metric: '{metric}' is no accuracy; bound it with --max-ppl-increase")
        found.append(Bound(metric or usual, _share("min-accuracy", accuracy), relative=accuracy.strip().endswith("%")))
    if not found:
        raise ConfigError("bounds: there are none; give --max-ppl-increase, --min-accuracy or both")
    return found


def _share(option: str, text: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{option}: must be a share from 0 to 1, or 0% to 100%; got '{text}'")
    return share


def _line(progress: Progress, trials: int) -> str:
    done = progress.done - (len(progress.cells) - 1) * progress.total // len(progress.cells)
    of = f" (of at most {trials} budgets)" if len(progress.cells) > 1 else ""
    return f"{progress.cell.name}: {max(0, done)} of {progress.total // len(progress.cells)} samples{of}"


def _write(config: CompressionConfig, output: Path, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        if CompressionConfig.load(output) == config:
            return
        raise ConfigError(f"output {output}: holds another configuration; {OVERWRITE}. The trials need no second run")
    config.dump(output)


def _conclude(found: Tuning, policies: list[str], bounds: list[Bound], output: Path | None, *, as_json: bool) -> None:
    winner = found.winner
    for skipped in found.full["skipped_samples"]:
        warn(f"sample '{skipped['sample']}' was skipped: {skipped['reason']}")
    if as_json and winner is not None:
        print_json(_as_json(found, bounds, output))
        return
    if not as_json:
        result_console().print(_table(found, policies, bounds))
    if winner is None:
        missed = ", ".join(_bound_text(bound, found) for bound in bounds)
        raise ConfigError(
            f"bounds: no configuration keeps within them ({missed}), not even with all tokens; loosen them or tune "
            "other configurations"
        )
    where = f"\nwritten to {output}" if output is not None else "\n--output FILE writes it as a configuration"
    result_console().print(f"{winner.policy} with the budget {winner.budget:g} holds the least{where}", markup=False)


def _table(found: Tuning, policies: list[str], bounds: list[Bound]) -> Table:
    title = f"{found.full['model']} ({found.full['dtype']}), {found.full['data']}, question {found.full['question']}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("cache", overflow="fold")
    for head in ("budget", "retention", *(bound.metric for bound in bounds), "key/value cache", "tried"):
        table.add_column(head, justify="right")
    full = found.full
    table.add_row("full cache", "", "", *_cells(full, bounds), size(round(full["kv_bytes"])), "")
    table.add_row("bound", "", "", *(_bound_text(bound, found) for bound in bounds), "", "", end_section=True)
    for policy in policies:
        best, tried = found.best(policy), sum(trial.policy == policy for trial in found.trials)
        row = best.row if best is not None else next(t.row for t in found.trials if t.policy == policy)
        share = "none" if best is None else f"{best.budget:g}"
        cells = _cells(row, bounds)
        table.add_row(policy, share, f"{row['retention']:.3f}", *cells, size(round(row["kv_bytes"])), str(tried))
    return table


def _cells(row: dict[str, Any], bounds: list[Bound]) -> list[str]:
    figures = [row["metrics"][bound.metric] for bound in bounds]
    return [f"{one['value']:.4g} ({one['ci_low']:.4g}-{one['ci_high']:.4g})" for one in figures]


def _bound_text(bound: Bound, found: Tuning) -> str:
    side = "at least" if METRICS[bound.metric].higher_is_better else "at most"
    return f"{side} {bound.worst(found.full):.4g}"


def _as_json(found: Tuning, bounds: list[Bound], output: Path | None) -> dict[str, Any]:
    winner = found.winner
    assert winner is not None
    return {
        "policy": winner.policy,
        "budget": winner.budget,
        "config": winner.config.model_dump(mode="json"),
        "question": found.full["question"],
        "bounds": [{"metric": bound.metric, "worst": bound.worst(found.full)} for bound in bounds],
        "full": found.full,
        "trials": [{"policy": t.policy, "budget": t.budget, "within": t.within, "row": t.row} for t in found.trials],
        "output": None if output is None else str(output),
    }
