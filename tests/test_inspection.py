"""What `inspect` tells about a prompt is what the model attended to and what the cache holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cli import app
from kvcompress.errors import ConfigError
from kvcompress.evaluation import LoadedModel, encode_prompt, inspect, load_model
from kvcompress.evaluation.image_grid import image_positions, patch_grids, square_grid
from kvcompress.evaluation.shapes import draw_scene, sample_scene, scene_seed
from tests import checkpoints, tiny

QUESTION = "describe the image."
HALF = CompressionConfig.preset("prefixkv", budget=0.5)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def loaded(name: str) -> LoadedModel:
    return LoadedModel(name, tiny.model(name), checkpoints.text_tokenizer())


@pytest.fixture(scope="module")
def shapes() -> LoadedModel:
    return load_model("shapes")


@pytest.fixture(scope="module")
def scene() -> Any:
    return draw_scene(sample_scene(scene_seed("test", 0)))


@pytest.fixture
def picture(tmp_path: Path, scene: Any) -> Path:
    scene.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


# -- the function ------------------------------------------------------------------------------------------------------


def test_importance_is_the_attention_of_all_queries_averaged_over_heads() -> None:
    inputs, model = tiny.inputs("llama", 30, seed=3), tiny.build("llama")
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(**inputs, output_attentions=True).attentions
    found = inspect(loaded("llama"), inputs, HALF)
    for layer, attention in zip(found.importance, attentions, strict=True):
        np.testing.assert_allclose(layer, attention[0].mean(0).sum(0), rtol=1e-4, atol=1e-5)


def test_gini_is_half_the_mean_difference_of_all_pairs_over_the_mean() -> None:
    found = inspect(loaded("llama"), tiny.inputs("llama", 30, seed=3), HALF)
    for layer, gini in zip(found.importance, found.gini, strict=True):
        values = np.array(layer)
        assert gini == pytest.approx(np.abs(values[:, None] - values).mean() / (2 * values.mean()))


@pytest.mark.parametrize("preset", ["prefixkv", "snapkv", "streaming", "full", "kivi4"])
def test_what_is_kept_is_what_a_cache_of_that_configuration_keeps(preset: str) -> None:
    config = CompressionConfig.preset(preset)
    if config.evictor is not None:
        config = config.override(budget=0.5)
    inputs = tiny.inputs("llava", 90, seed=1)
    found = inspect(loaded("llava"), inputs, config)
    cache = CompressedCache(tiny.model("llava"), config)
    with torch.inference_mode():
        tiny.model("llava")(**inputs, **tiny.with_cache(cache))
        assert found.report == cache.report()
    assert found.kept == [rows[0] for rows in found.report.layer_lengths] and found.tokens == 94
    assert found.retention == [kept / 94 for kept in found.kept]
    image = set(found.image)
    for layer, kept in enumerate(found.image_kept):
        sets = found.report.held_positions[layer][0]
        assert kept == pytest.approx(sum(len(image & set(held)) for held in sets) / len(sets))


@pytest.mark.parametrize(
    ("preset", "scorer"), [("snapkv", "snapkv"), ("streaming", "attention"), ("full", "attention")]
)
def test_importance_is_the_configurations_own_where_that_is_a_mass(preset: str, scorer: str) -> None:
    inputs = tiny.inputs("llama", 60, seed=0)
    assert inspect(loaded("llama"), inputs, CompressionConfig.preset(preset)).scored_by == scorer
    keys = CompressionConfig.preset("uniform", scorer="key_diff")
    assert inspect(loaded("llama"), inputs, keys).scored_by == "attention"


def test_image_tokens_lie_on_the_grid_of_patches_and_the_picture_is_what_the_model_saw(
    shapes: LoadedModel, scene: Any
) -> None:
    found = inspect(shapes, encode_prompt(shapes, QUESTION, image=scene), HALF)
    assert found.grid == square_grid(found.image) and found.grid.shape == (12, 12)
    first = found.image[0]
    assert found.grid.cells[found.grid.positions.index(first + 14)] == (1, 2)  # row by row
    assert found.picture is not None
    np.testing.assert_allclose(found.picture.numpy() * 255, np.asarray(scene), atol=1.01)


def test_without_an_image_there_is_no_grid_and_no_picture(shapes: LoadedModel) -> None:
    found = inspect(shapes, encode_prompt(shapes, "how many circles?"), HALF)
    assert found.image == [] and found.grid is None and found.picture is None
    assert found.to_dict()["image_kept_per_layer"] is None


def test_an_image_in_tiles_lies_on_its_base_grid_first() -> None:
    inputs = tiny.inputs("llava_next", 20, seed=0)
    found = inspect(loaded("llava_next"), inputs, HALF)
    base, tiles = patch_grids(loaded("llava_next"), inputs)
    assert len(found.image) == 24 and found.grid == base == square_grid(found.image[:4])
    assert tiles.shape == (4, 4) and tiles.positions == tuple(
        c for c in found.image[4:] if (c - found.image[4]) % 5 < 4
    )
    assert found.image == image_positions(loaded("llava_next"), inputs["input_ids"]) == list(range(10, 34))


def test_several_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="one prompt at a time is looked at; got 2 rows"):
        inspect(loaded("llama"), tiny.inputs("llama", 8, seed=0, batch=2), HALF)


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_tells_every_layer_and_names_the_pictures(tmp_path: Path, picture: Path) -> None:
    arguments = ("inspect", "--model", "shapes", "--image", picture, "--prompt", QUESTION, "--budget", "0.3")
    result = run(*arguments, "--json", "--plot", tmp_path / "new" / "pictures")
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["image_tokens"] == 144 and told["scored_by"] == "attention"
    for name in ("gini_per_layer", "kept_per_layer", "retention_per_layer", "image_kept_per_layer"):
        assert len(told[name]) == 8, name
    assert told["retention"] == pytest.approx(sum(told["retention_per_layer"]) / 8) and told["retention"] <= 0.3
    written = [Path(path) for path in told["pictures"]]
    assert [path.name for path in written] == [
        f"{name}.{ending}" for name in ("lorenz", "retention", "patches") for ending in ("png", "svg")
    ]
    assert all(path.stat().st_size > 1000 for path in written)
    with Image.open(tmp_path / "new" / "pictures" / "patches.png") as opened:
        assert opened.width == 1400


def test_people_get_a_table_with_a_row_for_each_layer(picture: Path) -> None:
    result = run("inspect", "--model", "shapes", "--image", picture, "--prompt", QUESTION, "--preset", "streaming")
    assert result.exit_code == 0
    for label in ("layer", "kept", "of 144 image tokens", "retention", "Gini (attention)", "key/value cache"):
        assert label in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[1:2] == ["151"]]
    assert [row[0] for row in rows] == [str(layer) for layer in range(8)]
    assert sum(int(row[2]) for row in rows) == int(0.2 * 8 * 151)


def test_a_text_model_has_no_patches_and_is_given_no_image(text: Path, picture: Path, tmp_path: Path) -> None:
    result = run("inspect", "--model", text, "--prompt", "hello " * 9, "--plot", tmp_path / "p", "--json")
    assert {Path(path).stem for path in json.loads(result.stdout)["pictures"]} == {"lorenz", "retention"}
    refused = run("inspect", "--model", text, "--prompt", "hello", "--image", picture)
    assert refused.exit_code == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "is a text model (llama); an image needs a LLaVA model" in refused.stderr


def test_without_matplotlib_the_command_says_so_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name))
    for command in ("inspect", "bench"):
        prompt = ("--prompt", "hello") if command == "inspect" else ()
        result = run(command, "--model", "./missing", *prompt, "--plot", tmp_path)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert "pip install 'kvcompress[evaluation]'" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_help_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"kvcompress {command} --" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "--prompt", "x", "--plot", __file__],
        ["inspect", "--prompt", "x", "--image", "missing.png"],
        ["inspect", "--prompt", "x", "--preset", "full", "--config", "x.yaml"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr
