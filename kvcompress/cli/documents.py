"""`kvcompress compress` and `kvcompress ask`: a document is read once, and asked as often as one likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import note, output, print_json, reported, working
from kvcompress.cli.generate import load_with_spinner, open_image, read_prompt
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
from kvcompress.files import locked, make_folder, parse_json, read_text, write_text
from kvcompress.markup import size
from kvcompress.reuse import Document

COMPRESS_EPILOG = """
[bold]Examples[/bold]

kvcompress compress report.txt --output report.kv --budget 0.3

kvcompress compress scene.png --model shapes --output scene.kv

kvcompress ask report.kv "Who wrote it?"
"""
ASK_EPILOG = """
[bold]Examples[/bold]

kvcompress ask report.kv "Who wrote it?"

kvcompress ask report.kv "Who wrote it?" "When?" --json
"""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_ABOUT = "document.json"


def compress(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A text, or images, or both; - is stdin.")],
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the compressed document goes.")
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A folder, a model's id on the hub, smollm2, shapes, pages.")
    ] = "smollm2",
    preset: PresetName = None,
    config: ConfigFile = None,
    budget: BudgetSize = None,
    settings: Settings = None,
    modules: Modules = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Chat template around document and question; used if there is one."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces a document that is there.")] = False,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Reads a document once, compresses its cache before any question is known, and keeps it in a folder."""
    with reported(as_json=as_json, debug=debug):
        import_modules(modules or [])
        compression = read_config(preset, config, budget, settings or [])
        images = [open_image(file, "FILE...") for file in files if file.suffix.lower() in _PICTURES]
        texts = [read_prompt(None, file, "FILE...") for file in files if file.suffix.lower() not in _PICTURES]
        about_path = _prepared(output_folder, overwrite)
        loaded = load_with_spinner(model, dtype.value, device)
        loaded.check_sees(images)
        reader = loaded.processor if loaded.processor is not None else loaded.tokenizer
        with working("reading the document"):
            document = Document(
                loaded.model, reader, "\n\n".join(texts) or None, images=images, config=compression, chat=chat
            )
        with locked(about_path, "document"):
            document.save(output_folder, overwrite=overwrite)
            kept = str(loaded.model.dtype).removeprefix("torch.")
            write_text(about_path, json.dumps({"model": loaded.name, "dtype": kept}) + "\n", "document")
        report = document.report()
        if as_json:
            print_json({"output": str(output_folder), "tokens": document.tokens, **report.to_dict()})
        else:
            output().print(
                f"{document.tokens:,} tokens in {size(report.kv_bytes)} of {size(report.full_kv_bytes)} "
                f"(retention {report.retention:.1%}), in {output_folder}",
                markup=False,
            )


def ask(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'kvcompress compress' wrote.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One or more.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model, where it is no longer called what it was.")
    ] = None,
    modules: Modules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Questions at a time.")] = 8,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answers questions about a compressed document; the document stays as it is."""
    with reported(as_json=as_json, debug=debug):
        import_modules(modules or [])
        about = _about(folder)
        loaded = load_with_spinner(model or about["model"], about["dtype"], device)
        reader = loaded.processor if loaded.processor is not None else loaded.tokenizer
        document = Document.load(loaded.model, reader, folder)
        with working(f"answering {len(questions)} questions" if len(questions) > 1 else "answering"):
            answers = document.ask(questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if as_json:
            found = [{"question": asked, "answer": answer} for asked, answer in zip(questions, answers, strict=True)]
            print_json({"document": str(folder), "answers": found})
            return
        for question, answer in zip(questions, answers, strict=True):
            if len(questions) > 1:
                note(question)
            typer.echo(answer.strip())


def _prepared(folder: Path, overwrite: bool) -> Path:
    """Finds out before the work whether a document can be written to a folder."""
    path = folder / _ABOUT
    make_folder(folder, "document")
    if path.exists():
        _about(folder)
        if not overwrite:
            raise ConfigError(f"document {folder}: exists already; --overwrite replaces it, or give another folder")
    return path


def _about(folder: Path) -> dict[str, Any]:
    path = folder / _ABOUT
    if not path.exists():
        raise ConfigError(f"document {folder}: there is no document in it (no {_ABOUT}); make one: kvcompress compress")
    found = parse_json(read_text(path, "document", 2**16), f"document {path}:")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("model", "dtype")):
        raise ConfigError(f"document {path}: is none that kvcompress wrote; make one: kvcompress compress")
    return found
