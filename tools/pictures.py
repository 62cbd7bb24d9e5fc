"""Draws the pictures of the documentation into docs/images/; run it with `python tools/pictures.py` (a few minutes).

Names of pictures after the command draw these alone. docs/images/data.json keeps what each picture shows: the figures
behind it, what it is of, and the digest of the file; the tests compare that with what the code gives. Times differ from
run to run, so where they were measured, and when, stands with them.
"""

import functools
import hashlib
import json
import platform
import re
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
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
from kvcompress.files import replacing, write_text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"
DATA = FOLDER / "data.json"
BUDGETS = tuple(number / 10 for number in range(1, 10))
POLICIES = ("prefixkv", "uniform", "snapkv", "streaming")
TOKENS, NEW_TOKENS, ROUNDS = 900, 32, 7  # of what is timed
HELD_AFTER = 8  # tokens of the answer, where bytes are counted
LETTERS = 2000  # of the text that SmolLM2 reads
GROUPS, SCENES = 5, 8  # bands are quartiles over groups of scenes
_SMALL = 6.5  # points
LARGEST = 200_000  # bytes of a picture in the repository
NAMES = {"shapes": "ShapesLLaVA", "smollm2": "SmolLM2-135M"}

Facts = dict[str, Any]
Draw = Callable[[], Any]


def main() -> None:
    """Draws the pictures that are named, or all of them."""
    kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for name, look in PICTURES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        caption, facts, draw = look()
        path = save_small(name, captioned(draw(), caption))
        kept[name] = {"caption": caption, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "facts": facts}
        lines = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in PICTURES if name in kept)
        write_text(DATA, "{\n" + ",\n".join(lines) + "\n}\n", "data of pictures")


@functools.cache
def prompt(model: str) -> tuple[LoadedModel, dict[str, Any]]:
    """A model and what it reads."""
    loaded = load_model(model, dtype="float32")
    if model == "smollm2":
        return loaded, encode_prompt(loaded, f"{english_text()[:LETTERS]}\n\nWhat is this about?")
    return loaded, encode_prompt(loaded, "describe the image.", image=draw_scene(sample_scene(scene_seed("test", 0))))


@functools.cache
def look(budget: float, preset: str = "prefixkv", model: str = "shapes") -> Any:
    """What layers make of the prompt."""
    return inspect(*prompt(model), CompressionConfig.preset(preset, budget=budget))


def told(found: Any, model: str, preset: str) -> str:
    """What a look into one prompt is of."""
    image = f", {len(found.image)} of them of an image" if found.image else ""
    return f"{NAMES[model]}, preset {preset}, one prompt of {found.tokens:,} tokens{image}"


def lorenz_curves(model: str) -> tuple[str, Facts, Draw]:
    """Importance, which no budget changes."""
    found = look(0.3, model=model)
    facts = {"gini": [round(value, 3) for value in found.gini]}
    return f"{told(found, model, 'prefixkv')}; scores of the whole prompt", facts, lambda: lorenz(found.importance)


def retentions(model: str, *budgets: float) -> tuple[str, Facts, Draw]:
    """Tokens that each layer keeps."""
    found = {budget: look(budget, model=model) for budget in budgets}
    facts = {"kept": {str(budget): [float(kept) for kept in each.kept] for budget, each in found.items()}}
    caption = told(found[budgets[0]], model, "prefixkv")
    return caption, facts, lambda: retention({budget: each.retention for budget, each in found.items()})


def patch_pictures(preset: str, *layers: int) -> tuple[str, Facts, Draw]:
    """Patches that each layer keeps."""
    found = look(0.3, preset)
    facts = {"held": [found.report.held_positions[layer][0] for layer in layers]}
    caption = f"{told(found, 'shapes', preset)}, budget 30 %"
    return caption, facts, lambda: patches(found.report, found.grid, found.picture, layers=layers)


def light() -> tuple[str, Facts, Draw]:
    """Patches that merged."""
    found = look(1.0, "lightkv")
    into = {str(layers): rows[0] for layers, rows in found.report.went_into.items()}
    caption = told(found, "shapes", "lightkv")
    return caption, {"went_into": into}, lambda: merging(found.report, found.grid, found.picture)


def perplexities() -> tuple[str, Facts, Draw]:
    """Perplexity of right descriptions, median and quartiles over groups of scenes."""
    cells = [("full cache", 1.0), *((name, budget) for name in POLICIES for budget in BUDGETS)]
    facts = {"groups": [[*cell, [round(value, 4) for value in group_perplexities(*cell)]] for cell in cells]}
    caption = (
        f"ShapesLLaVA, {GROUPS * SCENES} held-out scenes, prompts of 151 tokens and answers of about 60; "
        f"lines are medians, bands quartiles, over {GROUPS} groups of {SCENES} scenes"
    )
    return caption, facts, lambda: quality(list(quartiles(facts["groups"])), "perplexity", log=True)


def group_perplexities(policy: str, budget: float, groups: int = GROUPS) -> list[float]:
    """One figure for each group of scenes."""
    config = None if policy == "full cache" else CompressionConfig.preset(policy, budget=budget)
    scenes = held_out_scenes(groups * SCENES)
    starts = range(0, len(scenes), SCENES)
    return [description_perplexity(prompt("shapes")[0], config, scenes[at : at + SCENES]) for at in starts]


def quartiles(cells: list[Any]) -> Iterator[dict[str, Any]]:
    """Rows for `quality`."""
    for policy, budget, values in cells:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        figures = {"value": middle, "low": low, "high": high}
        yield {"policy": policy, "budget": budget, "metrics": {"perplexity": figures}}


def speeds() -> tuple[str, Facts, Draw]:
    """Times of a prompt of text."""
    configs = [
        (name, CompressionConfig.preset(name, budget=budget))
        for name in ("auto", "prefixkv")
        for budget in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    ]
    wanted: dict[str, Any] = {"prompt_tokens": [TOKENS], "rounds": ROUNDS, "new_tokens": NEW_TOKENS}
    rows = [row.to_dict() for row in benchmark(prompt("shapes")[0], configs, **wanted)]
    named = ("policy", "budget", "seconds_to_first_token", "seconds_per_token", "tokens_per_second")
    kept = [{key: value for key, value in row.items() if key.startswith(named)} for row in rows]
    measured = {"processor": processor(), "threads": torch.get_num_threads(), "date": date.today().isoformat()}
    caption = (
        f"ShapesLLaVA, presets auto and prefixkv, one prompt of {TOKENS} tokens of text and {NEW_TOKENS} of answer; "
        f"lines are medians, bands quartiles, over {ROUNDS} rounds; {measured['processor']}, "
        f"threads: {measured['threads']}; {measured['date']}"
    )
    return caption, {"measured": measured, "rows": kept}, lambda: speed(kept)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def default_memory() -> tuple[str, Facts, Draw]:
    """Bytes that a prompt of text takes with the default preset, beside the cache of transformers."""
    configs = [("auto", CompressionConfig.preset("auto", budget=budget)) for budget in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)]
    wanted: dict[str, Any] = {"prompt_tokens": [TOKENS], "rounds": 1, "new_tokens": HELD_AFTER}
    found = benchmark(prompt("shapes")[0], configs, references=["DynamicCache"], **wanted)
    rows = [{key: row.to_dict()[key] for key in ("policy", "budget", "held_bytes")} for row in found]
    caption = f"ShapesLLaVA, preset auto, one prompt of {TOKENS} tokens of text and {HELD_AFTER} of the answer"
    return caption, {"rows": rows}, lambda: memory(rows)


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
    return figure


def measured(title: str, caption: str, *shown: str) -> tuple[str, Facts, Draw]:
    """A grid of docs/evaluation.md, from the table on that page."""
    rows = table(title)
    caption += "; bands are 95 % bootstrap bounds, coloured presets alone have one; the others are grey"
    return caption, {"rows": rows}, lambda: quality(rows, "perplexity", shown=shown, log=True)


def table(title: str) -> list[dict[str, Any]]:
    """Rows of a table under a title of docs/evaluation.md, the full cache first, as it stands in the words above it."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split(f"\n### {title}\n")[1].split("\n#")[0]
    figure = r"([\d.]+) \(([\d.]+)-([\d.]+)\)"
    whole = re.search(rf"full\s+cache\s+has\s+{figure}", section)
    assert whole is not None, title
    rows = [_row("full cache", 1.0, whole.groups())]
    head = next(line for line in section.splitlines() if line.startswith("| preset |"))
    budgets = [float(cell) for cell in head.strip("| ").split(" | ")[1:]]
    for name, cells in re.findall(r"^\| `(.*?)` \| (.*) \|$", section, re.MULTILINE):
        found = [re.fullmatch(figure, cell) for cell in cells.split(" | ")]
        rows += [_row(name, budget, cell.groups()) for budget, cell in zip(budgets, found, strict=True) if cell]
    return rows


def _row(policy: str, budget: float, figures: Any) -> dict[str, Any]:
    value, low, high = map(float, figures)
    metric = {"value": value, "ci_low": low, "ci_high": high}
    return {"policy": policy, "budget": budget, "metrics": {"perplexity": metric}}


def captioned(figure: Any, caption: str) -> Any:
    """A figure that says below what it is of."""
    before = figure.get_supxlabel()
    caption = textwrap.fill(caption, int(figure.get_figwidth() * 72 / (0.56 * _SMALL)))
    figure.supxlabel(f"{before}\n{caption}" if before else caption, fontsize=_SMALL, color="0.25")
    return figure


def save_small(name: str, figure: Any) -> Path:
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
    print(f"{path}: {size:,} bytes", flush=True)
    assert size < LARGEST, f"{path} is too large for the repository"
    return path


PICTURES: dict[str, Callable[[], tuple[str, Facts, Draw]]] = {
    "lorenz": lambda: lorenz_curves("shapes"),
    "lorenz-smollm2": lambda: lorenz_curves("smollm2"),
    "retention": lambda: retentions("shapes", 0.2, 0.5, 0.8),
    "retention-nine": lambda: retentions("shapes", *BUDGETS),
    "retention-smollm2": lambda: retentions("smollm2", 0.1, 0.3),
    "patches": lambda: patch_pictures("prefixkv", *range(8)),
    "patches-heads": lambda: patch_pictures("snapkv", 0, 2, 4, 6),
    "lightkv": light,
    "memory": default_memory,
    "quality": perplexities,
    "evaluation-shapes": lambda: measured(
        "Descriptions of drawn scenes",
        "ShapesLLaVA, 64 scenes, prompts of 151 tokens and answers of about 60",
        *("prefixkv", "prefixkv+merge", "image", "snapkv"),
    ),
    "evaluation-smollm2": lambda: measured(
        "Continuations of English text",
        "SmolLM2-135M, bfloat16, 6 texts, prompts of about 515 tokens, 25 words after each",
        *("prefixkv", "text", "h2o", "streaming"),
    ),
    "speed": speeds,
}


if __name__ == "__main__":
    main()
