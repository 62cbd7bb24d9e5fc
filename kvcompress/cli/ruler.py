"""`kvcompress ruler`: RULER's tasks as records for `kvcompress evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.console import output as result_console
from kvcompress.cli.console import print_json, reported, working
from kvcompress.cli.evaluate import split
from kvcompress.cli.generate import load_with_spinner
from kvcompress.cli.options import AsJson, Debug, ModelName, Overwrite
from kvcompress.errors import ConfigError
from kvcompress.evaluation.ruler import make_records, task_names
from kvcompress.files import check_output, write_text

EPILOG = """
[bold]Examples[/bold]

kvcompress ruler --length 2048 --samples 16 --output ruler-2k.jsonl

kvcompress ruler --task niah_single_1,vt,qa_1 --length 1024 --output ruler-1k.jsonl

kvcompress evaluate --data ruler-1k.jsonl --question unseen --metric string_match --preset snapkv --budget 0.5
"""


def ruler(
    output: Annotated[Path, typer.Option(metavar="FILE", help="A .jsonl for the records.")],
    model: ModelName = "smollm2",
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="niah_single_1, vt, cwe, fwe, qa_1, ...; all if left out; repeatable."),
    ] = None,
    length: Annotated[
        int, typer.Option(metavar="TOKENS", help="Most tokens of context, question and answer together.")
    ] = 4096,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Of each task.")] = 8,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of what is drawn.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Writes RULER's tasks, made for a model's tokenizer by NVIDIA's package of them, as contexts and questions."""
    with reported(as_json=as_json, debug=debug):
        if output.suffix != ".jsonl":
            raise ConfigError(f"output {output}: records are written as lines of JSON; the name must end in .jsonl")
        check_output(output, overwrite=overwrite)
        names = split(task) or task_names()  # before the model: faster to refuse
        loaded = load_with_spinner(model, "auto", "cpu")
        records = []
        with working(names[0]) as spinner:
            for name in names:
                spinner.update(f"{name}, {length:,} tokens")
                records += make_records(loaded.tokenizer, [name], length=length, samples=samples, seed=seed)
        write_text(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        if as_json:
            print_json({"output": str(output), "records": len(records), "tasks": names, "length": length, "seed": seed})
        else:
            result_console().print(f"{len(records)} records of {len(names)} tasks, in {output}", markup=False)
