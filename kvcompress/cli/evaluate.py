"""`kvcompress evaluate`: what each cache costs in quality, and what it saves, on data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from kvcompress.cli.configuration import import_modules, parse_budget, read_config
from kvcompress.cli.console import output as result_console
from kvcompress.cli.console import print_json, reported, warn
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.grid import WIDE, GridDisplay, results_table
from kvcompress.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    DtypeName,
    ModelName,
    Modules,
    PlotFolder,
    Question,
    QuestionMode,
)
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation import evaluate as evaluate_grid
from kvcompress.evaluation.data import check_mode, load_samples
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.grid import cells_of
from kvcompress.evaluation.metrics import METRICS, check_metrics
from kvcompress.evaluation.plots import check_pictures, plot_results, save_all
from kvcompress.evaluation.repetition import check_asked
from kvcompress.evaluation.results import Row, check_results_file

EPILOG = """
[bold]Examples[/bold]

kvcompress evaluate --model shapes --data shapes --samples 20 --preset prefixkv,uniform --budget 0.2,0.5

kvcompress evaluate --data text --preset text --preset streaming --budget 0.5 --metric perplexity --output text.jsonl

kvcompress evaluate --data needle:length=500 --samples 10 --preset snapkv --budget 0.2 --question unseen --json

kvcompress evaluate --model llava-hf/llava-1.5-7b-hf --data mm-vet.json --images images --output mm-vet.jsonl

accelerate launch --num_processes 4 -m kvcompress evaluate --model FOLDER --data questions.jsonl --output grid.jsonl
"""

_FILE_WIDTH = 200  # columns where stdout is no terminal, so that nothing has to wrap


def evaluate(
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
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="0.2, 512 or 64MiB, as for generate; repeatable, or with commas."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Sets a field of every configuration; repeatable."),
    ] = None,
    modules: Modules = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{', '.join(METRICS)}; repeatable, or with commas."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N; all, or the built-in data's own number.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a generated answer.")] = 64,
    question: QuestionMode = Question.seen,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of generated data and confidence intervals.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .jsonl for the results; a stopped run goes on there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Starts over where --output exists.")] = False,
    plot: PlotFolder = None,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluates caches at several budgets on data: quality, memory and time, with confidence intervals."""
    with reported(as_json=as_json, debug=debug):
        if plot is not None:
            check_pictures(plot)
        import_modules(modules or [])
        configs = configurations(split(preset), config or [], settings or [])
        budgets = [parse_budget(each) for each in split(budget)]
        metrics = check_metrics(split(metric)) if metric else None
        cells_of(configs, budgets)
        check_asked(question.value, configs)
        processes = Processes.current(device)
        try:
            if output is not None:
                processes.from_first(lambda: check_results_file(output, overwrite=overwrite))
            chosen = load_samples(data, images=images, limit=samples, seed=seed)  # before the model: faster to refuse
            check_mode(question.value, chosen)
            loaded = load_with_spinner(model, dtype.value, processes.device)
            with GridDisplay(shown=processes.first) as display:
                rows = evaluate_grid(
                    loaded,
                    chosen,
                    configs,
                    source=data,
                    budgets=budgets,
                    metrics=metrics,
                    max_new_tokens=max_new_tokens,
                    question=question.value,
                    seed=seed,
                    output=output,
                    overwrite=overwrite,
                    on_progress=display.update,
                    processes=processes,
                )
        finally:
            processes.leave()
        if processes.first:
            written = [] if plot is None else save_all(plot_results(rows), plot)
            _show(rows, output, written, as_json=as_json)


def configurations(presets: list[str], files: list[Path], settings: list[str]) -> dict[str, CompressionConfig]:
    """Configurations by name; auto if none is asked for."""
    found: dict[str, CompressionConfig] = {}
    named: list[tuple[str, str | None, Path | None]] = [(name, name, None) for name in presets]
    named += [(file.stem, None, file) for file in files]
    for name, preset, file in named or [("auto", "auto", None)]:
        if name in found:
            raise ConfigError(f"preset, config: '{name}' is there twice; give each file a name of its own")
        found[name] = read_config(preset, file, None, settings)
    return found


def split(given: list[str] | None) -> list[str]:
    """The parts of a repeatable option that may also be parted by commas."""
    return [part.strip() for text in given or [] for part in text.split(",") if part.strip()]


def _show(rows: list[Row], output: Path | None, pictures: list[Path], *, as_json: bool) -> None:
    told: set[str] = set()
    for row in rows:
        for skipped in row["skipped_samples"]:
            if skipped["sample"] not in told:
                told.add(skipped["sample"])
                place = "" if row is rows[0] else f" by {row['cell']}"
                warn(f"sample '{skipped['sample']}' was skipped{place}: {skipped['reason']}")
    if as_json:
        content: dict[str, Any] = {"results": rows, "output": None if output is None else str(output)}
        content["pictures"] = [str(path) for path in pictures]
        print_json(content)
        return
    console = result_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    console.print(results_table(rows, wide=console.width >= WIDE))
    for path in [*([output] if output is not None else []), *pictures]:
        console.print(Text(f"wrote {path}"), soft_wrap=True)
