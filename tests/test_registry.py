"""Policies of one's own: by decorator and by entry point, checked, listed, written to files and used."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from kvcompress import ALLOCATORS, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.policies import registry
from kvcompress.policies.base import Allocator
from kvcompress.policies.registry import REGISTRIES
from tests import tiny

USERS_MODULE = '''
import torch
from pydantic import Field
from kvcompress import ALLOCATORS
from kvcompress.policies.base import Allocator

@ALLOCATORS.register("deep_heavy")
class DeepHeavy(Allocator):
    """More slots for later layers."""

    steep: float = Field(default=2.0, gt=0)

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = floor.clone()
        weight = torch.linspace(1, self.steep, len(budget), device=budget.device)[:, None]
        while (left := total - budget.sum(0)).any():
            room = torch.where(budget < capacity, budget / weight, torch.inf)
            budget.scatter_add_(0, room.argmin(0, keepdim=True), (left > 0).long()[None])
        return budget
'''


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_policies.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ALLOCATORS, "_policies", dict(ALLOCATORS._policies))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    sys.modules.pop("my_policies", None)
    return "my_policies"


def test_an_allocator_of_twenty_lines_is_a_policy_like_any_other(users_module: str, tmp_path: Path) -> None:
    assert len(USERS_MODULE.strip().splitlines()) <= 20
    importlib.import_module(users_module)
    assert "deep_heavy" in ALLOCATORS.names()
    config = CompressionConfig.preset("prefixkv", allocator={"name": "deep_heavy", "steep": 3}, budget=0.5)
    with pytest.raises(KVCompressError, match="allocator deep_heavy: steep"):
        CompressionConfig.preset("prefixkv", allocator={"name": "deep_heavy", "steep": -1})
    config.dump(tmp_path / "mine.yaml")
    assert CompressionConfig.load(tmp_path / "mine.yaml") == config
    model = tiny.model("llama")
    cache = CompressedCache(model, tmp_path / "mine.yaml")
    model.generate(**tiny.inputs("llama", 40, seed=1), **tiny.with_cache(cache), max_new_tokens=8)
    first, _, last = (row for (row,) in cache.report().layer_lengths)
    assert first < last
    assert cache.report().retention <= 0.5


def test_an_entry_point_brings_its_policies(users_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("mine", users_module, registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert ALLOCATORS.create("deep_heavy", steep=4.0).steep == 4.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "ModuleNotFoundError"),
        ("import sys; sys.exit(3)", r"SystemExit\(3\)"),
        ("import sys; sys.exit()", "SystemExit"),
        ("raise SystemError", "SystemError"),
        ("def", "SyntaxError"),
    ],
)
def test_a_broken_entry_point_is_reported_and_does_no_harm(
    users_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "broken_policies.py").write_text(content)
    points = [EntryPoint(name, name, registry.ENTRY_POINT_GROUP) for name in ("broken_policies", users_module)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match=rf"entry point 'broken_policies' of kvcompress.policies failed: {says}"):
        assert {"prefix", "deep_heavy"} <= set(ALLOCATORS.names())  # the one after it is there


def test_an_entry_point_that_was_interrupted_is_tried_again(
    users_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("mine", users_module, registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    module = tmp_path / "my_policies.py"
    module.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        ALLOCATORS.names()
    module.write_text(USERS_MODULE)
    importlib.invalidate_caches()
    assert "deep_heavy" in ALLOCATORS.names()


def test_every_spelling_that_an_error_lists_makes_a_policy() -> None:
    for given in REGISTRIES:
        spellings = given.spellings()
        assert len(set(spellings)) == len(spellings) and set(given.names()) <= set(spellings)
        for spelling in set(spellings) - set(given.names()):
            assert spelling == f"{given.create(spelling).name}{given.create(spelling).bits}"
    assert {"quanto2", "quanto4", "quanto8", "rotated2", "rotated4"} <= set(registry.QUANTIZERS.spellings())


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(KVCompressError, match="the name 'prefix' is taken by"):

        @ALLOCATORS.register("prefix")
        class Another(Allocator):
            def allocate(self, importance: Any, total: Any, floor: Any, capacity: Any, context: Any = None) -> Any:
                return floor


def test_a_policy_of_another_stage_is_refused() -> None:
    with pytest.raises(KVCompressError, match="must subclass Scorer"):
        registry.SCORERS.register("mine")(ALLOCATORS.get("prefix"))


@pytest.mark.parametrize("name", ["", "none", "two words"])
def test_a_name_is_one_word(name: str) -> None:
    with pytest.raises(KVCompressError, match="a name is letters, digits"):
        ALLOCATORS.register(name)(ALLOCATORS.get("prefix"))


@pytest.mark.parametrize(("stage", "name"), [(given.stage, name) for given in REGISTRIES for name in given.names()])
def test_every_policy_has_a_summary_a_source_and_a_home(stage: str, name: str) -> None:
    policy = next(given for given in REGISTRIES if given.stage == stage).get(name)
    assert policy.__doc__ and policy.__doc__.splitlines()[0].endswith(".")
    assert "Source:" in policy.__doc__
    lines = Path(sys.modules[policy.__module__].__file__ or "").read_text().splitlines()
    assert len(lines) <= 130, "one method, one file, under about 120 lines"
    for field in policy.model_fields:
        assert f"{field}:" in policy.__doc__, f"{field} is not described"
