"""`kvcompress caption`: a line for every image of a folder, in batches; a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import note, print_json, reported, warn, working
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.options import (
    AsJson,
    BudgetSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    DtypeName,
    Modules,
    PresetName,
    Settings,
)
from kvcompress.errors import ConfigError
from kvcompress.evaluation.captions import CaptionsFile, caption_images, pictures_in, unreadable

EPILOG = """
[bold]Examples[/bold]

kvcompress caption photos --model llava-hf/llava-1.5-7b-hf --output captions.jsonl --budget 0.3

kvcompress caption scenes --model shapes --prompt "describe the image." --output captions.jsonl
"""


def caption(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With PNG, JPEG, WebP, BMP or GIF images.", file_okay=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .jsonl for the captions; a stopped run goes on.")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="A LLaVA: a folder, an id on the hub, shapes.")] = "shapes",
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What is asked of each.")] = "describe the image.",
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 4,
    preset: PresetName = None,
    config: ConfigFile = None,
    budget: BudgetSize = None,
    settings: Settings = None,
    modules: Modules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a caption.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Starts over where --output exists.")] = False,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describes every image of a folder, one line of JSON each."""
    with reported(as_json=as_json, debug=debug):
        import_modules(modules or [])
        compression = read_config(preset, config, budget, settings or [])
        images = pictures_in(folder)
        said = [model, prompt, max_new_tokens, dtype.value, compression.model_dump(mode="json")]
        run = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
        with CaptionsFile(output, run, overwrite=overwrite) as captions:
            left = [path for path in images if path.name not in captions.done]
            if left:
                loaded = load_with_spinner(model, dtype.value, device)
                if not loaded.sees_images:
                    raise ConfigError(f"model '{model}': sees no images; captions need a LLaVA model, or shapes")
            skipped: dict[str, str] = {}
            with working(f"{len(left)} images") as spinner:
                for first in range(0, len(left), batch_size):
                    spinner.update(f"image {first + 1} of {len(left)}")
                    part = left[first : first + batch_size]
                    skipped |= (faults := unreadable(part, folder))
                    part = [path for path in part if path.name not in faults]
                    for line in (
                        caption_images(loaded, part, prompt, compression, max_new_tokens, folder) if part else []
                    ):
                        captions.add(line)
            if not captions.done:
                raise ConfigError(
                    f"images: none of {len(images)} in {folder} can be read; {next(iter(skipped.values()))}"
                )
        for name, reason in skipped.items():
            warn(f"image '{name}' was skipped: {reason}")
        new = len(left) - len(skipped)
        if as_json:
            told = [{"image": name, "reason": reason} for name, reason in skipped.items()]
            print_json({"output": str(output), "images": len(images), "new": new, "skipped": told})
        else:
            note(f"{new} of {len(images)} images described now, in {output}")
