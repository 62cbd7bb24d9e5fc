"""Evaluation data: each public format gives its questions and answers, and what is wrong with a file is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvcompress.errors import ConfigError, UnsupportedModelError
from kvcompress.evaluation import LoadedModel, load_model
from kvcompress.evaluation.data import Sample, answer_ids, data_hash, encode_sample, load_samples
from kvcompress.evaluation.data.built_in import split_text
from tests import checkpoints

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_text(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_image(tmp_path_factory.mktemp("image"), VICUNA)))


def save_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(path)
    return path


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def dialogue(name: str, image: str | None, *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": said}


# -- files -------------------------------------------------------------------------------------------------------------


def test_llava_description_gives_the_first_question_without_the_image_token(tmp_path: Path) -> None:
    entries = [
        dialogue("000000442786", "coco/train2017/000000442786.jpg", "Explain the scene.\n<image>", "A red bus."),
        dialogue("000000442786", None, "Why?", "Because.", "And then?", "Nothing."),
    ]
    path = write(tmp_path / "detail_1k.json", entries)
    described, plain = load_samples(path, images=tmp_path)
    image = tmp_path / "coco/train2017/000000442786.jpg"
    assert described == Sample("000000442786", "Explain the scene.", "A red bus.", image)
    assert plain == Sample("000000442786#2", "Why?", "Because.")
    assert load_samples(path, limit=1)[0].image == image  # the file's own folder


def test_mm_vet_gives_questions_with_capabilities_as_kinds(tmp_path: Path) -> None:
    entry = {
        "imagename": "v1_0.png",
        "question": "What is x in the equation?",
        "answer": "-1<AND>-5",
        "imagesource": "https://example.org/v1_0.png",
        "capability": ["ocr", "math"],
    }
    path = write(tmp_path / "mm-vet.json", {"v1_0": entry, "v1_1": {**entry, "imagename": "v1_1.png"}})
    (tmp_path / "images").mkdir()
    first, second = load_samples(path)
    wanted = Sample("v1_0", entry["question"], "-1<AND>-5", tmp_path / "images/v1_0.png", kind="ocr+math")  # type: ignore[arg-type]
    assert first == wanted and second.image == tmp_path / "images/v1_1.png"
    assert load_samples(path, images=tmp_path)[0].image == tmp_path / "v1_0.png"
    # the list of questions that the scripts of PrefixKV and Elastic Cache read
    listed = write(tmp_path / "list.json", [{"image": "v1_0.png", "question": "What is x?", "answer": "-1"}])
    assert load_samples(listed)[0] == Sample("0", "What is x?", "-1", tmp_path / "images/v1_0.png")


def test_lines_of_questions_may_name_them_in_each_common_way(tmp_path: Path) -> None:
    lines = [
        {"question": "One?", "answer": 1},
        {"prompt": "Two?", "answer": "2", "id": "b"},
        {"text": "<image>\nThree?", "image": "three.png", "question_id": 7},
    ]
    path = write(tmp_path / "questions.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert load_samples(path) == [
        Sample("0", "One?", "1"),
        Sample("b", "Two?", "2"),
        Sample("7", "Three?", None, tmp_path / "three.png"),
    ]


def test_a_document_comes_before_its_question(tmp_path: Path) -> None:
    lines = [
        {"context": "Paris lies on the Seine.\n", "question": "Where is Paris?", "answer": "on the Seine"},
        {"context": "", "question": "And Rome?"},
        {"context": None, "text": "And Oslo?"},
    ]
    first, *others = load_samples(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert first.prompt == "Paris lies on the Seine.\n\nWhere is Paris?"
    assert [sample.prompt for sample in others] == ["And Rome?", "And Oslo?"]


@pytest.mark.parametrize("name", ["a.json", "b.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"passage": "Rome."}, r"unknown field 'passage'; known: question, prompt, text, context, answer, image"),
        ({"answers": ["x"]}, "unknown field 'answers'"),
        ({"prompt": "p"}, "has both 'question' and 'prompt'"),
        ({"image": "a.png", "imagename": "b.png"}, "has both 'image' and 'imagename'"),
        ({"id": 1, "question_id": 2}, "has both 'id' and 'question_id'"),
        ({"context": ["a", "b"]}, "'context' must be a text; got list"),
        ({"image": ["a.png"]}, "'image' must be a text; got list"),
        ({"answer": ["a"]}, "'answer' must be one text or number; got list"),
        ({"category": "text"}, "the kind 'text' is that of plain text"),
        ({"capability": [1]}, "must be a text or a list of texts"),
    ],
)
def test_no_field_of_a_record_is_dropped(tmp_path: Path, name: str, fields: dict[str, Any], says: str) -> None:
    entry = {"question": "q", **fields}
    content: Any = {"a.json": [entry], "b.json": {"first": entry}, "a.jsonl": json.dumps(entry)}[name]
    with pytest.raises(ConfigError, match=says) as caught:
        load_samples(write(tmp_path / name, content))
    assert any(place in str(caught.value) for place in ("entry 0", "entry 'first'", "line 1"))


@pytest.mark.parametrize(("where", "fields"), [("entry", {"context": "c"}), ("turn", {"weight": 0})])
def test_no_field_of_a_dialogue_is_dropped(tmp_path: Path, where: str, fields: dict[str, Any]) -> None:
    one = dialogue("a", None, "q", "a") | {"model": "vicuna", "metadata": {"by": "hand"}}
    assert load_samples(write(tmp_path / "good.json", [one])) == [Sample("a", "q", "a")]
    (one if where == "entry" else one["conversations"][1]).update(fields)
    with pytest.raises(ConfigError, match=rf"entry 0: .*unknown field '{next(iter(fields))}'"):
        load_samples(write(tmp_path / "wrong.json", [one]))


def test_what_a_record_says_of_its_kind_is_kept_and_metadata_are_for_its_reader(tmp_path: Path) -> None:
    given = [{"category": "conv"}, {"capability": "ocr"}, {"capability": ["ocr", "math"]}, {"kind": "count"}, {}]
    entries = [{"question": "q", "metadata": [1, 2], **fields} for fields in given]
    found = load_samples(write(tmp_path / "a.json", entries))
    assert [sample.kind for sample in found] == ["conv", "ocr", "ocr+math", "count", ""]


def test_plain_text_is_cut_into_prompts_and_continuations_that_follow_each_other(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(2000)]
    samples = load_samples(write(tmp_path / "book.txt", " ".join(words)))
    assert len(samples) == 2 and all(sample.kind == "text" for sample in samples)
    for index, sample in enumerate(samples):
        assert sample.answer is not None and sample.answer.startswith(" ")
        assert (sample.prompt + sample.answer).split() == words[860 * index : 860 * (index + 1)]
    short = split_text("one two\nthree  four five", 800, 60)
    assert short == [("one two\nthree  four", " five")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[{", "is not valid JSON"),
        ("a.json", "3", "must hold a list of dialogues"),
        ("a.json", "[]", "holds no samples"),
        ("a.json", '[{"conversations": [{"from": "gpt", "value": ""}]}]', "entry 0: 'from' must be human and gpt"),
        ("a.json", '[{"answer": "x"}]', "entry 0: must have 'question' or 'prompt'"),
        ("a.json", '{"v1_0": {"answer": "x"}}', "entry 'v1_0': must have 'question'"),
        ("a.json", '{"v1_0": 3}', "entry 'v1_0': must have 'question'"),
        ("a.json", "[3]", "entry 0: must be an object"),
        ("a.jsonl", '{"question": "q"}\n{"question"', "line 2: is not valid JSON"),
        ("a.jsonl", "\n", "holds no samples"),
        ("a.txt", "alone", "holds no samples"),
        ("a.csv", "q,a", "must end in one of .json, .jsonl, .txt"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"data|conversations") as caught:
        load_samples(write(tmp_path / name, content))
    assert says in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nothing.json", "neither a file"),
        ("needle:size=3", "settings are length=..., depth=...; got 'size=3'"),
        ("needle:length=many", "length must be a number"),
        ("needle:depth=2", "depth: must be from 0 to 1"),
        ("needle:length=9999999", "length: must be from 1 to"),
        ("shapes:kind=xyz", "unknown 'xyz'; known: description, cell"),
        ("shapes:kind=color", "unknown 'color'; did you mean 'colour'"),
        ("needel:length=100", "did you mean 'needle'?"),
    ],
)
def test_a_wrong_source_is_refused_with_what_is_allowed(source: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_samples(source)
    assert says in str(caught.value)


def test_wrong_limits_and_folders_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "q"}')
    with pytest.raises(ConfigError, match="samples: must be at least 1"):
        load_samples(path, limit=0)
    with pytest.raises(ConfigError, match=r"images: .* is no folder"):
        load_samples(path, images=tmp_path / "missing")


# -- built-in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["shapes", "needle:length=60", "text:length=30,answer=6"])
def test_built_in_data_follow_the_seed_and_have_names_of_their_own(source: str) -> None:
    first, again, other = (load_samples(source, limit=9, seed=seed) for seed in (0, 0, 1))
    assert data_hash(first) == data_hash(again) != data_hash(other)
    assert len({sample.name for sample in first}) == 9
    assert all(sample.answer and sample.prompt for sample in first)


def test_scenes_are_asked_about_in_every_way_in_turn_or_in_one() -> None:
    kinds = [sample.kind for sample in load_samples("shapes", limit=7)]
    assert sorted(kinds) == sorted(["description", "cell", "colour", "shape", "count", "exists", "compare"])
    assert {sample.kind for sample in load_samples("shapes:kind=colour", limit=5)} == {"colour"}


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_lies_at_its_depth_and_is_what_the_question_asks_for(depth: float) -> None:
    for sample in load_samples(f"needle:length=200,depth={depth}", limit=3):
        story, question = sample.prompt.split("\n\n")
        place = question.removeprefix("What is the secret code of ").split("?")[0]
        needle = f"The secret code of {place} is {sample.answer}."
        assert sample.prompt.count(str(sample.answer)) == 1 and needle in story
        assert len(story.split()) == 200 + len(needle.split())
        assert len(story[: story.index(needle)].split()) == round(depth * 200)


def test_needles_are_spread_over_all_depths() -> None:
    shares = [float(sample.name.rsplit("-", 1)[1]) for sample in load_samples("needle:length=50", limit=5)]
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]


# -- hash --------------------------------------------------------------------------------------------------------------


def test_the_hash_follows_content_and_images_and_not_where_they_lie(tmp_path: Path) -> None:
    here, there = save_picture(tmp_path / "a/p.png"), save_picture(tmp_path / "b/q.png")
    sample = Sample("one", "What?", "That.", here)
    base = data_hash([sample])
    assert data_hash([replace(sample, image=there)]) == base
    Image.new("RGB", (8, 8)).save(there)
    changed = [
        replace(sample, image=there),
        replace(sample, image=tmp_path / "missing.png"),
        replace(sample, image=None),
        replace(sample, prompt="What?That."),
        replace(sample, answer=None),
        replace(sample, name="two"),
    ]
    assert len({base, *(data_hash([other]) for other in changed)}) == 1 + len(changed)


# -- encoding ----------------------------------------------------------------------------------------------------------


def text_of(loaded: LoadedModel, ids: torch.Tensor) -> str:
    return str(loaded.tokenizer.decode(ids[0]))


def test_the_answer_follows_the_prompt_as_the_template_writes_it(image_model: LoadedModel, tmp_path: Path) -> None:
    sample = Sample("one", "What is this?", "A red square.", save_picture(tmp_path / "p.png"))
    inputs = encode_sample(image_model, sample)
    assert (inputs["input_ids"] == image_model.model.config.image_token_id).sum() == 4
    told = text_of(image_model, inputs["input_ids"]) + text_of(image_model, answer_ids(image_model, sample))
    assert told == "USER: " + 4 * "<image>" + "\nWhat is this? ASSISTANT: A red square."


def test_text_is_read_without_a_template_and_goes_on_as_it_stands(text_model: LoadedModel) -> None:
    sample = Sample("one", "It was a dark", "\nand stormy", kind="text")
    inputs = encode_sample(text_model, sample)
    told = text_of(text_model, inputs["input_ids"]) + text_of(text_model, answer_ids(text_model, sample))
    assert told == "It was a dark\nand stormy"
    asked = replace(sample, kind="")
    assert text_of(text_model, encode_sample(text_model, asked)["input_ids"]) == "U:It was a dark\nA:"


def test_the_tokens_of_an_answer_are_those_of_the_whole_text(text_model: LoadedModel) -> None:
    bare = replace(text_model, tokenizer=checkpoints.text_tokenizer(None))
    sample = Sample("one", "Why?", "Because.")
    prompt, answer = encode_sample(bare, sample)["input_ids"], answer_ids(bare, sample)
    assert torch.cat([prompt, answer], dim=1).tolist() == [bare.tokenizer("Why? Because.").input_ids]


def test_an_unreadable_image_and_an_empty_answer_are_named(image_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.png: there is no such file"):
        encode_sample(image_model, Sample("one", "What?", "That.", tmp_path / "missing.png"))
    with pytest.raises(ConfigError, match=r"torn\.png: cannot be read"):
        encode_sample(image_model, Sample("one", "What?", "That.", Path(write(tmp_path / "torn.png", "no image"))))
    for empty in (None, "", " \n"):
        with pytest.raises(ConfigError, match="sample 'one': its reference answer is empty"):
            answer_ids(image_model, Sample("one", "What?", empty))


def test_a_model_without_vision_refuses_images(text_model: LoadedModel) -> None:
    (sample,) = load_samples("shapes", limit=1)
    with pytest.raises(UnsupportedModelError, match="is a text model"):
        encode_sample(text_model, sample)
