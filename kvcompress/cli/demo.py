"""`kvcompress demo`: one long document, one question, three cache sizes."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Annotated

import typer

from kvcompress.cli.console import output, reported
from kvcompress.cli.display import figures
from kvcompress.cli.generate import load_with_spinner, run_with_spinner
from kvcompress.config import CompressionConfig
from kvcompress.evaluation import encode_prompt

EPILOG = """
[bold]Examples[/bold]

kvcompress demo

kvcompress demo --preset streaming
"""

TOPICS = ("execmodel", "with")
QUESTION = "What is the with statement used for?"
RETENTIONS = (1.0, 0.5, 0.2)


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
        inputs = encode_prompt(loaded, f"{document()}\n\n{QUESTION}", chat=False)
        console = output()
        length = inputs["input_ids"].shape[1]
        console.print(f"[bold]Document[/bold]  {', '.join(TOPICS)} of Python's reference, {length:,} tokens")
        console.print(f"[bold]Question[/bold]  {QUESTION}")
        console.print(f"[bold]Preset[/bold]    {preset}: {CompressionConfig.preset(preset)}")
        results = {
            name: run_with_spinner(loaded, inputs, config, {"max_new_tokens": 48}, f"retention {name}")
            for name, config in configs.items()
        }
        console.print(figures(results, answers=True, encoding=console.encoding))


def document() -> str:
    """The text that the question is about."""
    return "\n\n".join(topics[topic].strip() for topic in TOPICS)
