"""`kvcompress demo`: one long document or one image, one question, several cache sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer
from rich.text import Text

from kvcompress.cli.console import output, reported
from kvcompress.cli.display import figures
from kvcompress.cli.generate import load_with_spinner, open_image, run_with_spinner
from kvcompress.cli.options import Debug
from kvcompress.config import CompressionConfig
from kvcompress.config.presets import PRESETS
from kvcompress.evaluation import Generation, LoadedModel, encode_prompt, smollm2
from kvcompress.evaluation.shapes import Scene, describe_question, draw_scene, sample_scene, scene_seed
from kvcompress.evaluation.shapes.questions import DESCRIBE

EPILOG = """
[bold]Examples[/bold]

kvcompress demo

kvcompress demo --text --preset streaming

kvcompress demo --image

kvcompress demo --image scene.png --question "how many red objects?"
"""

# Sections of the language reference that Python brings along; the answer stands in the last one.
TOPICS = ("break", "if", "while", "for")
QUESTION = "What is the for statement used to iterate over?"
RETENTIONS = (1.0, 0.5, 0.2)
IMAGE_RETENTIONS = (1.0, 0.5, 0.4)  # of 151 tokens
_ANSWER_TOKENS = 32
_DESCRIPTION_TOKENS = 80
_SCENE = 0  # of the held-out scenes


def demo(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="The image for --image; a drawn scene if left out.", exists=True, dir_okay=False
        ),
    ] = None,
    image: Annotated[
        bool, typer.Option("--image", help="Asks ShapesLLaVA about an image of drawn shapes.", show_default=False)
    ] = False,
    text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="Asks SmolLM2 about a text; without either option the text where SmolLM2 is installed.",
            show_default=False,
        ),
    ] = False,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Another question.", show_default=False)] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the cache is compressed ('kvcompress policies presets'); auto if left out.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Lets a small model answer a question about a document or an image with all, half and less of its cache."""
    with reported(debug=debug):
        if image and text:
            raise typer.BadParameter("give --image or --text, not both")
        if file is not None and not image:
            raise typer.BadParameter("an image is looked at with --image: kvcompress demo --image FILE")
        preset, missing = preset or "auto", None
        if not (image or text):
            missing = smollm2.why_missing()
            image = missing is not None
        configs = {
            f"{share:.0%}": CompressionConfig.preset(preset, budget=share)
            for share in (IMAGE_RETENTIONS if image else RETENTIONS)
        }
        if image:
            loaded, inputs, about = _image_prompt(file, question)
        else:
            loaded, inputs, about = _text_prompt(question)
        console = output()
        about.append(("Preset", f"{preset}: {PRESETS[preset][0]}"))
        for label, told in about:
            console.print(Text.assemble((f"{label:<10}", "bold"), told))
        wanted = {"max_new_tokens": _DESCRIPTION_TOKENS if image else _ANSWER_TOKENS}
        results = {
            f"retention {name}": run_with_spinner(loaded, inputs, config, wanted, f"retention {name}")
            for name, config in configs.items()
        }
        console.print(figures(results, answers=True, encoding=console.encoding))
        for name, note in _notes(results):
            console.print(f"note{name}: {note}", markup=False)
        if missing is not None:
            reason = missing.removeprefix(f"model {smollm2.NAME}: ")
            console.print(f"SmolLM2 answers about a text instead, once it is here: {reason}.", markup=False)


def _notes(results: dict[str, Generation]) -> Iterator[tuple[str, str]]:
    """Each note once, and the columns that it is about where it is not about all."""
    notes = dict.fromkeys(note for result in results.values() for note in result.report.notes)
    for note in notes:
        about = [name for name, result in results.items() if note in result.report.notes]
        yield "" if len(about) == len(results) else f" ({', '.join(about)})", note


def document() -> str:
    """The text that the question is about."""
    return "\n\n".join(topics[topic].strip() for topic in TOPICS)


def _text_prompt(question: str | None) -> tuple[LoadedModel, dict[str, Any], list[tuple[str, str]]]:
    question = QUESTION if question is None else question
    loaded = load_with_spinner(smollm2.NAME, "auto")
    inputs = encode_prompt(loaded, f"{document()}\n\n{question}")
    return (
        loaded,
        inputs,
        [
            ("Model", f"SmolLM2-135M-Instruct, {_place(loaded)}"),
            ("Prompt", f"{inputs['input_ids'].shape[1]:,} tokens: Python's reference on {', '.join(TOPICS)}"),
            ("Question", question),
        ],
    )


def _image_prompt(file: Path | None, question: str | None) -> tuple[LoadedModel, dict[str, Any], list[tuple[str, str]]]:
    scene = sample_scene(scene_seed("test", _SCENE))
    picture = draw_scene(scene) if file is None else open_image(file)
    loaded = load_with_spinner("shapes", "auto")
    inputs = encode_prompt(loaded, question or DESCRIBE, image=picture)
    tokens = int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())
    about = [
        ("Model", f"ShapesLLaVA (knows drawn shapes only), {_place(loaded)}"),
        ("Image", f"{tokens} vision tokens: {_shown(scene) if file is None else file}"),
        ("Question", question or DESCRIBE),
    ]
    if file is None and question is None:
        about.append(("Right", describe_question(scene).answer))
    return loaded, inputs, about


def _shown(scene: Scene) -> str:
    return f"a scene drawn from seed {scene.seed}, which the model was not trained on"


def _place(loaded: LoadedModel) -> str:
    return f"{loaded.model.dtype}, {loaded.model.device}".replace("torch.", "")
