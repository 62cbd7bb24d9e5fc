"""Quality against retention, on ShapesLLaVA: `python -m benchmarks.shapes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Column, Table

from benchmarks.machine import about_line, console
from kvcompress.config import CompressionConfig
from kvcompress.evaluation.calibration import retentions
from kvcompress.evaluation.data import load_samples
from kvcompress.evaluation.models import LoadedModel, load_model
from kvcompress.evaluation.shapes.measure import accuracy, description_perplexity, gini_per_layer, held_out_scenes
from kvcompress.evaluation.shapes.questions import KINDS
from kvcompress.evaluation.shapes.scenes import Scene
from kvcompress.policies.registry import REDUCERS, SCORERS

RETENTIONS = (0.5, 0.2, 0.1)
CALIBRATED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
LAYER_SIZES: dict[str, dict[str, Any]] = {
    "prefixkv": {},
    "prefixkv with the attention of queries after the image": {
        "scorer": {"name": "attention", "queries": "post_vision"}
    },
}


def methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is compared: presets with what is set in them; "random" only where that scorer is registered."""
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ("prefixkv", "uniform", "streaming")}
    if "random" in SCORERS.names():
        found["random"] = ("uniform", {"scorer": "random"})
    return found


def quality(loaded: LoadedModel, scenes: Sequence[Scene]) -> Iterator[tuple[str, dict[str, float]]]:
    """Accuracy of each kind of question and perplexity of descriptions: the full cache, each method, each reducer."""
    configs: dict[str, CompressionConfig | None] = {"full": None}
    for name, (preset, fields) in methods().items():
        for share in RETENTIONS:
            configs[f"{name} {share:.0%}"] = CompressionConfig.preset(preset, budget=share, **fields)
    for name in REDUCERS.names():
        configs[f"full, reducer {name}"] = CompressionConfig.preset("full", reducer=name)
    renumbered = {"name": "lightkv", "positions": "contiguous"}
    configs["full, reducer lightkv, contiguous"] = CompressionConfig.preset("full", reducer=renumbered)
    for share in RETENTIONS:
        configs[f"prefixkv+lightkv {share:.0%}"] = CompressionConfig.preset("prefixkv+lightkv", budget=share)
    for name, config in configs.items():
        yield (
            name,
            {
                **accuracy(loaded, config, scenes),
                "perplexity": description_perplexity(loaded, config, scenes),
            },
        )


def calibration_table(loaded: LoadedModel, config: CompressionConfig, few: int = 10, many: int = 100) -> Table:
    """How far the retention from a few prompts is from that of many, beside what layers differ by."""
    found = retentions(loaded, config, load_samples("shapes", limit=many), CALIBRATED)
    mean = found.mean(0)
    rows = {
        f"{few} samples against {many}, mean absolute": (found[:few].mean(0) - mean).abs().mean(1),
        "standard deviation between layers": mean.std(1),
        "largest minus smallest layer": mean.amax(1) - mean.amin(1),
        "standard deviation between samples": found.std(0).mean(1),
    }
    table = Table("retention at budget", *map(str, CALIBRATED), title_justify="left")
    for name, figures in rows.items():
        table.add_row(name, *(f"{figure:.4f}" for figure in figures.tolist()))
    return table


def main(
    scenes: Annotated[int, typer.Option(help="Held-out scenes; one question of each kind a scene.")] = 100,
) -> None:
    """Prints what compression costs a model whose right answers are known."""
    loaded, printer = load_model("shapes"), console()
    printer.print(about_line())
    held_out = held_out_scenes(scenes)
    found = gini_per_layer(loaded, held_out[:25])
    printer.print("Gini coefficient of importance per layer: " + ", ".join(f"{value:.2f}" for value in found))
    title = f"ShapesLLaVA, {scenes} held-out scenes: right answers, and perplexity of descriptions"
    first = Column("cache", no_wrap=True)
    table = Table(first, *KINDS, "objects", "perplexity", title=title, title_justify="left")
    for name, figures in track(quality(loaded, held_out), "answering", console=printer, transient=True):
        shares = [f"{figures[kind]:.0%}" for kind in (*KINDS, "description")]
        table.add_row(name, *shares, f"{figures['perplexity']:.3f}")
    printer.print(table)
    for label, fields in LAYER_SIZES.items():
        sizes = calibration_table(loaded, CompressionConfig.preset("prefixkv", **fields))
        sizes.title = f"Calibration, {label}"
        printer.print(sizes)


if __name__ == "__main__":
    typer.run(main)
