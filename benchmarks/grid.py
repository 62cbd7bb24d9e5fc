"""What is left of a model's answers after compression, for many ways to compress: `python -m benchmarks.grid SUITE`.

A prompt is read once; from there it is scored once for every scorer, and cut in every way to every budget, each time in
a copy. What follows (a question and its right answer, or how a text goes on) is then read in one forward, the whole of
it kept, which gives the likelihood of the right answer and whether greedy decoding would have said it. So hundreds of
configurations cost hardly more than one, and all of them see the same prompts.

Every prompt's results are a line of a file in a folder; what is there already is not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.grid_pages import page_methods, pages
from benchmarks.grid_readings import Methods, Prompt, measured
from benchmarks.grid_scenes import scene_methods, scenes
from benchmarks.grid_text import many, many_methods, needle_methods, needles, short, short_methods
from benchmarks.machine import about_line
from kvcompress.evaluation.models import LoadedModel, load_model

SUITES: dict[str, tuple[str, str, Callable[[LoadedModel, int], Iterator[Prompt]], Callable[[], Methods]]] = {
    "needle": ("smollm2", "float32", needles, needle_methods),
    "short": ("smollm2", "float32", short, short_methods),
    "scenes": ("shapes", "float32", scenes, scene_methods),
    "many": ("smollm2", "float32", many, many_methods),
    "pages": ("pages", "float32", pages, page_methods),
}


def main(
    suite: Annotated[str, typer.Argument(help=f"What is measured: {', '.join(SUITES)}.")],
    samples: Annotated[int, typer.Option(help="Prompts, or scenes.")] = 32,
    folder: Annotated[Path, typer.Option(help="For the lines of JSON; a run that was stopped goes on.")] = Path("grid"),
    only: Annotated[str, typer.Option(help="Methods, with commas; all if left out.")] = "",
) -> None:
    """Measures what is not in the folder yet."""
    model, dtype, prompts, methods = SUITES[suite]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{suite}.jsonl"
    done = set()
    if file.exists():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            done.add((row["task"], row["prompt"]))
    loaded = load_model(model, dtype=dtype)
    print(about_line(), flush=True)
    chosen = {name: ways for name, ways in methods().items() if not only or name in only.split(",")}
    with torch.inference_mode(), file.open("a") as out:
        for prompt in prompts(loaded, samples):
            if (prompt.task, prompt.name) in done:
                continue
            start = time.process_time()
            rows = list(measured(loaded, prompt, chosen))
            seconds = time.process_time() - start
            out.write("".join(json.dumps({**row, "seconds": seconds}) + "\n" for row in rows))
            out.flush()
            print(prompt.task, prompt.name, f"{seconds:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    typer.run(main)
