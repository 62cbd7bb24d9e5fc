"""`kvcompress inspect`: what each layer makes of one prompt, in figures and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import output, print_json, reported, working
from kvcompress.cli.generate import load_with_spinner, open_image, read_prompt
from kvcompress.cli.options import (
    AsJson,
    BudgetSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    DtypeName,
    ModelName,
    Modules,
    PlotFolder,
    Settings,
)
from kvcompress.config import CompressionConfig
from kvcompress.evaluation import Inspection, encode_prompt
from kvcompress.evaluation import inspect as inspect_prompt
from kvcompress.evaluation.plots import check_pictures, lorenz, merging, patches, retention, save_all
from kvcompress.markup import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPILOG = """
[bold]Examples[/bold]

kvcompress inspect --model shapes --image scene.png --prompt "describe the image." --plot pictures

kvcompress inspect --prompt-file report.txt --budget 0.3 --preset pyramidkv

kvcompress inspect --prompt "Why is the sky blue?" --json
"""


def inspect(
    model: ModelName = "smollm2",
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt; comes after the text of --prompt-file.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A text file; - is stdin.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An image, for LLaVA models.", exists=True, dir_okay=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A named configuration; prefixkv if left out.")
    ] = None,
    config: ConfigFile = None,
    budget: BudgetSize = None,
    settings: Settings = None,
    modules: Modules = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Chat template around the prompt; used if there is one."),
    ] = None,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    plot: PlotFolder = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Shows how important a prompt's tokens are to each layer, and which of them each layer keeps."""
    with reported(as_json=as_json, debug=debug):
        if plot is not None:
            check_pictures(plot)
        import_modules(modules or [])
        compression = read_config(preset, config, budget, settings or [], "prefixkv")
        text = read_prompt(prompt, prompt_file)
        picture = None if image is None else open_image(image)
        loaded = load_with_spinner(model, dtype.value, device)
        inputs = encode_prompt(loaded, text, image=picture, chat=chat)
        with working(f"reading {inputs['input_ids'].shape[1]:,} tokens"):
            found = inspect_prompt(loaded, inputs, compression)
        written = [] if plot is None else save_all(_figures(found, compression), plot)
        if as_json:
            about = {"model": loaded.name, "config": compression.model_dump(mode="json")}
            print_json({**found.to_dict(), **about, "pictures": [str(path) for path in written]})
        else:
            _show(found, written)


def _figures(found: Inspection, config: CompressionConfig) -> dict[str, Figure]:
    budget = config.budget.fraction or config.budget.tokens or found.report.retention
    figures = {"lorenz": lorenz(found.importance), "retention": retention({budget: found.retention})}
    if found.grid is not None:
        figures["patches"] = patches(found.report, found.grid, found.picture)
    if found.grid is not None and found.report.went_into:
        figures["merging"] = merging(found.report, found.grid, found.picture)
    return figures


def _show(found: Inspection, written: list[Path]) -> None:
    console, report = output(), found.report
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    of_image = [f"of {len(found.image)} image tokens"] if found.image else []
    for head in ("layer", "tokens", "kept", *of_image, "retention", f"Gini ({found.scored_by})"):
        table.add_column(head, justify="right")
    rows = zip(found.given, found.kept, found.image_kept, found.retention, found.gini, strict=True)
    for layer, (given, kept, image, share, gini) in enumerate(rows):
        images = [f"{image:,.4g}"] if found.image else []
        table.add_row(str(layer), f"{given:,}", f"{kept:,}", *images, f"{share:.1%}", f"{gini:.3f}")
    console.print(table)
    held = f"{size(report.kv_bytes)} of {size(report.full_kv_bytes)}"
    console.print(f"retention over all layers {report.retention:.1%}, key/value cache {held}")
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for path in written:
        console.print(Text(f"wrote {path}"), soft_wrap=True)
