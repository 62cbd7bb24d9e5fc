"""`kvcompress calibrate`: retention per layer for every budget, estimated once and used from then on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvcompress.cli.configuration import check_output, import_modules, read_config
from kvcompress.cli.console import output, print_json, reported, working
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.grid import time_left
from kvcompress.cli.options import (
    AsJson,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    DtypeName,
    ImagesFolder,
    ModelName,
    Modules,
    Overwrite,
    PlotFolder,
    Settings,
)
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError
from kvcompress.evaluation.calibration import BUDGETS, calibrate, check_budgets, check_config
from kvcompress.evaluation.data import load_samples
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.plots import check_pictures, plot_profile, save_all

EPILOG = """
[bold]Examples[/bold]

kvcompress calibrate --model shapes --data shapes --output profile.json

kvcompress calibrate --data text --preset cake --budget 0.2 --budget 0.5 --output profile.yaml

kvcompress calibrate --model llava-hf/llava-1.5-7b-hf --data detail_1k.json --images coco --output profile.json

kvcompress calibrate --from-prefixkv confs/prefixkv_llava-v1.5-7b --output profile.json

kvcompress generate --set allocator=profile --set allocator.path=profile.json --prompt "Hello"
"""


def calibrate_command(
    output_file: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The profile to write: .json, .yaml or .yml.")
    ],
    model: ModelName = "smollm2",
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="A file (.json of LLaVA dialogues or MM-Vet, .jsonl, .txt), or text, needle, shapes, pages.",
        ),
    ] = "text",
    images: ImagesFolder = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts to read.")] = 10,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="SHARE",
            help="A share of the tokens; repeatable, or with commas. 0.1 to 0.9 if left out.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A named configuration; prefixkv if left out.")
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    modules: Modules = None,
    from_prefixkv: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Reads the published files of PrefixKV (shares evicted) instead; no model is loaded.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    plot: PlotFolder = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of what built-in data draw.")] = 0,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Estimates how much each layer keeps at every budget, and writes it as a profile."""
    with reported(as_json=as_json, debug=debug):
        if plot is not None:
            check_pictures(plot)
        import_modules(modules or [])
        processes = Processes.current(device)
        processes.from_first(lambda: check_output(output_file, overwrite=overwrite))
        if from_prefixkv is not None:
            profile = LayerProfile.from_prefixkv(from_prefixkv)
        else:
            compression = read_config(preset, config, None, settings or [], "prefixkv")
            check_config(compression)
            shares = check_budgets(_fractions(budgets) if budgets else BUDGETS)
            read = load_samples(data, images=images, limit=samples, seed=seed)
            try:
                loaded = load_with_spinner(model, dtype.value, processes.device)
                start = time.monotonic()

                def tell(done: int) -> None:
                    rest = time_left(time.monotonic() - start, done, len(read) - done)
                    spinner.update(f"read {done} of {len(read)} prompts{rest}")

                with working(f"reading {len(read)} prompts") as spinner:
                    profile = calibrate(
                        loaded,
                        compression,
                        read,
                        budgets=shares,
                        data=data,
                        on_sample=tell,
                        processes=processes,
                    )
            finally:
                processes.leave()
        if not processes.first:
            return
        profile.dump(output_file)
        written = [] if plot is None else save_all({"retention": plot_profile(profile)}, plot)
        if as_json:
            print_json(profile.model_dump(mode="json"))
        else:
            _show(profile, [output_file, *written])


def _fractions(given: list[str]) -> list[float]:
    try:
        return [float(part) for text in given for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"budget: must be shares of the tokens, such as 0.2 or 0.2,0.5; got {','.join(given)}"
        ) from None


def _show(profile: LayerProfile, written: list[Path]) -> None:
    console = output()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", justify="right")
    for budget in profile.budgets:
        table.add_column(f"{budget:g}", justify="right", min_width=len("±0.000"))
    spread = profile.spread if profile.heads == 1 else []
    for layer in range(profile.layers):
        cells = [f"{one[layer]:.3f}" for one in profile.layer_retention]
        if spread:
            cells = [f"{cell} ±{one[layer]:.3f}" for cell, one in zip(cells, spread, strict=True)]
        table.add_row(str(layer), *cells)
    known = f", mean ± standard deviation over {profile.samples} samples" if spread else ""
    console.print(f"Retention per layer and budget{known}")
    console.print(table)
    for path in written:
        console.print(Text(f"wrote {path}"), soft_wrap=True)
