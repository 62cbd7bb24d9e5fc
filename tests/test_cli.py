"""The command line: what it prints, what it refuses, and how it exits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image
from transformers import DynamicCache
from typer.main import get_command as click_of
from typer.testing import CliRunner, Result

import kvcompress
from kvcompress.cli import app
from kvcompress.cli import generate as generate_command
from kvcompress.config.presets import PRESETS
from kvcompress.evaluation import LoadedModel
from kvcompress.policies.registry import ALLOCATORS, REGISTRIES
from tests import checkpoints, tiny

PROMPT = "the quick brown fox jumps over the lazy dog"


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
    """What `generate --json` writes to stdout, which must be JSON and nothing else."""
    result = run("generate", *arguments, "--json", "--max-new-tokens", 12, stdin=stdin)
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def no_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("no_chat"), chat_template=None)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_image(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = torch.randint(256, (12, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.frombytes("RGB", (9, 12), bytes(pixels.flatten().tolist())).save(path)
    return path


# -- generate ----------------------------------------------------------------------------------------------------------


def test_json_tells_the_answer_the_memory_and_the_time(text: Path) -> None:
    told = answer("--model", text, "--prompt", PROMPT, "--no-chat", "--preset", "prefixkv", "--budget", "0.5")
    seen = len(PROMPT) + 12 - 1  # the last token is never read
    assert told["prompt_tokens"] == len(PROMPT) and told["new_tokens"] == 12 and told["tokens_seen"] == seen
    assert len(told["kept_per_layer"]) == 3
    assert told["retention"] == pytest.approx(sum(told["kept_per_layer"]) / (3 * seen)) and told["retention"] <= 0.5
    assert told["full_kv_bytes"] == seen * 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, float32
    assert 0 < told["kv_bytes"] < told["full_kv_bytes"] and told["index_bytes"] > 0
    assert told["seconds_to_first_token"] > 0 and told["tokens_per_second"] > 0
    assert 0 < told["threshold"] < 1
    assert told["config"]["budget"]["fraction"] == 0.5 and told["config"]["allocator"]["name"] == "prefix"
    assert told["dtype"] == "float32" and told["model"] == str(text)


def test_the_page_tells_every_key_of_json(text: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    table = page.split("| key | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    told = [key for row in table.splitlines() for key in re.findall("`(\\w+)`", row.split("|")[1])]
    assert sorted(told) == sorted(answer("--model", text, "--prompt", PROMPT, "--compare"))


def test_without_json_the_answer_comes_first_and_a_table_after(text: Path) -> None:
    words = ("--model", text, "--prompt", PROMPT, "--preset", "prefixkv")
    told = answer(*words)
    result = run("generate", *words, "--max-new-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout.startswith(told["text"])
    for label in ("tokens seen", "kept per layer", "retention", "key/value cache", "time to first token", "tokens/s"):
        assert label in result.stdout.removeprefix(told["text"])
    assert "threshold p" in result.stdout
    streaming = run("generate", "--model", text, "--prompt", PROMPT, "--max-new-tokens", 2, "--preset", "streaming")
    assert "threshold p" not in streaming.stdout


def test_compare_at_full_budget_finds_the_same_answer(text: Path) -> None:
    told = answer("--model", text, "--prompt", PROMPT, "--budget", "1.0", "--compare")
    assert told["same_answer"] is True and told["same_tokens"] == 12
    assert told["full_cache"]["text"] == told["text"]
    assert told["full_cache"]["kv_bytes"] == told["full_cache"]["full_kv_bytes"]


def test_compare_shows_both_answers_and_where_they_part(text: Path) -> None:
    budget = ("--model", text, "--prompt", PROMPT * 3, "--budget", "0.05")
    told = answer(*budget, "--compare")
    assert told["same_answer"] is False and 0 <= told["same_tokens"] < 12
    result = run("generate", *budget, "--compare", "--max-new-tokens", 12)
    assert "auto" in result.stdout and "full cache" in result.stdout and "auto chose text: the" in result.stdout
    assert f"agree in their first {told['same_tokens']} of 12 tokens" in result.stdout


@pytest.mark.parametrize(
    ("budget", "field", "value"), [("0.25", "fraction", 0.25), ("20", "tokens", 20), ("8KiB", "bytes", 8192)]
)
def test_a_bare_budget_is_a_fraction_tokens_or_bytes(text: Path, budget: str, field: str, value: float) -> None:
    told = answer("--model", text, "--prompt", PROMPT, "--preset", "streaming", "--budget", budget)
    given = told["config"]["budget"]
    assert given.pop(field) == value
    assert given == {"sink": 4, "recent": 1, "whole": 0} | dict.fromkeys({"fraction", "tokens", "bytes"} - {field})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["scorer.window=8"], {"scorer.queries": "window:8"}),
        (["allocator=uniform"], {"allocator.name": "uniform"}),
        (["evictor=streaming", "scorer=none", "allocator=uniform"], {"evictor.name": "streaming", "scorer": None}),
        (["evictor.decode=oldest", "evictor.granularity=head"], {"evictor.decode": "oldest"}),
        (["budget.sink=3"], {"budget.sink": 3, "budget.fraction": 0.2}),
        (["budget.tokens=30"], {"budget.tokens": 30, "budget.fraction": None, "budget.recent": 1}),
        (["budget.sink=2", "budget=0.4"], {"budget.fraction": 0.4, "budget.sink": 2}),
        (["scorer={name: attention, reduce: mean}"], {"scorer.reduce": "mean"}),
        (["scorer=attention", "scorer.reduce=mean"], {"scorer.reduce": "mean"}),
    ],
)
def test_set_reaches_any_field(text: Path, settings: list[str], expected: dict[str, Any]) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    config = answer("--model", text, "--prompt", PROMPT, "--preset", "prefixkv", *flags)["config"]
    for path, value in expected.items():
        found: Any = config
        for part in path.split("."):
            found = found[part]
        assert found == value, path


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_config_reads_a_file_that_options_may_override(text: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    kvcompress.CompressionConfig.preset("uniform", budget=0.7).dump(path)
    told = answer("--model", text, "--prompt", PROMPT, "--config", path, "--set", "evictor.decode=oldest")
    assert told["config"]["budget"]["fraction"] == 0.7
    assert (told["config"]["allocator"]["name"], told["config"]["evictor"]["decode"]) == ("uniform", "oldest")
    assert (
        answer("--model", text, "--prompt", PROMPT, "--config", path, "--budget", 9)["config"]["budget"]["tokens"] == 9
    )


def test_the_prompt_may_come_from_a_file_or_stdin_with_a_question_after_it(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    path.write_text(f"{PROMPT} é\n", encoding="utf-8")
    model = ("--model", text, "--no-chat")
    whole = answer(*model, "--prompt", f"{PROMPT} é\n\nwhy?")
    for told in (
        answer(*model, "--prompt-file", path, "--prompt", "why?"),
        answer(*model, "--prompt-file", "-", "--prompt", "why?", stdin=f"{PROMPT} é\n"),
    ):
        assert (told["text"], told["prompt_tokens"]) == (whole["text"], whole["prompt_tokens"])
    assert answer(*model, "--prompt-file", path)["prompt_tokens"] == len(f"{PROMPT} é\n".encode())


def test_the_chat_template_is_used_where_there_is_one(text: Path, no_chat: Path) -> None:
    around = len("U:\nA:")
    assert answer("--model", text, "--prompt", PROMPT)["prompt_tokens"] == len(PROMPT) + around
    assert answer("--model", text, "--prompt", PROMPT, "--chat")["prompt_tokens"] == len(PROMPT) + around
    assert answer("--model", text, "--prompt", PROMPT, "--no-chat")["prompt_tokens"] == len(PROMPT)
    assert answer("--model", no_chat, "--prompt", PROMPT)["prompt_tokens"] == len(PROMPT)


def test_draws_follow_the_seed_and_leave_the_random_state_alone(text: Path) -> None:
    def draw(seed: int) -> str:
        return str(answer("--model", text, "--prompt", PROMPT, "--temperature", 2.0, "--seed", seed)["text"])

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chat", ["--chat", "--no-chat"])
def test_an_image_takes_its_place_in_the_prompt(llava: Path, picture: Path, chat: str) -> None:
    words = ("--model", llava, "--prompt", PROMPT, chat)
    blind, seeing = answer(*words), answer(*words, "--image", picture)
    separator = 0 if chat == "--chat" else 1  # without a template the image stands on a line of its own
    assert seeing["prompt_tokens"] == blind["prompt_tokens"] + 4 + separator
    again = answer(*words, "--image", picture, "--budget", "1.0", "--compare")
    assert again["same_answer"] is True


def test_a_prompt_longer_than_the_model_was_trained_for_is_warned_about(text: Path) -> None:
    result = run("generate", "--model", text, "--prompt", "x" * 512, "--max-new-tokens", 2, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["prompt_tokens"] > 512
    assert result.stderr.startswith("warning: ") and "512" in result.stderr


def test_a_budget_below_what_is_protected_is_warned_about_in_one_line(text: Path) -> None:
    arguments = ("--model", text, "--prompt", PROMPT, "--budget", 2, "--set", "budget.sink=9", "--json")
    result = run("generate", *arguments, "--max-new-tokens", 2)
    assert result.exit_code == 0 and result.stderr.startswith("warning: the budget of 6 tokens")
    assert result.stderr.count("\n") == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["--preset", "prefixvk"], "UnknownPolicyError", "did you mean 'prefixkv'"),
        (["--preset", "SnapKV"], "UnknownPolicyError", "did you mean 'snapkv'"),
        (["--budget", "1.5"], "BudgetError", "a fraction lies in"),
        (["--budget", "0"], "BudgetError", "at least 1"),
        (["--budget", "20 per cent"], "BudgetError", "in percent (20%)"),
        (["--set", "scorre.window=3"], "ConfigError", "scorre: unknown field of CompressionConfig"),
        (["--preset", "prefixkv", "--set", "scorer.windo=3"], "ConfigError", "windo: unknown field of Attention"),
        (["--set", "scorer.window=3"], "ConfigError", "auto chooses the scorer once it sees the prompt; set one first"),
        (["--set", "scorer.window.deep=3"], "ConfigError", "window"),
        (["--set", "scorer=atention"], "UnknownPolicyError", "did you mean 'attention'"),
        (["--set", "evictor.distance=zero"], "ConfigError", "distance"),
        (
            ["--preset", "uniform", "--set", "quantizer.bits=2"],
            "ConfigError",
            "quantizer is none; choose a policy first",
        ),
        (["--set", "evictor=none"], "ConfigError", "nothing could be evicted"),
        (["--config", "missing.yaml"], "ConfigError", "missing.yaml: cannot be read"),
        (["--config", "missing.toml"], "ConfigError", "must end in one of"),
        (["--model", "./missing"], "UnsupportedModelError", "is no folder"),
        (["--model", "smolm2"], "UnsupportedModelError", "did you mean 'smollm2'?"),
        (["--model", "Shape"], "UnsupportedModelError", "did you mean 'shapes'?"),
        (["--model", "vicuna"], "UnsupportedModelError", "built in are smollm2, shapes, pages"),
        (["--device", "gpu"], "ConfigError", "device: 'gpu' is none that torch knows; name cpu, cuda, cuda:1, mps and"),
        (["--import", "no_such_module"], "ConfigError", "import 'no_such_module': cannot be imported: ModuleNotFound"),
        (["--import", "no_such_file.py"], "ConfigError", f"{Path('no_such_file.py').resolve()} does not exist"),
        (["--prompt", "  "], "ConfigError", "prompt: is empty"),
    ],
)
def test_an_error_is_one_line_on_stderr_or_json_on_stdout(
    text: Path, arguments: list[str], kind: str, says: str
) -> None:
    defaults = [] if "--model" in arguments else ["--model", str(text)]
    defaults += [] if "--prompt" in arguments else ["--prompt", PROMPT]
    plain = run("generate", *defaults, *arguments)
    assert plain.exit_code == 1 and plain.stdout == ""
    assert plain.stderr.startswith("error: ") and plain.stderr.count("\n") == 1 and says in plain.stderr
    in_json = run("generate", *defaults, *arguments, "--json")
    assert in_json.exit_code == 1 and in_json.stderr == ""
    error = json.loads(in_json.stdout)["error"]
    assert error["type"] == kind and says in error["message"]


def test_an_image_for_a_text_model_is_refused(text: Path, picture: Path) -> None:
    result = run("generate", "--model", text, "--prompt", PROMPT, "--image", picture)
    assert result.exit_code == 1 and "is a text model (llama); an image needs a LLaVA model" in result.stderr


def test_a_chat_template_that_is_not_there_is_refused(no_chat: Path) -> None:
    result = run("generate", "--model", no_chat, "--prompt", PROMPT, "--chat")
    assert result.exit_code == 1 and "has no chat template" in result.stderr


def test_debug_shows_the_traceback(text: Path) -> None:
    result = run("generate", "--model", text, "--prompt", PROMPT, "--budget", "7.5", "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "error: budget" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "--prompt-file", "missing.txt"],
        ["generate", "--prompt", "x", "--set", "scorer"],
        ["generate", "--prompt", "x", "--set", "scorer={"],
        ["generate", "--prompt", "x", "--preset", "full", "--config", "x.yaml"],
        ["generate", "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "--prompt", "x", "--temperature", "-1"],
        ["generate", "--prompt", "x", "--dtype", "int8"],
        ["generate", "--prompt", "x", "--image", "missing.png"],
        ["generate", "--prompt", "x", "--image", __file__],
        ["policies", "engine"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    in_json = run(*arguments, "--json")
    assert in_json.exit_code == 2 and in_json.stderr == ""
    error = json.loads(in_json.stdout)["error"]
    assert error["type"] == "UsageError" and f"error: {error['message']}\n" == result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["generate", "--promt", "x"],
            "no such option: --promt; did you mean '--prompt'? 'kvcompress generate --help'",
        ),
        (["generate", "--prompt", "x", "--image", "missing.png"], "--image: file 'missing.png' does not exist\n"),
        (["generate", "--prompt-file", "missing.txt"], "--prompt-file: prompt missing.txt: cannot be read"),
        (["compress", "-o", "x"], "missing argument 'FILE...'; 'kvcompress compress --help' shows what there is\n"),
        (["generate"], "error: give --prompt, --prompt-file or both\n"),
        (
            ["generate", "--prompt", "x", "--dtype", "float15"],
            "error: --dtype: 'float15' is not one of 'auto', 'float32",
        ),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "error: --max-new-tokens: must be at least 1\n"),
        (["generate", "--prompt", "x", "--max-new-tokens", "few"], "--max-new-tokens: must be a whole number\n"),
        (["demo", "--image", "--text"], "error: give --image or --text, not both\n"),
        (["genrate", "--prompt", "x"], "no such command 'genrate'; did you mean 'generate'? 'kvcompress --help'"),
        (["policies", "allocatr"], "quantizer, reducer, presets; did you mean 'allocator'?\n"),
        (["policies", "presetss"], "did you mean 'presets'?\n"),
        (["policies", "prefixkv"], "it is the name of a preset, which 'kvcompress policies presets' shows\n"),
        (["policies", "topk"], "it is the name of an evictor, which 'kvcompress policies evictor' shows\n"),
        (
            ["policies", "snapkv"],
            "of a scorer and a preset, which 'kvcompress policies scorer' and 'kvcompress policies",
        ),
    ],
)
def test_a_line_about_wrong_usage_says_what_is_wrong_and_what_there_is(arguments: list[str], says: str) -> None:
    assert says in run(*arguments).stderr


@pytest.mark.parametrize(
    ("row", "of_the_page", "arguments"),
    [
        (1, "no such configuration", ["generate", "--prompt", "x", "--preset", "prefixvk"]),
        (1, "no such model", ["generate", "--prompt", "x", "--model", "./missing"]),
        (1, "no such device", ["generate", "--prompt", "x", "--device", "nonsense"]),
        (1, "`--config`", ["generate", "--prompt", "x", "--config", "missing.yaml"]),
        (1, "`--data`", ["evaluate", "--data", "missing.jsonl"]),
        (1, "the folder", ["caption", "missing", "-o", "captions.jsonl"]),
        (1, "the folder", ["ask", "missing", "why?"]),
        (1, "an empty prompt", ["generate", "--prompt", " "]),
        (1, "`--output`", ["ruler", "--output", "records.txt"]),
        (2, "unknown command or option", ["generate", "--promt", "x"]),
        (2, "a missing argument", ["ask", "missing"]),
        (2, "no prompt", ["generate"]),
        (2, "a value that an option does not take", ["generate", "--prompt", "x", "--max-new-tokens", "0"]),
        (2, "`--prompt-file`", ["generate", "--prompt-file", "missing.txt"]),
        (2, "`--image`", ["generate", "--prompt", "x", "--image", "missing.png"]),
        (2, "a `FILE`", ["compress", "missing.txt", "-o", "x"]),
        (2, "a `FILE`", ["demo", "missing.png"]),
    ],
)
def test_the_exit_code_is_that_of_the_page(
    row: int, of_the_page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    (meaning,) = re.findall(rf"^\| {row} \| (.*) \|$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert of_the_page in meaning and run(*arguments).exit_code == row


def test_ctrl_c_exits_with_130(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> LoadedModel:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "load_model", interrupt)
    assert run("generate", "--model", text, "--prompt", PROMPT).exit_code == 130


# -- policies ----------------------------------------------------------------------------------------------------------


def test_policies_lists_every_policy_with_parameters_and_paper() -> None:
    result = run("policies", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert list(told) == [*(registry.stage for registry in REGISTRIES), "presets"]
    for registry in REGISTRIES:
        assert [entry["name"] for entry in told[registry.stage]] == registry.names()
        for entry in told[registry.stage]:
            assert entry["summary"].endswith(".") and entry["source"], entry["name"]
            fields = registry.get(entry["name"]).model_fields
            assert [p["name"] for p in entry["parameters"] if p["type"] is not None] == list(fields)
            assert all(parameter["meaning"] for parameter in entry["parameters"]), entry["name"]
            texts = [entry["summary"], entry["source"], *(parameter["meaning"] for parameter in entry["parameters"])]
            assert all(text.endswith((".", "?")) and not re.search("(as|m) above", text) for text in texts), texts
            assert "Deviates" not in entry["source"] and "Args:" not in entry["source"]
    assert {entry["name"]: entry["fields"] for entry in told["presets"]} == {
        name: fields for name, (_, fields) in PRESETS.items()
    }


def test_a_parameter_comes_with_type_default_and_meaning() -> None:
    (topk,) = [e for e in json.loads(run("policies", "evictor", "--json").stdout)["evictor"] if e["name"] == "topk"]
    distance = next(parameter for parameter in topk["parameters"] if parameter["name"] == "distance")
    assert distance["type"] == "int | none >= 1" and distance["default"] is None and not distance["required"]
    assert "fixed point" in distance["meaning"]
    (lookm,) = [e for e in json.loads(run("policies", "merger", "--json").stdout)["merger"] if e["name"] == "lookm"]
    assert [p["type"] for p in lookm["parameters"]] == ["average | pivotal | weighted | mass", "bool"]


def test_policies_are_listed_by_name_and_what_they_do() -> None:
    short, whole = run("policies"), run("policies", "--all")
    for registry in REGISTRIES:
        assert all(name in short.stdout for name in registry.names())
    assert all(name in short.stdout for name in PRESETS)
    assert "Source:" not in short.stdout and "--all" in short.stdout
    assert "Source:" in whole.stdout and len(whole.stdout) > 3 * len(short.stdout)


def test_presets_are_a_section_in_the_singular_too() -> None:
    assert run("policies", "preset", "--json").stdout == run("policies", "presets", "--json").stdout


def test_a_source_is_told_with_its_formulas() -> None:
    (lookm,) = [e for e in json.loads(run("policies", "merger", "--json").stdout)["merger"] if e["name"] == "lookm"]
    first, *rules = lookm["source"].split("\n")
    assert first.startswith("LOOK-M (arXiv 2406.18139") and first.endswith("becomes")
    assert rules[0] == '- "average": (k + e_1 + .. + e_n) / (n + 1);' and rules[-1].endswith("Needs a scorer of mass.")
    assert len(rules) == 4 and '- "average": (k + e_1' in run("policies", "merger").stdout


@pytest.mark.parametrize("stage", ["allocator", "allocators"])
def test_policies_of_one_stage_for_people(stage: str) -> None:
    result = run("policies", stage)
    assert result.exit_code == 0 and "prefix" in result.stdout and "2412.03409" in result.stdout
    assert "topk" not in result.stdout and "presets" not in result.stdout


MINE = '''
import torch
from kvcompress import ALLOCATORS
from kvcompress.policies.base import Allocator

@ALLOCATORS.register("last-first")
class LastFirst(Allocator):
    """Fills the last layers first.

    Source: a test.

    Args:
        layers: number of layers to fill
            first.
    """

    reads_importance = False
    layers: int

    def allocate(self, importance, total, floor, capacity, context=None):
        budget, rest = floor.clone(), total - floor.sum(0)
        for layer in reversed(range(len(budget))):
            more = torch.minimum(rest, capacity[layer] - floor[layer])
            budget[layer] += more
            rest = rest - more
        return budget
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's module in the current folder."""
    path = tmp_path / "mine_of_the_test.py"
    path.write_text(MINE)
    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("spelled", ["mine_of_the_test", "mine_of_the_test.py", "./mine_of_the_test.py"])
def test_a_users_policy_is_listed_and_used(text: Path, mine: Path, spelled: str) -> None:
    path = list(sys.path)
    told = json.loads(run("policies", "allocator", "--import", spelled, "--json").stdout)["allocator"]
    (entry,) = [entry for entry in told if entry["name"] == "last-first"]
    assert entry["summary"] == "Fills the last layers first." and entry["source"] == "a test."
    (parameter,) = entry["parameters"]
    assert parameter["required"] and parameter["meaning"] == "number of layers to fill first."
    assert "(required)" in run("policies", "allocator", "--import", spelled).stdout

    config = mine.with_suffix(".yaml")
    allocator = {"name": "last-first", "layers": 1}
    config.write_text(yaml.safe_dump({"budget": 0.5, "scorer": "attention", "allocator": allocator}))
    used = answer("--import", spelled, "--model", text, "--prompt", PROMPT, "--config", config)
    assert used["kept_per_layer"][0] < used["kept_per_layer"][-1]
    assert sys.path == path


def test_a_users_module_that_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken_of_the_test.py"
    path.write_text("raise RuntimeError('half\\nway')")
    result = run("policies", "--import", path)
    assert result.exit_code == 1 and "RuntimeError: half way" in result.stderr and result.stderr.count("\n") == 1
    assert path.stem not in sys.modules
    path.write_text("import sys; sys.exit('enough')")
    result = run("policies", "--import", path)
    assert result.exit_code == 1 and "cannot be imported: SystemExit: enough" in result.stderr
    path = tmp_path / "folder.py"
    path.mkdir()
    result = run("policies", "--import", path)
    assert result.exit_code == 1 and "folder.py': is no Python file" in result.stderr
    path = tmp_path / "json.py"
    path.write_text("")
    result = run("policies", "--import", path)
    assert result.exit_code == 1 and "rename the file" in result.stderr


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["generate"], ["evaluate"], ["policies"], ["demo"]])
def test_help_shows_examples(arguments: list[str]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    assert f"kvcompress {arguments[0] if arguments else 'demo'}" in result.stdout


def test_the_list_of_commands_says_what_each_says_of_itself_and_imports_no_torch() -> None:
    code = "import sys; from kvcompress.cli import main; sys.argv[1:] = ['--help']; main()"
    done = subprocess.run(
        [sys.executable, "-c", f"import atexit; atexit.register(lambda: print('torch' in sys.modules)); {code}"],
        capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.stdout.rstrip().endswith("False")
    shown = " ".join(done.stdout.replace("│", " ").split())
    commands = click_of(app)
    for name in commands.list_commands(None):
        summary = commands.resolve_command(typer.Context(commands), [name])[1].callback.__doc__.split("\n")[0]
        assert f"{name} {summary}" in shown


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"kvcompress {kvcompress.__version__}\n"


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == f"kvcompress {kvcompress.__version__}\n"


def test_smollm2_answers_like_transformers_own_cache_at_full_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[LoadedModel] = []
    load = generate_command.load_model

    def load_once(*args: Any, **kwargs: Any) -> LoadedModel:
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(generate_command, "load_model", load_once)
    question = "Write a short story about a lighthouse."
    result = run(
        "generate", "--prompt", question, "--budget", "1.0", "--dtype", "float32", "--max-new-tokens", 64, "--json"
    )  # fmt: skip
    told = json.loads(result.stdout)
    model, tokenizer = loaded[0].model, loaded[0].tokenizer
    kvcompress.restore(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **tiny.with_cache(DynamicCache()), max_new_tokens=64, do_sample=False
    )
    assert told["new_tokens"] == 64 and told["retention"] == 1.0
    assert told["text"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
