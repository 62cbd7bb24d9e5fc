"""Configurations: what is accepted, what is refused with which words, and files as exact inverses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import SCORERS, Budget, CompressedCache, CompressionConfig, KVCompressError
from kvcompress.config.presets import PRESETS
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import BudgetWarning, ConfigError
from kvcompress.policies.allocators import Duo, Uniform
from kvcompress.policies.base import Scorer
from kvcompress.policies.configured import Configured
from kvcompress.policies.context import Importance, LayerContext
from kvcompress.policies.fingerprint import Fingerprint
from kvcompress.policies.registry import REGISTRIES
from kvcompress.policies.scorers import Attention, SnapKV
from tests import strategies, tiny, type_checker

every_config = [entry.values[0] for entry in strategies.configs()]


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    protected = {"sink": draw(st.integers(0, 8)), "recent": draw(st.integers(0, 20))}
    kind = draw(st.sampled_from(["fraction", "tokens", "bytes"]))
    if kind == "fraction":
        return Budget(fraction=draw(st.floats(0, 1, exclude_min=True)), **protected)
    return Budget(**{kind: draw(st.integers(1, 10**12 if kind == "bytes" else 2**31 - 1))}, **protected)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@given(data=st.data())
def test_load_is_the_inverse_of_dump(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    config = data.draw(st.sampled_from(every_config))
    if config.evictor is not None:
        config = config.override(budget=data.draw(budgets()))
    path = tmp_path_factory.mktemp("configs") / f"config{suffix}"
    config.dump(path)
    assert CompressionConfig.load(path) == config
    assert CompressionConfig.model_validate_json(config.model_dump_json()) == config
    assert CompressionConfig(**config.model_dump()) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_configuration_like_any_other(preset: str, tmp_path: Path) -> None:
    config = CompressionConfig.preset(preset)
    config.dump(tmp_path / "preset.yaml")
    assert CompressionConfig.read(tmp_path / "preset.yaml") == CompressionConfig.read(preset) == config
    assert CompressionConfig.read(config.model_dump()) == CompressionConfig.read(config) == config


def test_a_policy_is_a_name_a_dict_or_an_object() -> None:
    spelled = [
        CompressionConfig(scorer="attention", allocator="uniform"),
        CompressionConfig(scorer={"name": "attention"}, allocator={"name": "uniform"}),
        CompressionConfig(scorer=Attention(), allocator=Uniform()),
    ]
    assert spelled[0] == spelled[1] == spelled[2]
    assert CompressionConfig(scorer="attention", merger="none").merger is None


def test_a_bare_budget_is_a_fraction_tokens_or_bytes_and_keeps_what_is_protected() -> None:
    config = CompressionConfig.preset("streaming")
    assert config.override(budget=0.3).budget == Budget(fraction=0.3, sink=4)
    assert config.override(budget=7).budget == Budget(tokens=7, sink=4)
    assert config.override(budget="64MiB").budget == Budget(bytes=64 * 2**20, sink=4)
    assert config.override(budget="30%").budget == config.override(budget=" 30.0 % ").budget
    assert config.override(budget="30%").budget == Budget(fraction=0.3, sink=4)
    assert config.override(budget={"tokens": 7}).budget == Budget(tokens=7, sink=1)
    assert CompressionConfig(scorer="attention", budget=1).budget == Budget(tokens=1)
    assert CompressionConfig(scorer="attention", budget=1.0).budget.keeps_everything


def test_a_bare_one_warns_that_it_is_one_token() -> None:
    with pytest.warns(BudgetWarning, match=r"1 means one token per layer.* everything is 1\.0") as told:
        CompressionConfig.preset("h2o", budget=1)
        CompressionConfig.preset("streaming").override(budget=1)
        CompressionConfig(scorer="attention", budget=1)
    assert len(told) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CompressionConfig.preset("streaming", budget=Budget(tokens=1))
        CompressionConfig.preset("full", budget=1.0)


def test_window_is_short_for_the_last_queries() -> None:
    assert Attention(window=16) == Attention(queries="window:16")
    assert Attention(queries="window") == Attention(queries="window:32")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"allocator": "prefx"}, "allocator: unknown policy 'prefx'; did you mean 'prefix'?"),
    ({"scorer": {"name": "snapkv", "window": "abc"}}, "window: must be a whole number; got 'abc'"),
    ({"scorer": {"name": "snapkv", "window": 1.5}}, "window: must be a whole number; got 1.5"),
    ({"scorer": {"name": "snapkv", "window": 0}}, "window: must be at least 1; got 0"),
    ({"scorer": {"name": "attention", "text_weight": "x"}}, "text_weight: must be a number; got 'x'"),
    ({"scorer": {"name": "attention", "reduce": "x"}}, "reduce: must be 'sum' or 'mean'; got 'x'"),
    ({"merger": {"name": "lookm", "within_modality": "maybe"}}, "within_modality: must be true or false; got 'maybe'"),
    ({"reducer": {"name": "lightkv", "after": 3}}, "after: must be a list; got 3"),
    ({"allocator": "duo"}, "allocator duo: gates: is needed, and was not given"),
    ({"foo": 1, "bar": 2}, "foo: unknown field of CompressionConfig; bar: unknown field of CompressionConfig; its"),
    ({"scorer": "SnapKV"}, "scorer: unknown policy 'SnapKV'; did you mean 'snapkv'?"),
    ({"budget": 0}, "tokens per layer must be at least 1; got 0"),
    ({"budget": 1.5}, "a fraction lies in (0, 1]; got 1.5"),
    ({"budget": -3}, "tokens per layer must be at least 1; got -3"),
    ({"budget": float("nan")}, "a fraction lies in (0, 1]; got nan"),
    ({"budget": True}, "budget: must be a number"),
    ({"budget": "many"}, "text must be bytes with a unit, such as '64MiB', or a share, such as '20%'; got 'many'"),
    ({"budget": "0%"}, "a fraction lies in (0, 1]; got 0.0"),
    ({"budget": "120%"}, "a fraction lies in (0, 1]; got 1.2"),
    ({"budget": "20 per cent"}, "or a share, such as '20%'; got '20 per cent'"),
    ({"budget": "0.2"}, "A fraction is a float (0.2)"),
    ({"budget": None}, "budget: must be a float (fraction)"),
    ({"budget": {"fraction": 0.2, "tokens": 5}}, "give exactly one of fraction, tokens and bytes"),
    ({"budget": {"sink": 2}}, "give exactly one of fraction, tokens and bytes; got none"),
    ({"budget": {"fraction": 0.2, "sink": -1}}, "sink"),
    ({"scorer": {"name": "attention", "windw": 3}}, "windw: unknown field of Attention"),
    ({"scorer": {"name": "attention", "queries": "some"}}, "queries"),
    ({"scorer": {"name": "attention", "queries": "stride:4", "window": 3}}, "contradict each other"),
    ({"scorer": {"windw": 3}}, "scorer: a dict needs the key 'name'"),
    ({"scorer": 3}, "scorer: must be a name, a dict with 'name' or a Scorer; got 3"),
    ({"scorer": Uniform()}, "scorer: must be a name"),
    (
        {"scoorer": "attention"},
        "scoorer: unknown field of CompressionConfig; did you mean 'scorer'? its fields: budget,",
    ),
    ({"colour": "red"}, "colour: unknown field of CompressionConfig; its fields: budget, scorer, allocator,"),
    (
        {"preset": "h2o"},
        "preset: unknown field of CompressionConfig; a preset is the second argument, CompressedCache(",
    ),
    ({"preset": "h2o"}, "or CompressionConfig.preset('prefixkv'); its fields: budget,"),
    ({"config": "h2o"}, "config: unknown field of CompressionConfig; a configuration is the second argument"),
    ({"policy": "h2o"}, "policy: unknown field of CompressionConfig; a policy goes by its stage, as in allocator="),
    ({"scorer": {"name": "attention", "querys": "all"}}, "unknown field of Attention; did you mean 'queries'? its"),
    ({"scorer": "none"}, "evictor topk: reads importance, but scorer is none"),
    ({"scorer": "none", "evictor": "streaming"}, "allocator prefix: reads importance, but scorer is none"),
    (
        {"scorer": "none", "allocator": "uniform", "evictor": "streaming", "merger": "cam"},
        "merger cam: reads shares of mass, but scorer is none; choose a scorer of mass (attention",
    ),
    ({"evictor": "none"}, "nothing could be evicted to meet the budget"),
    (
        {"budget": {"fraction": 0.2, "recent": 26}, "evictor": {"name": "topk", "distance": 25}},
        "would evict some of the 26 recents",
    ),
    ({"quantizer": "quanto3"}, "quantizer quanto3: bits: must be 2, 4 or 8; got 3"),
    ({"quantizer": {"name": "quanto4", "bits": 8}}, "quantizer quanto4: the name says 4 bits, the field 8; give one"),
    ({"merger": "pivotal"}, "merger: 'pivotal' is now 'lookm' with rule='pivotal'"),
    ({"quantizer": "quant4"}, "quantizer: unknown policy 'quant4'; did you mean 'quanto4'?"),
    ({"quantizer": "int4"}, "known: fp8, k8v4, quanto, quanto2, quanto4, quanto8, rotated, rotated2, rotated4"),
    ({"quantizer": "fp88"}, "quantizer: unknown policy 'fp88'; did you mean 'fp8'?"),
    ({"allocator": "none"}, "allocator"),
]


@pytest.mark.parametrize(("fields", "says"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_what_cannot_be_is_refused_when_the_configuration_is_built(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(KVCompressError) as error:
        CompressionConfig.preset("prefixkv", **fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.yaml", "scorer: [attention", "is not valid YAML"),
        ("config.yaml", "- 1\n- 2", "must hold a mapping of fields"),
        ("config.yaml", "", "must hold a mapping of fields"),
        ("config.json", "{'scorer': 1}", "is not valid JSON"),
        ("config.yaml", "1: 2", "config"),
        ("config.yaml", "allocator: prefx", "did you mean 'prefix'"),
        ("config.toml", "", "must end in one of .yaml, .yml, .json"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(KVCompressError, match="config") as error:
        CompressionConfig.load(path)
    assert says in str(error.value) and name in str(error.value)


def test_a_missing_file_or_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KVCompressError, match=r"missing.yaml: cannot be read"):
        CompressionConfig.load(tmp_path / "missing.yaml")
    with pytest.raises(KVCompressError, match="unknown preset 'PrefixKV'; did you mean 'prefixkv'"):
        CompressionConfig.preset("PrefixKV")
    with pytest.raises(KVCompressError, match="unknown preset 'prefxkv'; did you mean 'prefixkv'"):
        CompressionConfig.read("prefxkv")
    with pytest.raises(KVCompressError, match="must be a preset's name"):
        CompressionConfig.read(3)


def test_a_configuration_cannot_be_changed() -> None:
    config = CompressionConfig.preset("prefixkv")
    with pytest.raises(ValueError, match="frozen"):
        config.budget = Budget(tokens=3)


def test_a_word_that_nobody_knows_for_scores_of_several_forwards_is_refused() -> None:
    class Loud(Scorer):
        name: ClassVar[str] = "loud"

        @property
        def over_forwards(self) -> Any:
            return "max"

        def score(self, layer: LayerContext) -> Importance:
            return layer.keys.norm(dim=-1)

    with pytest.raises(
        ConfigError, match=r"scorer loud: over_forwards must be one of 'last', 'sum', 'highest'; got 'max'"
    ):
        CompressionConfig(scorer=Loud())


def numeric(model: type[Configured]) -> Iterator[tuple[str, bool]]:
    """Fields that pydantic's schema says are numbers, or lists of them, and whether they are lists."""
    for name, schema in model.model_json_schema()["properties"].items():
        words = re.findall(r"'type': '(\w+)'", str(schema))
        if {"integer", "number"} & {*words} and "boolean" not in words:
            yield name, "array" in words


POLICIES = [registry.get(name) for registry in REGISTRIES for name in registry.names()]
CONFIGURED = [Budget, LayerProfile, Fingerprint, *(one for one in POLICIES if one.__module__.startswith("kvcompress."))]
NUMBERS = [(model, name, is_list) for model in CONFIGURED for name, is_list in numeric(model)]


def test_most_policies_have_numbers() -> None:
    assert {(Budget, "bytes", False), (SnapKV, "window", False), (Duo, "gates", True)} < {*NUMBERS}
    assert len(NUMBERS) > 50


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("model", "name", "is_list"), NUMBERS, ids=[f"{one.__name__}-{name}" for one, name, _ in NUMBERS]
)
def test_true_and_false_are_no_numbers(model: type[Configured], name: str, is_list: bool, value: bool) -> None:
    for came in (value, [value], [[0.5, value]]) if is_list else (value,):
        with pytest.raises(ConfigError, match=rf"^{name}: must be (a number|.*\d); got {value}"):
            model(**{name: came})


def test_a_truth_is_taken_where_one_is_meant() -> None:
    assert CompressionConfig(auto=True).auto
    merger = {"name": "lookm", "within_modality": False}
    assert CompressionConfig.preset("lookm", merger=merger).model_dump()["merger"]["within_modality"] is False
    with pytest.raises(ConfigError, match="scorer snapkv: window: must be a number; got True"):
        CompressionConfig.preset("snapkv", scorer={"name": "snapkv", "window": True})


PROFILE = LayerProfile(budgets=[0.5], retention=[[0.5]])
WRONG_KINDS: list[tuple[str, Callable[[], Any], str]] = [
    ("keys", lambda: CompressionConfig.read({1: 2}), "config: names of fields are texts; got [1]"),
    ("cache", lambda: CompressedCache(tiny.model("llama"), {1: 2}), "config: names of fields are texts; got [1]"),
    ("preset", lambda: CompressionConfig.preset(None), "preset: must be a name (auto, full, prefixkv,"),
    ("presets", lambda: CompressionConfig.preset(["h2o"]), "; got ['h2o']"),
    ("load", lambda: CompressionConfig.load(3), "config: must be a path, as text or a pathlib.Path; got 3"),
    ("dump", lambda: CompressionConfig.preset("full").dump(None), "config: must be a path, as text or a pathlib.Path"),
    ("profile", lambda: LayerProfile.load(3), "profile: must be a path, as text or a pathlib.Path; got 3"),
    ("dumped profile", lambda: PROFILE.dump(None), "profile: must be a path, as text or a pathlib.Path; got None"),
    ("at", lambda: PROFILE.at("half"), "budget: must be a fraction from 0 to 1; got 'half'"),
    ("prefixkv", lambda: LayerProfile.from_prefixkv(None), "from_prefixkv: must be a path, as text or a pathlib.Path"),
    (
        "shares",
        lambda: CompressedCache(tiny.model("llama"), "prefixkv", profile=[0.5, 0.2]),
        "got [0.5, 0.2]. A list of shares kept goes into allocator={'name': 'profile', 'retention': ...}",
    ),
    ("create", lambda: SCORERS.create(3), "scorer: a policy's name is a text; got 3; known: attention,"),
    ("get", lambda: SCORERS.get(None), "scorer: a policy's name is a text; got None; known: attention,"),
]


@pytest.mark.parametrize(("use", "says"), [case[1:] for case in WRONG_KINDS], ids=[case[0] for case in WRONG_KINDS])
def test_what_is_of_another_kind_is_refused_by_its_name(use: Callable[[], Any], says: str) -> None:
    """Where nobody checks types, as in most programs."""
    with type_checker.off(), pytest.raises(ConfigError) as caught:
        use()
    assert says in str(caught.value) and "\n" not in str(caught.value)
