"""`kvcompress bench`: speed and memory of caches on a model, in turns with transformers' own."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import transformers
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvcompress import __version__
from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import note, output, print_json, reported, warn
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.options import AsJson, Debug, Device, Dtype, DtypeName, ModelName, Modules, PlotFolder, Settings
from kvcompress.config import CompressionConfig
from kvcompress.evaluation import LoadedModel
from kvcompress.evaluation.benchmark import benchmark, rounds_of, weight_bytes
from kvcompress.evaluation.contestants import BASE, REFERENCES
from kvcompress.evaluation.measurement import Measurement, Spread
from kvcompress.evaluation.plots import check_pictures, save_all, speed
from kvcompress.evaluation.plots.retention import budget_label
from kvcompress.evaluation.plots.rows import by_unit
from kvcompress.markup import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPILOG = """
[bold]Examples[/bold]

kvcompress bench

kvcompress bench --preset prefixkv --preset snapkv --budget 0.5 --budget 0.2 --prompt-tokens 1000 --prompt-tokens 4000

kvcompress bench --config mine.yaml --batch 1 --batch 8 --memory-limit 16GiB --json

kvcompress bench --model shapes --prompt-tokens 300 --budget 0.1 --budget 0.5 --budget 0.9 --plot pictures
"""
_RATIOS = f"x: the median of the ratios to {BASE}'s time of the same turn, not the ratio of the medians"


def bench(
    model: ModelName = "smollm2",
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", metavar="NAME", help="A named configuration; repeatable; auto if none is given."),
    ] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", metavar="FILE", help="A .yaml or .json configuration; repeatable.", dir_okay=False),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="0.2: share of the tokens; 512: tokens per layer; 64MiB: bytes; repeatable; the configurations' own "
            "if none is given. What keeps everything by design runs once.",
        ),
    ] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            metavar="NAME",
            help=f"{', '.join(REFERENCES)}, or none; repeatable, or with commas; all if left out. Ratios need {BASE}.",
        ),
    ] = None,
    settings: Settings = None,
    modules: Modules = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Tokens of a prompt; repeatable; 1000 if left out.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Prompts at a time; repeatable; 1 if left out.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Steps after the first token.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed rounds, after one that warms up.")] = 5,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Tells the largest batch that fits, as 16GiB; the GPU's memory if left out."),
    ] = None,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    plot: PlotFolder = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measures speed and memory of caches, in turns with DynamicCache, QuantizedCache and the weights alone."""
    with reported(as_json=as_json, debug=debug):
        if plot is not None:
            check_pictures(plot)
        import_modules(modules or [])
        compared = _configurations(presets, configs, budgets or [], settings or [])
        limit = None if memory_limit is None else _bytes(memory_limit)
        beside = _references(references)
        loaded = load_with_spinner(model, dtype.value, device)
        lengths, batches = prompt_tokens or [1000], batch or [1]
        _warn_if_too_long(loaded, max(lengths) + new_tokens)
        wanted: dict[str, Any] = {"prompt_tokens": lengths, "batches": batches, "rounds": rounds}
        wanted |= {"new_tokens": new_tokens, "memory_limit": limit, "references": beside}
        found = _run(loaded, compared, wanted)
        for policy, note in dict.fromkeys((one.policy, one.note) for one in found if one.note and ":" in one.note):
            warn(f"{policy} is {note}")
        written = [] if plot is None else save_all(_figures(found), plot)
        if as_json:
            print_json(_as_json(loaded, compared, wanted, found, written))
        else:
            console = output()
            console.print(_tables(found))
            for path in written:
                console.print(Text(f"wrote {path}"), soft_wrap=True)


def _configurations(
    presets: Sequence[str] | None, files: Sequence[Path] | None, budgets: Sequence[str], settings: Sequence[str]
) -> list[tuple[str, CompressionConfig]]:
    """Every configuration with every budget, by name."""
    names: list[tuple[str, str | None, Path | None]] = [(preset, preset, None) for preset in presets or []]
    names += [(file.stem, None, file) for file in files or []]
    found = []
    for name, preset, file in names or [("auto", "auto", None)]:
        own = read_config(preset, file, None, settings)
        if own.evictor is None or not budgets:
            found.append((name, own))
        else:
            found += [(name, read_config(preset, file, budget, settings)) for budget in budgets]
    return found


def _references(given: Sequence[str] | None) -> list[str]:
    """Those asked for, in their order; all if none was named, none if "none" was."""
    names = [part.strip() for text in given or REFERENCES for part in text.split(",") if part.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name not in REFERENCES:
            known = f"{', '.join(REFERENCES)}, or none by itself"
            raise typer.BadParameter(f"'{name}' is no reference; known: {known}", param_hint="--reference")
    return [name for name in REFERENCES if name in names]


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(
            f"'{text}' is no size; write bytes with a unit, as 16GiB", param_hint="--memory-limit"
        ) from None


def _run(
    loaded: LoadedModel, compared: list[tuple[str, CompressionConfig]], wanted: dict[str, Any]
) -> list[Measurement]:
    found: list[Measurement] = []
    sizes = (len(wanted["prompt_tokens"]), len(wanted["batches"]), wanted["rounds"], len(wanted["references"]))
    rounds = rounds_of(len(compared), *sizes)
    progress = Progress(
        TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TextColumn("time left"), TimeRemainingColumn()
    )
    task = progress.add_task("rounds", total=rounds)
    with _live(progress) as live:
        wanted = {**wanted, "on_round": lambda: progress.advance(task), "on_wait": note}
        for measurement in benchmark(loaded, compared, **wanted):
            found.append(measurement)
            if live is not None:
                live.update(Group(_tables(found), progress))
    return found


@contextmanager
def _live(progress: Progress) -> Iterator[Live | None]:
    """The growing table on stderr, where somebody watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Live(progress, console=console, transient=True) as live:
        yield live


def _tables(found: Sequence[Measurement]) -> RenderableType:
    """A table for each length and batch."""
    groups: dict[tuple[int, int], list[Measurement]] = {}
    for measurement in found:
        groups.setdefault((measurement.prompt_tokens, measurement.batch), []).append(measurement)
    return Group(*(_table(*key, group) for key, group in groups.items()))


def _table(tokens: int, batch: int, found: Sequence[Measurement]) -> Table:
    has_limit = any(measurement.largest_batch is not None for measurement in found)
    title = f"Prompt of {tokens:,} tokens, batch {batch}: median, times {BASE}'s, quartiles"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if any(measurement.per_token_ratio is not None for measurement in found):
        table.caption, table.caption_justify = _RATIOS, "left"
    table.add_column("cache", no_wrap=True)
    heads = ["first\ntoken, ms", "per\ntoken, ms", "tokens/s", "held", "peak"]
    for head in (*heads, *(["largest\nbatch"] if has_limit else [])):
        table.add_column(head, justify="right", overflow="fold")
    for one in found:
        cells = [
            one.note.partition(":")[0] if one.note else _time(one.seconds_to_first_token, one.first_token_ratio),
            _time(one.seconds_per_token, one.per_token_ratio),
            "" if one.tokens_per_second is None else f"{one.tokens_per_second.median:,.1f}",
            "" if one.held_bytes is None else size(one.held_bytes),
            "" if one.peak_bytes is None else size(one.peak_bytes),
        ]
        if has_limit:
            cells.append("" if one.largest_batch is None else f"{one.largest_batch:,}")
        table.add_row(Text(label(one)), *cells)
    return table


def label(measurement: Measurement) -> str:
    """A cache by its name and budget."""
    budget, unit = measurement.budget, measurement.budget_unit
    if budget is None or (budget == 1.0 and unit == "fraction"):
        return measurement.policy
    return f"{measurement.policy} {size(int(budget)) if unit == 'bytes' else budget_label(budget)}"


def _time(spread: Spread | None, ratio: float | None) -> str:
    """Milliseconds, how many times those of the base, and the quartiles."""
    if spread is None:
        return ""
    middle, low, high = (_digits(1000 * value) for value in (spread.median, spread.low, spread.high))
    times = "" if ratio is None else f" {ratio:.2f}x"
    return f"{middle}{times}\n{low}-{high}"


def _digits(value: float) -> str:
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def _figures(found: Sequence[Measurement]) -> dict[str, Figure]:
    """Speed against budgets for each length and batch, and against lengths or batches where there are several."""
    measured = [one for one in found if one.note is None]
    lengths, batches = sorted({one.prompt_tokens for one in measured}), sorted({one.batch for one in measured})
    figures: dict[str, Figure] = {}
    for tokens in lengths:
        for batch in batches:
            rows = [one.to_dict() for one in measured if (one.prompt_tokens, one.batch) == (tokens, batch)]
            name = "speed" if len(lengths) == len(batches) == 1 else f"speed-{tokens}-tokens-batch-{batch}"
            units = by_unit(rows)
            figures |= {f"{name}-{unit}" if len(units) > 1 else name: speed(group) for unit, group in units.items()}
    for x, values, other, others in (
        ("prompt_tokens", lengths, "batch", batches),
        ("batch", batches, "prompt_tokens", lengths),
    ):
        for fixed in others if len(values) > 1 else []:
            rows = [{**one.to_dict(), "policy": label(one)} for one in measured if getattr(one, other) == fixed]
            figures[f"speed-by-{x.replace('_', '-')}-{other.replace('_', '-')}-{fixed}"] = speed(rows, x=x)
    return figures


def _as_json(
    loaded: LoadedModel,
    compared: list[tuple[str, CompressionConfig]],
    wanted: dict[str, Any],
    found: Sequence[Measurement],
    written: Sequence[Path],
) -> dict[str, Any]:
    device = loaded.model.device
    return {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "weight_bytes": weight_bytes(loaded.model),
        **wanted,
        "configs": [{"policy": name, "config": config.model_dump(mode="json")} for name, config in compared],
        "measurements": [{"model": loaded.name, **measurement.to_dict()} for measurement in found],
        "versions": {
            "kvcompress": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "pictures": [str(path) for path in written],
    }


def _warn_if_too_long(loaded: LoadedModel, tokens: int) -> None:
    most = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        warn(f"prompts and new tokens reach {tokens:,}; '{loaded.name}' was trained for {most:,}")
