"""Profiles: what they hold, what they give for any budget, whose they are, and how PrefixKV's files become one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress import ALLOCATORS, CompressedCache, CompressionConfig
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError, PolicyError
from kvcompress.policies.fingerprint import Fingerprint, fingerprint_of
from tests import strategies, tiny

SHARES = st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def profiles(draw: st.DrawFn, layers: int | None = None, monotone: bool = False) -> LayerProfile:
    """Any profile; with `monotone` no layer's retention falls as the budget grows, as that of every real one."""
    layers = layers or draw(st.integers(1, 5))
    count = draw(st.integers(1, 4))
    budgets = sorted(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count, unique=True)))
    lists = [draw(st.lists(SHARES, min_size=layers, max_size=layers)) for _ in budgets]
    if monotone:
        lists = np.sort(np.array(lists), axis=0).tolist()
    spread = [[share / 2 for share in one] for one in lists] if draw(st.booleans()) else []
    known = draw(st.booleans())
    return LayerProfile(
        budgets=budgets,
        retention=lists,
        spread=spread,
        samples=draw(st.integers(0, 10)),
        model=fingerprint_of(tiny.model("llama").model).model_copy(update={"layers": layers}) if known else None,
        config=CompressionConfig.preset("prefixkv", budget=0.3) if known else None,
        data="shapes",
        data_hash="0a",
        version="1",
    )


# -- any budget --------------------------------------------------------------------------------------------------------


@given(profile=profiles(), budget=st.floats(0, 1))
def test_the_mean_over_the_layers_is_the_budget(profile: LayerProfile, budget: float) -> None:
    found = profile.at(budget)
    assert len(found) == profile.layers and all(-1e-12 <= share <= 1 + 1e-12 for share in found)
    assert sum(found) / len(found) == pytest.approx(budget, abs=1e-6)


@given(profile=profiles(monotone=True), budgets=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_no_layer_keeps_less_of_a_larger_budget(profile: LayerProfile, budgets: tuple[float, float]) -> None:
    low, high = (profile.at(budget) for budget in sorted(budgets))
    assert all(one <= other + 1e-9 for one, other in zip(low, high, strict=True))


@given(profile=profiles())
def test_a_list_comes_back_at_the_budget_that_is_its_mean(profile: LayerProfile) -> None:
    means = [sum(one) / len(one) for one in profile.retention]
    for one, mean in zip(profile.retention, means, strict=True):
        if sum(abs(mean - other) < 1e-6 for other in [0, *means, 1]) == 1:  # no other list stands for that budget
            assert profile.at(mean) == pytest.approx(one, abs=1e-6)


@given(profile=profiles(), budget=st.floats(0, 1))
def test_between_two_lists_it_is_numpy_s_interpolation(profile: LayerProfile, budget: float) -> None:
    knots = sorted([[0.0] * profile.layers, *profile.retention, [1.0] * profile.layers], key=sum)
    means = [sum(one) / len(one) for one in knots]
    if min(np.diff(means)) < 1e-6:
        return
    wanted = [np.interp(budget, means, column) for column in zip(*knots, strict=True)]
    assert profile.at(budget) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan")])
def test_a_budget_is_a_fraction(budget: float) -> None:
    with pytest.raises(ConfigError, match="fraction from 0 to 1"):
        LayerProfile(budgets=[0.5], retention=[[0.5]]).at(budget)


# -- the allocator -----------------------------------------------------------------------------------------------------


@given(profile=profiles(), tokens=st.integers(1, 3000), share=st.floats(0.01, 1))
def test_every_layer_gets_its_share_to_the_slot(profile: LayerProfile, tokens: int, share: float) -> None:
    capacity = torch.full((profile.layers, 1), tokens)
    total = torch.tensor([int(share * tokens * profile.layers)])
    importance = torch.zeros(profile.layers, 1, tokens)
    budget = profile.allocator().allocate(importance, total, torch.zeros_like(capacity), capacity)[:, 0].tolist()
    wanted = [one * tokens for one in profile.at(int(total) / (tokens * profile.layers))]
    assert all(abs(own - other) < 1 + 1e-6 for own, other in zip(budget, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("budget", "mean"), [(0.5, 0.5), (0.25, 0.25), (20, 0.25)])
def test_a_cache_keeps_what_its_profile_says(budget: float | int, mean: float) -> None:
    """Whatever way the budget is written."""
    profile = LayerProfile(budgets=[0.5], retention=[[0.9, 0.2, 0.4]])
    model = tiny.model("llama")
    cache = CompressedCache(model, "prefixkv", profile=profile, budget=budget)
    model(**tiny.inputs("llama", 80, seed=0), **tiny.with_cache(cache))
    wanted = [round(share * 80) for share in profile.at(mean)]
    assert [rows[0] for rows in cache.report().layer_lengths] == wanted
    assert cache.config.scorer == CompressionConfig.preset("prefixkv").scorer


@given(profile=profiles(layers=3))
def test_a_configuration_holds_the_numbers_not_the_file(
    tmp_path_factory: pytest.TempPathFactory, profile: LayerProfile
) -> None:
    folder = tmp_path_factory.mktemp("profile")
    profile.dump(folder / "profile.json")
    config = CompressionConfig.preset("snapkv", allocator={"name": "profile", "path": str(folder / "profile.json")})
    (folder / "profile.json").unlink()
    assert config.allocator == profile.allocator()
    config.dump(folder / "config.yaml")
    assert CompressionConfig.load(folder / "config.yaml") == config
    assert CompressionConfig(**json.loads(config.model_dump_json())) == config


@torch.no_grad()
def test_a_profile_needs_no_mass_where_its_preset_s_allocator_did() -> None:
    """A cheap scorer picks the tokens; layer sizes come from the profile."""
    profile = LayerProfile(budgets=[0.5], retention=[[0.9, 0.2, 0.4]])
    model = tiny.model("llama")
    cache = CompressedCache(model, "prefixkv", budget=0.5, profile=profile, scorer="key_norm")
    model(**tiny.inputs("llama", 80, seed=0), **tiny.with_cache(cache))
    assert [rows[0] for rows in cache.report().layer_lengths] == [72, 16, 32]
    with pytest.raises(ConfigError, match="give one"):
        CompressedCache(model, "prefixkv", profile=profile, allocator="uniform")


# -- files -------------------------------------------------------------------------------------------------------------


@given(profile=profiles(), suffix=st.sampled_from([".json", ".yaml", ".yml"]))
def test_load_and_dump_are_inverse(
    tmp_path_factory: pytest.TempPathFactory, profile: LayerProfile, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("profile") / f"profile{suffix}"
    profile.dump(path)
    assert LayerProfile.load(path) == profile


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("profile.toml", "", "must end in one of .json"),
        ("missing.json", None, "cannot be read"),
        ("profile.json", "{", "is not valid JSON"),
        ("profile.yaml", "[1", "is not valid YAML"),
        ("profile.json", "[0.5, 0.5]", "--from-prefixkv"),
        ("profile.json", '{"budgets": [0.5, 0.2], "retention": [[0.5], [0.2]]}', "must ascend"),
        ("profile.json", '{"budgets": [0.5], "retention": [[1.5]]}', "retention.0.0"),
        ("profile.json", '{"budgets": [0.2, 0.5], "retention": [[0.2, 0.2], [0.5]]}', "list of 2 layers"),
        ("profile.json", '{"budgets": [0.5], "retention": [[0.5]], "spread": [[0, 0]]}', "spread"),
        ("profile.json", '{"budgets": [0.5], "retention": [[0.5]], "author": "me"}', "author"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        LayerProfile.load(name)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_in_the_place_of_a_configuration_is_refused_with_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    LayerProfile(budgets=[0.2, 0.5], retention=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], data="shapes").dump(path)
    model = tiny.model("llama")
    with pytest.raises(ConfigError, match="is a profile, as 'kvcompress calibrate' writes it") as caught:
        CompressedCache(model, path)
    assert f"--set allocator=profile --set allocator.path={path}," in str(caught.value)
    instead = f"CompressedCache(model, profile='{path}')"
    assert instead in str(caught.value) and len(str(caught.value)) < 200 + 3 * len(str(path))
    assert eval(instead, {"CompressedCache": CompressedCache, "model": model}).config.allocator.name == "profile"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        LayerProfile(budgets=[0.5], retention=[[0.5]]).dump(tmp_path / "no" / "profile.json")


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_weights_not_their_type() -> None:
    """Of bfloat16 weights; the same model made twice is one, other weights and other shapes are not."""
    model = tiny.build("llava", dtype=torch.bfloat16)
    first = fingerprint_of(model.get_decoder())
    assert first == fingerprint_of(tiny.build("llava", dtype=torch.bfloat16).get_decoder()) and first.weights
    for dtype in (torch.float32, torch.float16):
        assert fingerprint_of(copy.deepcopy(model).to(dtype).get_decoder()) == first
    other = fingerprint_of(tiny.build("llava", dtype=torch.bfloat16, seed=1).get_decoder())
    assert first.differences(other) == ["other weights"]
    shape = fingerprint_of(tiny.build("llama_mha").model)
    assert first.differences(shape) == ["kv_heads 2 instead of 4"]


def test_rounding_to_bfloat16_on_loading_changes_no_fingerprint() -> None:
    full = tiny.build("llama").model
    assert fingerprint_of(full) == fingerprint_of(copy.deepcopy(full).bfloat16())


def test_one_changed_matrix_is_another_model() -> None:
    model = tiny.build("llama").model
    before = fingerprint_of(model)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert before.differences(fingerprint_of(model)) == ["other weights"]


def test_weights_that_are_not_here_are_not_compared() -> None:
    decoder = copy.deepcopy(tiny.build("llama").model)
    known = fingerprint_of(decoder)
    decoder.layers[0].to("meta")
    assert fingerprint_of(decoder).weights is None
    assert known.differences(fingerprint_of(decoder)) == [] == fingerprint_of(decoder).differences(known)


def profile_of(decoder: Any) -> LayerProfile:
    return LayerProfile(budgets=[0.5], retention=[[0.6, 0.4, 0.5]], model=fingerprint_of(decoder))


@pytest.mark.parametrize(
    "use",
    [
        lambda model, profile, path: CompressedCache(model, "prefixkv", profile=profile),
        lambda model, profile, path: CompressedCache(model, "prefixkv", profile=path),
        lambda model, profile, path: CompressedCache(model, "tova", allocator={"name": "profile", "path": path}),
        lambda model, profile, path: CompressedCache(
            model, "prefixkv", allocator={"name": "adakv", "layers": {"name": "profile", "path": path}}
        ),
    ],
    ids=["profile", "path", "config", "part of another allocator"],
)
def test_a_profile_of_another_model_is_refused_when_the_cache_is_made(tmp_path: Path, use: Any) -> None:
    model, path = tiny.build("llama", seed=1), str(tmp_path / "profile.json")
    profile = profile_of(model.model)
    profile.dump(path)
    use(model, profile, path)
    other = tiny.build("llama")
    with pytest.raises(ConfigError, match=r"another model \(other weights\).*kvcompress calibrate"):
        use(other, profile, path)
    assert other.config._attn_implementation == "sdpa"  # untouched


def test_a_profile_without_a_fingerprint_is_checked_by_its_layers() -> None:
    with pytest.raises(ConfigError, match="layers 2 instead of 3"):
        CompressedCache(tiny.model("llama"), "prefixkv", profile=LayerProfile(budgets=[0.5], retention=[[0.6, 0.4]]))
    wrong = LayerProfile(budgets=[0.5], retention=[[0.6, 0.4]]).allocator()
    capacity = torch.full((3, 1), 10)
    with pytest.raises(PolicyError, match="the profile has 2 layers, the model has 3"):
        wrong.allocate(torch.zeros(3, 1, 10), torch.tensor([15]), torch.zeros_like(capacity), capacity)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="one share per layer"):
        ALLOCATORS.create("profile", retentions=[[0.5, 0.5], [0.2]])
    with pytest.raises(ConfigError, match="got both"):
        ALLOCATORS.create("profile", retention=[0.5], retentions=[[0.5]])
    with pytest.raises(ConfigError, match="the model has 3 layers"):
        model = Fingerprint(model_type="llama", layers=3, heads=1, kv_heads=1, hidden_size=1)
        LayerProfile(budgets=[0.5], retention=[[0.5]], model=model)


# -- PrefixKV's files --------------------------------------------------------------------------------------------------


def write_prefixkv(folder: Path, start: str = "prefixkv_tiny_", layers: int = 3) -> dict[float, list[float]]:
    """Files as PrefixKV publishes them: one for each ratio evicted, a list of shares evicted. Returns them."""
    folder.mkdir(exist_ok=True)
    generator, written = strategies.generator(0), {}
    for tenth in range(1, 10):
        ratio = tenth / 10
        shares = torch.rand(layers, generator=generator, dtype=torch.float64) - 0.5
        evicted = (ratio + 0.1 * (shares - shares.mean())).clamp(0, 1).tolist()
        (folder / f"{start}{ratio}.json").write_text(json.dumps(evicted))
        written[ratio] = evicted
    return written


@pytest.mark.parametrize("start", ["", "prefixkv_llava-v1.5-7b_"])
def test_shares_evicted_become_shares_kept(tmp_path: Path, start: str) -> None:
    """The file 0.7 says what goes of each layer when 70 % go, so it is the budget 0.3."""
    written = write_prefixkv(tmp_path / "confs", start)
    profile = LayerProfile.from_prefixkv(tmp_path / "confs")
    assert profile.budgets == pytest.approx([tenth / 10 for tenth in range(1, 10)])
    for budget, kept in zip(profile.budgets, profile.retention, strict=True):
        evicted = written[round(1 - budget, 1)]
        assert [one + other for one, other in zip(kept, evicted, strict=True)] == pytest.approx([1.0] * 3)
    assert sum(profile.at(0.3)) / 3 == pytest.approx(0.3) and profile.model is None
    CompressedCache(tiny.model("llama"), "prefixkv", profile=profile)


def test_a_folder_of_several_models_needs_the_start_of_the_names(tmp_path: Path) -> None:
    write_prefixkv(tmp_path, "prefixkv_llava-v1.5-13b_", layers=4)
    written = write_prefixkv(tmp_path, "prefixkv_llava-v1.5-7b_")
    with pytest.raises(ConfigError, match=r"several models.*llava-v1\.5-13b_.*llava-v1\.5-7b_"):
        LayerProfile.from_prefixkv(tmp_path)
    profile = LayerProfile.from_prefixkv(tmp_path / "prefixkv_llava-v1.5-7b")
    assert profile.layers == 3 and profile.retention[0] == pytest.approx([1 - share for share in written[0.9]])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("notes.json", "[]", "has no .json file"),
        ("0.5.json", "[0.5, 1.2]", "share evicted of each layer"),
        ("0.5.json", '{"retention": [0.5]}', "share evicted of each layer"),
        ("0.5.json", "[0.5", "not valid JSON"),
    ],
)
def test_a_folder_of_anything_else_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        LayerProfile.from_prefixkv(tmp_path)
    with pytest.raises(ConfigError, match=r"has no \.json file"):
        LayerProfile.from_prefixkv(tmp_path / "missing")
