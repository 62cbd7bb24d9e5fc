"""Options that several commands take, worded once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """What `--dtype` may be."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelName = Annotated[
    str, typer.Option(metavar="NAME", help="A folder, a model's id on the hub, smollm2, shapes, pages.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Sets a policy or one of its parameters; repeatable."),
]
Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Imports your policies first (module or .py); repeatable."),
]
DtypeName = Annotated[
    Dtype, typer.Option(metavar="TYPE", help="float32, bfloat16, float16; auto is the checkpoint's own.")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1; auto is a GPU if there is one.")]
PresetName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A named configuration ('kvcompress policies presets'); auto if left out."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .yaml or .json configuration instead of a preset.", dir_okay=False),
]
BudgetSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="0.2, 20%: share of the tokens; 512: tokens per layer; 64MiB: bytes."),
]


class Question(str, Enum):
    """What `--question` may be."""

    seen = "seen"
    unseen = "unseen"


QuestionMode = Annotated[
    Question,
    typer.Option(
        metavar="WHEN",
        help="seen: compress once a whole prompt is read; unseen: after its context or image alone.",
    ),
]
ImagesFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the images of the data are.", file_okay=False)
]
PlotFolder = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FOLDER", help="Draws pictures into it, as PNG and SVG.", file_okay=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replaces --output where it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Shows the traceback of an error.")]
