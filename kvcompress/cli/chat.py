"""`kvcompress chat`: a conversation in one cache that stays within its budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import TextStreamer

from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import note, reported, warn
from kvcompress.cli.generate import load_with_spinner, open_image
from kvcompress.cli.options import (
    BudgetSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    DtypeName,
    ModelName,
    Modules,
    PresetName,
    Settings,
)
from kvcompress.errors import KVCompressError, did_you_mean
from kvcompress.markup import size
from kvcompress.reuse import Chat

EPILOG = """
[bold]Examples[/bold]

kvcompress chat

kvcompress chat --preset streaming --budget 512

kvcompress chat --model shapes --image scene.png

/new begins a new conversation, /report tells what is held, /help shows this, /quit or Ctrl-D ends.
"""
_COMMANDS = {
    "/new": "begins a new conversation",
    "/report": "tells what is held",
    "/help": "shows this",
    "/quit": "or Ctrl-D ends",
}
_HELP = f"{', '.join(f'{name} {what}' for name, what in _COMMANDS.items())}; a text that begins with / is said with //"


def chat(
    model: ModelName = "smollm2",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An image, for LLaVA models.", exists=True, dir_okay=False)
    ] = None,
    preset: PresetName = None,
    config: ConfigFile = None,
    budget: BudgetSize = None,
    settings: Settings = None,
    modules: Modules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")] = 256,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Talks with a model about anything, for as long as you like, in a cache that stays within its budget."""
    with reported(debug=debug):
        import_modules(modules or [])
        compression = read_config(preset, config, budget, settings or [])
        picture = [] if image is None else [open_image(image)]
        loaded = load_with_spinner(model, dtype.value, device)
        loaded.check_sees(picture)
        reader = loaded.processor if loaded.processor is not None else loaded.tokenizer
        conversation, images = Chat(loaded.model, reader, compression), picture
        while (said := _next()) is not None:
            if said == "/quit":
                break
            if said == "/new":
                conversation.reset()
                images = picture
            elif said == "/report":
                report = conversation.report()
                held = f"{size(report.kv_bytes)} of {size(report.full_kv_bytes)}"
                note(f"{report.tokens_seen:,} tokens seen, retention {report.retention:.1%}, {held}")
            elif _is_command(said):
                note(_told(said))
            elif said:
                streamer = _Answer(loaded.tokenizer)
                try:
                    conversation.say(_text(said), images=images, max_new_tokens=max_new_tokens, streamer=streamer)
                    images = []
                except KeyboardInterrupt:
                    typer.echo()
                    warn("interrupted; a new conversation begins")
                    conversation.reset()
                    images = picture
                except KVCompressError as error:
                    if not sys.stdin.isatty():
                        raise
                    warn(f"{error} (/new begins a new conversation)")


class _Answer(TextStreamer):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        typer.echo(text, nl=stream_end)


def _is_command(said: str) -> bool:
    return said.startswith("/") and not said.startswith("//")


def _text(said: str) -> str:
    return said[1:] if said.startswith("//") else said


def _told(said: str) -> str:
    """What is answered to /help, and to a line that looks like a command and is none."""
    name = said.split()[0]
    if said == "/help":
        return _HELP
    if name in _COMMANDS:
        return f"'{name}' stands alone on its line; {_HELP}"
    return f"'{name}' is no command{did_you_mean(name, _COMMANDS) or ';'} {_HELP}"


def _next() -> str | None:
    """What is said next; None at the end of the input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
