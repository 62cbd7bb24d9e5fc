"""`kvcompress generate`: one prompt, one compressed cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.cli.configuration import import_modules, read_config
from kvcompress.cli.console import output, print_json, reported, warn, working
from kvcompress.cli.display import agreement, figures
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
    PresetName,
    Settings,
)
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation import Generation, LoadedModel, encode_prompt, load_model, warm_up
from kvcompress.evaluation import generate as generate_answer
from kvcompress.evaluation.models import is_local
from kvcompress.files import open_picture, read_text

_PROMPT_BYTES = 64 * 2**20

EPILOG = """
[bold]Examples[/bold]

kvcompress generate --prompt "Why is the sky blue?"

kvcompress generate --prompt-file report.txt --prompt "Sum this up." --budget 0.2 --compare

kvcompress generate --prompt-file - --preset streaming --budget 512 < report.txt

kvcompress generate --prompt-file report.txt --preset snapkv --set scorer.window=16 --set allocator=uniform --json

kvcompress generate --model shapes --image scene.png --prompt "describe the image."

kvcompress generate --model llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "What is this?"
"""


def generate(
    model: ModelName = "smollm2",
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to answer; comes after the text of --prompt-file.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text file; - is stdin."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An image, for LLaVA models.", exists=True, dir_okay=False)
    ] = None,
    preset: PresetName = None,
    config: ConfigFile = None,
    budget: BudgetSize = None,
    settings: Settings = None,
    modules: Modules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of the answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token, more draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the draws.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Chat template around the prompt; used if there is one."),
    ] = None,
    dtype: DtypeName = Dtype.auto,
    device: Device = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Runs transformers' full cache too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answers a prompt with a compressed key-value cache, and shows what that saved and cost."""
    with reported(as_json=as_json, debug=debug):
        import_modules(modules or [])
        compression = read_config(preset, config, budget, settings or [])
        text = read_prompt(prompt, prompt_file)
        picture = None if image is None else open_image(image)
        loaded = load_with_spinner(model, dtype.value, device)
        inputs = encode_prompt(loaded, text, image=picture, chat=chat)
        _warn_if_too_long(loaded, inputs["input_ids"].shape[1] + max_new_tokens)
        wanted = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

        streams = not (compare or as_json)
        name = str(config) if config is not None else preset or "auto"
        results = {name: run_with_spinner(loaded, inputs, compression, wanted, name, streams=streams)}
        if compare:
            results["full cache"] = run_with_spinner(loaded, inputs, None, wanted, "full cache")
        if as_json:
            print_json(_as_json(loaded, compression, list(results.values())))
        else:
            _show(results, streamed=streams)


def load_with_spinner(name: str, dtype: str, device: str = "auto") -> LoadedModel:
    """Loads a model and warms it up."""
    with working(f"loading {name}", spins=is_local(name)):  # a download shows its own progress
        loaded = load_model(name, dtype=dtype, device=device)
        warm_up(loaded)
    return loaded


def run_with_spinner(
    loaded: LoadedModel,
    inputs: dict[str, Any],
    config: CompressionConfig | None,
    wanted: dict[str, Any],
    name: str,
    *,
    streams: bool = False,
) -> Generation:
    """Generates with a spinner, which gives way to the answer where that is streamed to stdout."""
    with working(f"{name}: reading {inputs['input_ids'].shape[1]:,} tokens") as spinner:
        pieces = 0

        def on_text(piece: str) -> None:
            nonlocal pieces
            pieces += 1
            if streams:
                spinner.stop()
                sys.stdout.write(piece)
                sys.stdout.flush()
            elif pieces == 1:
                spinner.update(f"{name}: answering")

        result = generate_answer(loaded, inputs, config, on_text=on_text, **wanted)
    if streams:
        sys.stdout.write("\n")
    return result


def _show(results: dict[str, Generation], *, streamed: bool) -> None:
    console = output()
    console.print(figures(results, answers=not streamed, encoding=console.encoding))
    for name, result in results.items():
        for note in result.report.notes:
            console.print(f"note ({name}): {note}", markup=False)
    if len(results) > 1:
        first, second = results.values()
        same, shared = agreement(first, second)
        longest = max(len(first.token_ids), len(second.token_ids))
        verdict = (
            "The answers are the same." if same else f"The answers agree in their first {shared} of {longest} tokens."
        )
        console.print(verdict)


def _as_json(loaded: LoadedModel, config: CompressionConfig, results: list[Generation]) -> dict[str, Any]:
    content = {
        **results[0].to_dict(),
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "config": config.model_dump(mode="json"),
    }
    if len(results) > 1:
        same, shared = agreement(*results)
        content |= {"full_cache": results[1].to_dict(), "same_answer": same, "same_tokens": shared}
    return content


def read_prompt(prompt: str | None, file: Path | None, option: str = "--prompt-file") -> str:
    """Joins what --prompt-file, or another option or argument for the file, and --prompt give."""
    if prompt is None and file is None:
        raise typer.BadParameter("give --prompt, --prompt-file or both")
    parts = []
    if file is not None:
        try:
            parts.append(sys.stdin.read() if str(file) == "-" else read_text(file, "prompt", _PROMPT_BYTES, pipes=True))
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"stdin is no text: {error}", param_hint=option) from None
        except ConfigError as error:
            raise typer.BadParameter(str(error), param_hint=option) from None
    if prompt is not None:
        parts.append(prompt)
    return "\n\n".join(part.strip() if len(parts) > 1 else part for part in parts)


def open_image(path: Path, option: str = "--image") -> Any:
    """Reads an image file, given by that option or argument, as RGB."""
    try:
        return open_picture(path)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _warn_if_too_long(loaded: LoadedModel, tokens: int) -> None:
    most = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        warn(f"prompt and answer may reach {tokens:,} tokens; '{loaded.name}' was trained for {most:,}")
