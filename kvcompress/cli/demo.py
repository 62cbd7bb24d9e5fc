"""`kvcompress demo`: one long document, one question, three cache sizes."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Annotated

import typer
from rich.text import Text

from kvcompress.cli.console import output, reported
from kvcompress.cli.display import figures
from kvcompress.cli.generate import load_with_spinner, run_with_spinner
from kvcompress.config import CompressionConfig
from kvcompress.evaluation import encode_prompt
from kvcompress.presets import PRESETS

EPILOG = """
[bold]Examples[/bold]

kvcompress demo

kvcompress demo --preset streaming
"""

# Sections of the language reference that Python brings along; the answer stands in the last one.
TOPICS = ("assert", "del", "return", "raise", "break", "continue", "global", "nonlocal", "if", "while", "for")
QUESTION = "What is the for statement used to iterate over?"
RETENTIONS = (1.0, 0.5, 0.2)
_ANSWER_TOKENS = 48


def demo(
    preset: Annotated[
        str, typer.Option(help="How the cache is compressed ('kvcompress policies presets').")
    ] = "prefixkv",
    debug: Annotated[bool, typer.Option("--debug", help="Shows the traceback of an error.")] = False,
) -> None:
    """Lets SmolLM2 answer a question about a long document with all, half and a fifth of its cache."""
    with reported(debug=debug):
        configs = {f"{share:.0%}": CompressionConfig.preset(preset, budget=share) for share in RETENTIONS}
        loaded = load_with_spinner("smollm2", "bfloat16")
        inputs = encode_prompt(loaded, f"{document()}\n\n{QUESTION}")
        console = output()
        for label, text in (
            ("Model", f"SmolLM2-135M-Instruct, {loaded.model.dtype}, {loaded.model.device}".replace("torch.", "")),
            ("Prompt", f"{inputs['input_ids'].shape[1]:,} tokens: Python's reference on {', '.join(TOPICS)}"),
            ("Question", QUESTION),
            ("Preset", f"{preset}: {PRESETS[preset][0]}"),
        ):
            console.print(Text.assemble((f"{label:<10}", "bold"), text))
        results = {
            f"retention {name}": run_with_spinner(
                loaded, inputs, config, {"max_new_tokens": _ANSWER_TOKENS}, f"retention {name}"
            )
            for name, config in configs.items()
        }
        console.print(figures(results, answers=True, encoding=console.encoding))
        for note in dict.fromkeys(note for result in results.values() for note in result.report.notes):
            console.print(f"note: {note}", markup=False)


def document() -> str:
    """The text that the question is about."""
    return "\n\n".join(topics[topic].strip() for topic in TOPICS)
