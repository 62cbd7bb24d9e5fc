"""Anything at all as input: our errors alone come out, and no file changes.

The suite tries 300 inputs; `KVCOMPRESS_FUZZ=10000 pytest -n 0 --timeout=0 tests/test_fuzz.py` tries so many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress import CompressionConfig, KVCompressError
from kvcompress.cli.configuration import read_config
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError
from kvcompress.evaluation import read_results, read_samples
from kvcompress.evaluation.data import data_hash, load_samples
from kvcompress.evaluation.results import ResultsFile, samples_path
from kvcompress.policies.registry import ALLOCATORS

RUN: dict[str, Any] = {"model": "m", "metrics": ["contained"], "seed": 0}
FIGURES: dict[str, Any] = {
    "retention": 0.5, "kv_bytes": 1, "full_kv_bytes": 2, "seconds_to_first_token": 0.1, "tokens_per_second": None,
    "peak_bytes": None,
}  # fmt: skip
SAMPLE = {"cell": "a", "sample": "s", "kind": "", "prompt_tokens": 3, "contained": 1.0, **FIGURES}
CELL = {
    "cell": "a", "policy": "a", "budget": 0.5, "budget_unit": "fraction", "model": "m", "dtype": "float32", "data": "d",
    "samples": 1, "skipped": 0, "skipped_samples": [], "config": None, **FIGURES,
    "metrics": {"contained": {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}},
}  # fmt: skip
PROFILE = {"budgets": [0.2, 0.5], "retention": [[0.1, 0.3], [0.4, 0.6]], "samples": 2, "data": "d"}
DIALOGUE = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
}
QUESTION = {"question_id": 1, "question": "q", "answer": "a", "image": "a.png", "capability": ["ocr"]}
CONFIG = CompressionConfig.preset("prefixkv", quantizer="quanto4", merger="nearest").model_dump(mode="json")
YAML = "budget: {fraction: 0.2, sink: 4}\nscorer: {name: attention, window: 16}\nevictor:\n  name: topk"

ODD: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "none", "\0", "\u2028", "../x",
    "9" * 50, "/dev/zero", [], {}, [[]], "x" * 500, "prefix", "window:99999999999", "16GiB", "0.2",
]  # fmt: skip
PIECES = [
    "&a ", "*a", "<<: ", "!!python/name:os.system ", "!!binary ", "? ", ": ", "- ", "[", "]", "{", "}", ",", "\n", "\r",
    "\0", "\u2028", "\x85", '"', "'", "\\ud800", "\\", "9" * 500, "1:2:3", "0x", ".inf", ".nan", "2024-13-45", "---\n",
    "%YAML 1.1\n", "\ufeff", "|", ">", "#", "\t", "[" * 200, "{a: " * 200, "- " * 200, "name", "self",
    "path: /dev/zero",
]  # fmt: skip


def values() -> st.SearchStrategy[Any]:
    """JSON of any shape."""
    leaves = st.sampled_from(ODD) | st.text(max_size=8) | st.integers() | st.floats()
    keys = st.text(max_size=6) | st.sampled_from(
        ["name", "self", "path", "budget", "fraction", "tokens", "cell", "image"]
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@st.composite
def altered(draw: st.DrawFn, right: Any) -> Any:
    """What is right, but for one or two places at any depth."""
    content = json.loads(json.dumps(right))
    for _ in range(draw(st.integers(1, 2))):
        place = content
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        if isinstance(place, dict) and draw(st.booleans()):
            key = draw(st.sampled_from(["name", "self", "extra", "path", "run", "skipped", "config", "bytes"]))
        if isinstance(place, (dict, list)) and place:
            place[key] = draw(values())
    return content


@st.composite
def damaged(draw: st.DrawFn, *right: str) -> bytes:
    """A text that was right, torn and with pieces put in; or bytes of any kind."""
    text = draw(st.sampled_from(right))
    for _ in range(draw(st.integers(0, 4))):
        at, upto = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        piece = draw(st.sampled_from(PIECES) | st.text(max_size=5))
        text = text[:at] + piece + draw(st.sampled_from([text[at:], text[upto:], text[at:upto] * 2, ""]))
    content = text.encode("utf-8", "surrogatepass")
    return draw(st.just(content) | st.binary(max_size=60)) if draw(st.booleans()) else content


def json_like(right: Any) -> st.SearchStrategy[bytes]:
    whole = json.dumps(right)
    written = (altered(right) | values()).map(lambda content: json.dumps(content).encode())
    return written | damaged(whole)


def lines_like(*right: Any) -> st.SearchStrategy[bytes]:
    line = st.sampled_from([json.dumps(one).encode() for one in right]) | st.one_of(*map(json_like, right))
    return st.tuples(st.lists(line, max_size=4), st.sampled_from([b"", b"\n"])).map(lambda t: b"\n".join(t[0]) + t[1])


def resume(path: Path) -> None:
    """Goes on from results; what is refused stays as it was."""
    ResultsFile(path, RUN)


KINDS: dict[str, tuple[str, st.SearchStrategy[bytes], list[Callable[[Path], Any]]]] = {
    "yaml": (".yaml", damaged(YAML), [CompressionConfig.load, CompressionConfig.read]),
    "json": (".json", json_like(CONFIG), [CompressionConfig.load]),
    "profile": (
        ".json",
        json_like(PROFILE) | json_like([0.5, 0.2]),
        [LayerProfile.load, lambda path: ALLOCATORS.create("profile", path=path)],
    ),
    "data": (
        ".json",
        json_like([DIALOGUE, DIALOGUE]) | json_like([QUESTION]) | json_like({"v1": QUESTION}),
        [lambda path: data_hash(load_samples(str(path)))],
    ),
    "lines": (".jsonl", lines_like(QUESTION), [lambda path: data_hash(load_samples(str(path)))]),
    "results": (".jsonl", lines_like(CELL), [read_results]),
    "samples": (".samples.jsonl", lines_like({"run": RUN}, SAMPLE, SAMPLE), [lambda path: read_samples(named(path))]),
}
INPUTS = int(os.environ.get("KVCOMPRESS_FUZZ", "300"))
EACH = settings(max_examples=INPUTS // (len(KINDS) + 3))


def named(samples: Path) -> Path:
    return samples.with_name(samples.name.replace(".samples", ""))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_content_is_read_or_refused_and_stays_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    suffix, strategy, readers = KINDS[kind]
    folder = tmp_path_factory.mktemp(kind)

    @EACH
    @given(content=strategy)
    def holds(content: bytes) -> None:
        path = folder / f"any{suffix}"
        path.write_bytes(content)
        for read in readers:
            try:
                read(path)
            except KVCompressError as error:
                assert len(str(error)) < 5000
                str(error).encode()
        assert contents(folder) == {path.name: content}

    holds()


@EACH
@given(cells=lines_like(CELL), samples=lines_like({"run": RUN}, SAMPLE, SAMPLE), which=st.integers(0, 5))
def test_results_of_any_content_are_gone_on_from_or_refused_and_stay_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, cells: bytes, samples: bytes, which: int
) -> None:
    folder = tmp_path_factory.mktemp("results")
    path, right = folder / "grid.jsonl", json.dumps({"run": RUN}).encode() + b"\n"
    given = {path.name: cells if which else b"", samples_path(path).name: right + samples if which % 2 else samples}
    for name, content in given.items():
        (folder / name).write_bytes(content)
    try:
        ResultsFile(path, RUN)
    except ConfigError:
        assert contents(folder) == given
        return
    for name, content in given.items():  # only a torn last line may be gone, and the run may be new
        whole = content[: content.rfind(b"\n") + 1]
        assert (folder / name).read_bytes() in (whole, whole + right)


@EACH
@given(setting=st.data())
def test_any_setting_is_taken_or_refused(setting: st.DataObject) -> None:
    fields = [
        "budget",
        "budget.fraction",
        "scorer",
        "scorer.window",
        "allocator.path",
        "evictor.decode",
        "merger",
        "x",
        ".",
    ]
    name = setting.draw(st.sampled_from(fields) | st.text(max_size=10))
    value = setting.draw(values().map(json.dumps) | st.sampled_from(PIECES) | st.text(max_size=20))
    preset = setting.draw(st.sampled_from(["prefixkv", "streaming", "text"]))
    try:
        read_config(
            preset, None, None, [f"{name}={value}", *setting.draw(st.lists(st.just("scorer=attention"), max_size=1))]
        )
    except (KVCompressError, typer.BadParameter) as error:
        assert len(str(error)) < 5000


@EACH
@given(data=st.data())
def test_any_dict_is_a_configuration_or_refused(data: st.DataObject) -> None:
    fields = data.draw(altered(CONFIG) | st.dictionaries(st.sampled_from(list(CONFIG)), values()))
    try:
        CompressionConfig.read(fields)
    except KVCompressError as error:
        assert len(str(error)) < 5000
