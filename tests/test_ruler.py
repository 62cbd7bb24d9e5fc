"""RULER's tasks: what the package's generators give becomes records, and what cannot be is said in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcompress.cli import app
from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation.data import load_samples
from kvcompress.evaluation.metrics import METRICS
from kvcompress.evaluation.ruler import make_records, records, task_names
from kvcompress.evaluation.ruler.generators import CONTEXT_END, QUESTION_END, parted
from tests import checkpoints
from tools.ruler import table

INSTALLED = all(importlib.util.find_spec(name) for name in ("long_context_eval", "wonderwords", "scipy", "nltk"))
TOKENIZER = checkpoints.text_tokenizer()

# A package of the same form: two generators that read arguments when they are imported, as theirs do.
TASKS = """
TASKS = {
    "niah": {"tokens_to_generate": 9, "template": "A\\n{context}\\nWhat is {query}?", "answer_prefix": " {query} is"},
    "qa": {"tokens_to_generate": 5, "template": "Read.\\n{context}\\nQuestion: {query}", "answer_prefix": " Answer:"},
}
"""
NEEDLES = """
import argparse, random
from tokenizer import select_tokenizer
from constants import TASKS
parser = argparse.ArgumentParser()
for name in ("template", "type_haystack", "random_seed"):
    parser.add_argument(f"--{name}")
args, _ = parser.parse_known_args()
random.seed(args.random_seed)
haystack = ["hay"]
assert args.template == TASKS["niah"]["template"] + TASKS["niah"]["answer_prefix"]

def generate_input_output(size):
    key, value = random.randrange(10**6), str(random.randrange(10**6))
    text = args.template.format(context="hay " * size + f"{key}: {value}", query=key)
    return "An example: " + args.template.format(context="x", query="y") + "\\n" + text, [value, value + "!"]
"""
QUESTIONS = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--template")
args, _ = parser.parse_known_args()
DOCS = ["A document. " * 9] * 50
QAS = [{"context": [0] * number} for number in (1, 40, 2)]
print("noise")

def generate_input_output(index, documents):
    if documents < len(QAS[index]["context"]):
        raise ValueError
    return args.template.format(context="\\n".join(DOCS[:documents]), query=f"What of {index}?"), ["a", "a", "b"]
"""
PACKAGE = {
    "__init__.py": "",
    "synthetic.yaml": "one: {task: niah, args: {type_haystack: repeat}}\nqa_1: {task: qa, args: {dataset: squad}}\n",
    "data/synthetic/constants.py": TASKS,
    "data/synthetic/niah.py": NEEDLES,
    "data/synthetic/qa.py": QUESTIONS,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "long_context_eval"
    for name, content in PACKAGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.setattr(records, "_folder", lambda: folder)
    return folder


def tokens(record: dict[str, Any]) -> int:
    text = " ".join(record[name] for name in ("context", "question", "answer_prefix"))
    return len(TOKENIZER(text, add_special_tokens=False).input_ids) + record["max_new_tokens"]


@pytest.mark.usefixtures("package")
def test_a_sample_is_parted_into_context_question_and_the_beginning_of_its_answer() -> None:
    one, two, *_ = made = make_records(TOKENIZER, length=600, samples=2)
    key = one["context"].rpartition("hay ")[2].partition(":")[0]
    assert one["context"].startswith("An example: A\nx\nWhat is y? y is\nA\nhay hay")
    assert one["question"] == f"What is {key}?" and one["answer_prefix"] == f"{key} is"
    assert [each["id"] for each in made] == ["one-0", "one-1", "qa_1-0", "qa_1-1"]
    assert [each["max_new_tokens"] for each in made] == [9, 9, 5, 5] and one["context"] != two["context"]


@pytest.mark.usefixtures("package")
def test_samples_fill_the_length_and_stay_within_it() -> None:
    for record in make_records(TOKENIZER, length=600, samples=2):
        assert 600 - 130 < tokens(record) <= 600  # a byte a token: a step of either task is below that


@pytest.mark.usefixtures("package")
def test_of_a_question_with_several_answers_one_is_enough_and_of_other_tasks_all_are_wanted() -> None:
    needles, *_, question = make_records(TOKENIZER, length=600, samples=2)
    first, second = needles["answer"].split("<AND>")
    assert question["answer"] == "a<OR>b" and second == f"{first}!"
    score = METRICS["string_match"].score
    assert score is not None
    assert score(f"It is {first}.", "", needles["answer"]) == 0.5 and score("It is B.", "", question["answer"]) == 1


@pytest.mark.usefixtures("package")
def test_the_same_seed_gives_the_same_records_and_they_are_read_as_samples(tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    given = [
        "ruler",
        "--model",
        "shapes",
        "--task",
        "one",
        "--length",
        "600",
        "--samples",
        "2",
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["records"] == 2
    samples, content = load_samples(str(output)), output.read_text()
    assert all(sample.context and sample.answer_prefix and sample.max_new_tokens == 9 for sample in samples)
    assert CliRunner().invoke(app, given).exit_code == 1  # the file is there
    assert CliRunner().invoke(app, [*given, "--overwrite"]).exit_code == 0 and output.read_text() == content
    assert CliRunner().invoke(app, [*given, "--overwrite", "--seed", "1"]).exit_code == 0
    assert output.read_text() != content


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": ["on"]}, "task: unknown task 'on'; did you mean 'one'?"),
        ({"length": 511}, "length: must be at least 512 tokens; got 511"),
        ({"samples": 0}, "samples: must be at least 1; got 0"),
        ({"tasks": ["qa_1"], "length": 600, "samples": 3}, "length: 600 tokens are too few for 3 samples of 'qa_1'"),
        ({"tokenizer": object()}, "tokenizer: must be a fast one of transformers"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_cannot_be_made_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        make_records(**{"tokenizer": TOKENIZER, **given})


def test_a_generator_that_fails_or_lacks_a_package_is_named(package: Path) -> None:
    script = package / "data/synthetic/niah.py"
    script.write_text("import nothing_like_this\n")
    with pytest.raises(
        MissingDependencyError, match=r"'one' needs a package: No module named 'nothing_like_this': pip"
    ):
        make_records(TOKENIZER, ["one"], length=600)
    script.write_text("raise ValueError('no needles')\n")
    with pytest.raises(ConfigError, match=r"task 'one': the generator of .* failed: ValueError: no needles"):
        make_records(TOKENIZER, ["one"], length=600)
    (package / "synthetic.yaml").write_text("one: niah\n")
    with pytest.raises(ConfigError, match=r"is not as expected .*version 26\.3 is"):
        task_names()


def test_without_the_package_the_command_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "long_context_eval", None)
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ruler", "--output", str(tmp_path / "a.jsonl")])
    assert result.exit_code == 1 and "pip install 'kvcompress[ruler]'" in " ".join(result.stderr.split())


def test_marks_go_and_text_stays() -> None:
    text = f"a {CONTEXT_END}b{QUESTION_END} c\n\nd {CONTEXT_END}\ne?{QUESTION_END} f: "
    assert parted(text) == ("a b c\n\nd", "e?", "f:")


@pytest.mark.skipif(not INSTALLED, reason="nvidia-long-context-eval (kvcompress[ruler]) is not installed")
def test_every_generator_of_the_package_gives_a_record_within_the_length() -> None:
    assert len(task_names()) == 13
    tasks = ["niah_single_2", "vt", "cwe", "fwe", "qa_1"]
    made = make_records(TOKENIZER, tasks, length=12288, samples=1)
    assert [record["kind"] for record in made] == tasks
    for record in made:
        assert 4096 < tokens(record) <= 12288
        assert record["context"] and record["question"] and record["answer_prefix"] and record["answer"]


def test_the_table_has_tasks_all_of_them_and_what_a_cache_has_more_on_the_same_samples() -> None:
    """Tasks that the full cache does not do are left out of both; what is beyond the bounds is in bold."""
    score = {"full": {"a": [1.0] * 4, "b": [0.1] * 4}, "half": {"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0] * 4}}
    rows, samples = [], []
    for cell, tasks in score.items():
        about = {"cell": cell, "policy": cell, "budget": 0.5, "model": "m", "dtype": "float32", "question": "unseen"}
        kinds = {}
        for task, values in tasks.items():
            value = {"value": sum(values) / 4, "ci_low": min(values), "ci_high": max(values)}
            kinds[task] = {"samples": 4, "string_match": value}
            samples += [
                {"cell": cell, "sample": f"{task}-{n}", "kind": task, "string_match": one}
                for n, one in enumerate(values)
            ]
        rows.append({**about, "seed": 0, "versions": {}, "samples": 8, "by_kind": kinds})
    lines = table(rows, samples).splitlines()
    assert "| `a` | 4 | 100 (100-100) | 25 (0-100) |" in lines
    assert "| all of these | 4 | 100 (100-100) | 25 (0-75) |" in lines
    assert "| more than the full cache | 4 | - | **-75 (-100..-25)** |" in lines
    assert lines[-1].endswith("b (10).")
