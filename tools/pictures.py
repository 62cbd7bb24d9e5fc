"""Draws the pictures of the documentation into docs/images/; run it with `python tools/pictures.py` (a few minutes).

Names of pictures after the command draw these alone. Figures are measured anew, so times differ from run to run.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from kvcompress import CompressionConfig
from kvcompress.evaluation import LoadedModel, encode_prompt, inspect, load_model
from kvcompress.evaluation.benchmark import benchmark
from kvcompress.evaluation.perplexity import english_text
from kvcompress.evaluation.plots import lorenz, merging, patches, quality, retention, save, speed
from kvcompress.evaluation.plots.lines import draw_series, legend
from kvcompress.evaluation.plots.rows import read_series
from kvcompress.evaluation.plots.style import drawing, new_figure, ruled
from kvcompress.evaluation.shapes import draw_scene, sample_scene, scene_seed
from kvcompress.evaluation.shapes.measure import description_perplexity, held_out_scenes
from kvcompress.files import replacing

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
BUDGETS = [number / 10 for number in range(1, 10)]
POLICIES = ("prefixkv", "uniform", "snapkv", "streaming")
MEMORY_TOKENS = 900
GROUPS, SCENES = 5, 8  # bands are quartiles over groups of scenes
LARGEST = 150_000  # bytes of a picture in the repository


def main() -> None:
    """Draws the pictures that are named, or all of them."""
    wanted = sys.argv[1:]

    def write(name: str, draw: Callable[[], Any]) -> None:
        if not wanted or name in wanted:
            save_small(name, draw())

    loaded = load_model("shapes")
    scene = draw_scene(sample_scene(scene_seed("test", 0)))
    inputs = encode_prompt(loaded, "describe the image.", image=scene)

    def look(budget: float, preset: str = "prefixkv") -> Any:
        return inspect(loaded, inputs, CompressionConfig.preset(preset, budget=budget))

    found = look(0.3)
    write("lorenz", lambda: lorenz(found.importance))
    write("retention", lambda: retention({budget: look(budget).retention for budget in (0.2, 0.5, 0.8)}))
    write("retention-nine", lambda: retention({budget: look(budget).retention for budget in BUDGETS}))
    write("patches", lambda: patches(found.report, found.grid, found.picture))
    heads = look(0.3, "snapkv")
    write("patches-heads", lambda: patches(heads.report, heads.grid, heads.picture, layers=[0, 2, 4, 6]))
    merged = inspect(loaded, inputs, CompressionConfig.preset("lightkv"))
    write("lightkv", lambda: merging(merged.report, merged.grid, merged.picture))
    write("speed", lambda: speed(list(speeds(loaded))))
    write("memory", lambda: memory(list(default_memory(loaded))))
    write("quality", lambda: quality(list(perplexities(loaded)), "perplexity"))
    if not wanted or any(name.endswith("smollm2") for name in wanted):
        loaded = load_model("smollm2")
        inputs = encode_prompt(loaded, f"{english_text()[:5000]}\n\nWhat is this about?")
        write("lorenz-smollm2", lambda: lorenz(look(0.3).importance))
        write("retention-smollm2", lambda: retention({budget: look(budget).retention for budget in (0.1, 0.3)}))


def perplexities(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """Perplexity of right descriptions, median and quartiles over groups of scenes."""
    scenes = held_out_scenes(GROUPS * SCENES)
    groups = [scenes[start : start + SCENES] for start in range(0, len(scenes), SCENES)]
    cells = [("full cache", 1.0, None)]
    cells += [(name, budget, CompressionConfig.preset(name, budget=budget)) for name in POLICIES for budget in BUDGETS]
    for policy, budget, config in cells:
        values = [description_perplexity(loaded, config, group) for group in groups]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        metrics = {"perplexity": {"value": middle, "low": low, "high": high}}
        print(policy, budget, f"{middle:.3f} ({low:.3f}-{high:.3f})")
        yield {"policy": policy, "budget": budget, "metrics": metrics}


def speeds(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """Times of a prompt of 900 tokens."""
    configs = [
        (name, CompressionConfig.preset(name, budget=budget))
        for name in ("prefixkv", "snapkv")
        for budget in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    for measurement in benchmark(loaded, configs, prompt_tokens=[900], rounds=7, new_tokens=32):
        yield measurement.to_dict()


def default_memory(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """Bytes that a prompt of text takes with the default preset, beside the cache of transformers."""
    configs = [("auto", CompressionConfig.preset("auto", budget=budget)) for budget in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)]
    wanted: dict[str, Any] = {"prompt_tokens": [MEMORY_TOKENS], "rounds": 1, "new_tokens": 32}
    for measurement in benchmark(loaded, configs, references=["DynamicCache"], **wanted):
        yield measurement.to_dict()


@drawing
def memory(rows: list[dict[str, Any]]) -> Any:
    """Memory against the budget: the picture on top of the README."""
    figure, series = new_figure(4.6, 2.9), read_series(rows, "held_bytes", "budget")
    axes = figure.subplots()
    draw_series(axes, series, "budget", 1e-6)
    axes.set_ylabel("cache after the answer (MB)")
    axes.set_ylim(0, 1.12e-6 * max(point.high for line in series for point in line.points))
    ruled(axes)
    legend(figure, axes)
    said = f"ShapesLLaVA, preset auto, one prompt of {MEMORY_TOKENS} tokens of text and 32 of the answer"
    figure.supxlabel(said, fontsize="small")
    return figure


def save_small(name: str, figure: Any) -> None:
    """Writes a PNG of few colours, which is small."""
    with tempfile.TemporaryDirectory() as folder:
        image, _ = save(figure, Path(folder) / name)
        with Image.open(image) as drawn:
            small = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    with replacing(path, "picture") as file:
        small.save(file, format="PNG", optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    assert size < LARGEST, f"{path} is too large for the repository"


if __name__ == "__main__":
    main()
