"""A cache on disk: what is loaded goes on as what was saved, and nothing else is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache import manifest as manifests
from kvcompress.cache import saving
from kvcompress.cache.loading import Saved
from kvcompress.errors import CacheStateError, ConfigError
from tests import tiny, type_checker
from tests.strategies import Scripted

PRESETS = (
    "full",
    "prefixkv",
    "prefixkv+merge",
    "prefixkv+int4",
    "h2o",
    "snapkv",
    "streaming",
    "kivi4",
    "lookm",
    "cake",
)
REDUCING = ("lightkv", "prefixkv+lightkv", "pyramiddrop")
CASES = [(name, "llama") for name in (*PRESETS, "cake")] + [(name, "llava_36") for name in (*PRESETS, *REDUCING)]
REMEMBERING: list[dict[str, Any]] = [
    {"evictor": {"name": "topk", "decode": "lowest_score"}},
    {"merger": "threshold"},
    {"scorer": {"name": "attention", "reduce": "mean"}, "allocator": "uniform"},
]
OVERRIDES: dict[str, dict[str, Any]] = {
    "kivi4": {"quantizer": {"name": "quanto4", "group": 8, "residual": 8}},
    "prefixkv+int4": {
        "quantizer": {"name": "quanto4", "group": 8, "residual": 8},
        "evictor": {"name": "topk", "distance": 6},
    },
}


def start(
    name: str, model_name: str, model: PreTrainedModel | None = None, decoded: int = 3, **overrides: Any
) -> CompressedCache:
    """A cache of two rows, one of them padded, that has read a prompt and decoded some tokens."""
    model = tiny.model(model_name) if model is None else model
    config = CompressionConfig.preset(name, **OVERRIDES.get(name, {}))
    budget = {} if config.budget.keeps_everything else {"budget": 0.5}
    cache = CompressedCache(model, config.override(**{**budget, **overrides}))
    inputs = tiny.inputs(model_name, 30, seed=5, batch=2)
    inputs["attention_mask"][0, :4] = 0
    steps(model, cache, inputs, decoded)
    return cache


@torch.no_grad()
def steps(model: PreTrainedModel, cache: CompressedCache, inputs: dict[str, Any], count: int) -> list[Tensor]:
    """Logits of a forward and so many greedy steps after it."""
    logits = [model(**inputs, **tiny.with_cache(cache)).logits[:, -1]]
    for _ in range(count):
        logits.append(model(logits[-1].argmax(-1, keepdim=True), **tiny.with_cache(cache)).logits[:, -1])
    return logits


def goes_on(model: PreTrainedModel, cache: CompressedCache) -> list[Tensor]:
    """Logits of decode steps, of a further turn, and of decode steps after it."""
    ids = tiny.token_ids(cache.batch_size, 4, seed=9)
    return steps(model, cache, {"input_ids": ids[:, :1]}, 9) + steps(model, cache, {"input_ids": ids[:, 1:]}, 4)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_what_is_loaded_goes_on_to_the_bit_as_what_was_saved(name: str, model_name: str, tmp_path: Path) -> None:
    model, cache = tiny.model(model_name), start(name, model_name)
    before = cache.report()
    cache.save(tmp_path / "saved")
    loaded = CompressedCache.load(model, tmp_path / "saved")
    assert cache.report() == before, "saving changed the cache"
    assert loaded.report() == before and loaded.config == cache.config
    assert same(goes_on(model, loaded), goes_on(model, cache))
    assert loaded.report() == cache.report()


@pytest.mark.parametrize("overrides", REMEMBERING, ids=lambda fields: next(iter(fields)))
def test_what_policies_remember_from_step_to_step_is_saved(overrides: dict[str, Any], tmp_path: Path) -> None:
    model, cache = tiny.model("llama"), start("prefixkv", "llama", decoded=9, **overrides)
    cache.save(tmp_path)
    loaded = CompressedCache.load(model, tmp_path)
    assert loaded.report() == cache.report()
    assert same(goes_on(model, loaded), goes_on(model, cache))
    assert loaded.report() == cache.report()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["prefixkv", "kivi4"])
def test_every_dtype_of_a_model_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.model("llama", dtype)
    cache = start(name, "llama", model)
    cache.save(tmp_path)
    assert same(goes_on(model, CompressedCache.load(model, tmp_path)), goes_on(model, cache))


@pytest.mark.parametrize("quantizer", ["quanto2", "quanto4", "quanto8", "fp8"])
def test_codes_come_back_as_they_were(quantizer: str, tmp_path: Path) -> None:
    packing = {"name": quantizer, "group": 8, "residual": 8}
    cache = start("prefixkv", "llama", quantizer=packing, evictor={"name": "topk", "distance": 6})
    cache.save(tmp_path)
    assert cache.layers[0].store.packed
    loaded = CompressedCache.load(tiny.model("llama"), tmp_path)
    assert loaded.report() == cache.report()
    assert same(goes_on(tiny.model("llama"), loaded), goes_on(tiny.model("llama"), cache))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.ranked(),
        lambda cache: cache.crop(-1),
        lambda cache: cache.reset(),
        lambda cache: cache.activate_past_recording(),
    ],
    ids=["reorder", "repeat", "select", "ranked", "crop", "reset", "recording"],
)
def test_whatever_was_done_to_a_cache_is_saved(change: Any, tmp_path: Path) -> None:
    cache = start("uniform", "llama", decoded=0, scorer={"name": "key_norm"})
    change(cache)
    cache.save(tmp_path)
    loaded = CompressedCache.load(tiny.model("llama"), tmp_path)
    assert loaded.report() == cache.report()
    if cache.batch_size > 0:
        assert same(goes_on(tiny.model("llama"), loaded), goes_on(tiny.model("llama"), cache))


def test_a_loaded_cache_knows_the_conversation(tmp_path: Path) -> None:
    model, inputs = tiny.model("llama"), tiny.inputs("llama", 20, seed=1)
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    output = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=3, do_sample=False)
    cache.save(tmp_path)
    other = torch.cat([output.flip(1), tiny.token_ids(1, 3, seed=2)], 1)
    with pytest.raises(CacheStateError, match="conversation"):
        model.generate(other, **tiny.with_cache(CompressedCache.load(model, tmp_path)), max_new_tokens=2)
    whole = torch.cat([output, tiny.token_ids(1, 3, seed=2)], 1)
    found = [
        model.generate(whole, **tiny.with_cache(one), max_new_tokens=5, do_sample=False)
        for one in (CompressedCache.load(model, tmp_path), cache)
    ]
    assert torch.equal(*found)


def test_another_process_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    model, inputs = tiny.build("llama"), tiny.inputs("llama", 24, seed=3)
    model.save_pretrained(tmp_path / "model")
    cache = CompressedCache(model, "prefixkv+int4", budget=0.5)
    output = model.generate(**inputs, **tiny.with_cache(cache), max_new_tokens=4, do_sample=False)
    cache.save(tmp_path / "cache")
    whole = torch.cat([output, tiny.token_ids(1, 5, seed=4)], 1)
    program = (
        "import sys, torch, transformers\nfrom kvcompress import CompressedCache\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "cache = CompressedCache.load(model, sys.argv[2])\nids = torch.tensor([list(map(int, sys.argv[3].split()))])\n"
        f"print(model.generate(ids, {tiny.CACHE}=cache, max_new_tokens=8, do_sample=False)[0].tolist())\n"
    )
    ids = " ".join(map(str, whole[0].tolist()))
    arguments = [sys.executable, "-c", program, str(tmp_path / "model"), str(tmp_path / "cache"), ids]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = model.generate(whole, **tiny.with_cache(cache), max_new_tokens=8, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected[0].tolist()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: tiny.build("llama", seed=1), "other weights"),
        (lambda: tiny.build("llama_mha"), "kv_heads 2 instead of 4"),
        (lambda: tiny.build("mistral"), "model_type llama instead of mistral"),
        (lambda: tiny.build("llama", torch.bfloat16), "dtype float32 instead of bfloat16"),
    ],
    ids=["weights", "heads", "type", "dtype"],
)
def test_a_cache_of_another_model_is_refused_by_what_differs(other: Any, told: str, tmp_path: Path) -> None:
    start("prefixkv", "llama").save(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){tmp_path}.*another model.*{told}"):
        CompressedCache.load(other(), tmp_path)


def test_a_saved_cache_is_replaced_only_when_asked(tmp_path: Path) -> None:
    first, second = start("prefixkv", "llama"), start("streaming", "llama")
    first.save(tmp_path)
    with pytest.raises(ConfigError, match="overwrite=True"):
        second.save(tmp_path)
    assert CompressedCache.load(tiny.model("llama"), tmp_path).report() == first.report()
    second.save(tmp_path, overwrite=True)
    assert CompressedCache.load(tiny.model("llama"), tmp_path).report() == second.report()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"kvcompress_cache": 99}', '{"kvcompress_cache": 1}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_somebody_else_is_neither_loaded_nor_replaced(content: str, overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / manifests.MANIFEST
    path.write_text(content)
    with pytest.raises(ConfigError, match=manifests.MANIFEST):
        CompressedCache.load(tiny.model("llama"), tmp_path)
    with pytest.raises(ConfigError, match=manifests.MANIFEST):
        start("prefixkv", "llama").save(tmp_path, overwrite=overwrite)
    assert path.read_text() == content and {one.suffix for one in tmp_path.iterdir()} <= {".json", ".lock"}


def test_a_folder_without_a_cache_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="there is no saved cache in it"):
            CompressedCache.load(tiny.model("llama"), folder)


@given(data=st.data())
def test_a_damaged_file_is_one_error_that_names_it_and_the_way_out(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("saved")
    start("prefixkv", "llama", decoded=0).save(folder)
    path = data.draw(st.sampled_from(sorted(one for one in folder.iterdir() if one.suffix != ".lock")))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    torn = data.draw(st.booleans())
    changed = content[:place] if torn else content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes(changed)
    with pytest.raises(ConfigError, match="save the cache again") as error:
        CompressedCache.load(tiny.model("llama"), folder)
    assert str(folder) in str(error.value)
    path.unlink()
    with pytest.raises(ConfigError, match=f"(?s){folder}.*save the cache again"):
        CompressedCache.load(tiny.model("llama"), folder)


@given(data=st.data())
def test_a_forged_file_with_right_checksums_is_loaded_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("saved")
    start("prefixkv", "llama", decoded=0).save(folder)
    path = folder / manifests.MANIFEST
    fields = json.loads(path.read_text())
    tensors = load_file(folder / fields["tensors"])
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["shape", "dtype", "values", "gone", "name", "state", "room", "repeats"]))
    if kind == "shape":
        tensors[name] = tensors[name].reshape(-1)[:1].clone()
    elif kind == "dtype":
        tensors[name] = tensors[name].to(torch.float64 if tensors[name].dtype != torch.float64 else torch.int8)
    elif kind == "values" and tensors[name].dtype != torch.bool:
        tensors[name] = torch.full_like(tensors[name], 2**31 - 1 if tensors[name].dtype == torch.int32 else 100)
    elif kind == "gone":
        del tensors[name]
    elif kind == "name":
        fields["tensors"] = data.draw(st.sampled_from(["../x.safetensors", "/etc/passwd", "", "cache.json", "\0"]))
    elif kind in ("room", "repeats"):
        what, more = ("capacity", "") if kind == "room" else ("shape", "[")
        text = re.sub(rf'("{what}"[,:] {re.escape(more)})\d+', rf"\g<1>{2**40}", json.dumps(fields["state"]))
        fields["state"] = json.loads(text)
    else:
        parts = fields["state"]["dict"]
        parts[data.draw(st.integers(0, len(parts) - 1))][1] = data.draw(
            st.sampled_from([None, 3, "x", [], {"object": "system", "fields": {}}, {"dict": []}, {"tensor": "no"}])
        )
    if kind != "name":
        save_file(tensors, folder / fields["tensors"])
        fields["tensors_sha256"] = hashlib.sha256((folder / fields["tensors"]).read_bytes()).hexdigest()
    manifest = manifests.Manifest(**{**fields, "sha256": ""})
    path.write_text(manifest.model_copy(update={"sha256": manifest.checksum()}).model_dump_json())
    try:
        CompressedCache.load(tiny.model("llama"), folder)
    except ConfigError as error:
        assert str(folder) in str(error)
    else:
        assert kind not in ("gone", "name", "room", "repeats")


def test_what_may_still_be_undone_is_not_saved(tmp_path: Path) -> None:
    model = tiny.model("llama")
    cache = CompressedCache(model, "prefixkv", budget=0.5)
    cache.activate_past_recording()
    with torch.no_grad():
        model(**tiny.inputs("llama", 12, seed=1), **tiny.with_cache(cache))
    with pytest.raises(CacheStateError, match=r"crop\(0\) or compress\(\)"):
        cache.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    cache.compress()
    cache.save(tmp_path / "saved")


def test_a_policy_that_could_not_be_read_again_is_refused_at_once(tmp_path: Path) -> None:
    cache = CompressedCache(tiny.model("llama"), CompressionConfig(scorer=Scripted()))
    with pytest.raises(ConfigError, match=r"save: .*unknown policy 'scripted'.*register policies of your own"):
        cache.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_full_disk_leaves_the_cache_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start("prefixkv", "llama")
    first.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("write_tensors", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(saving, function, full)
            with pytest.raises((ConfigError, OSError), match="No space left"):
                start("streaming", "llama").save(tmp_path, overwrite=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_copies_of_a_loaded_cache_share_nothing_they_write(tmp_path: Path) -> None:
    model, cache = tiny.model("llama"), start("h2o", "llama")
    cache.save(tmp_path)
    loaded = CompressedCache.load(model, tmp_path)
    expected = goes_on(model, copy.deepcopy(loaded))
    assert same(goes_on(model, copy.deepcopy(loaded)), expected)
    assert np.array_equal(loaded.report().layer_lengths, cache.report().layer_lengths)


def nested(levels: int) -> Any:
    """So many mappings inside each other."""
    value: Any = 1
    for _ in range(levels):
        value = {"in": value}
    return value


KEPT: dict[str, Any] = {
    "text": "\u2028 \N{GRINNING FACE}",
    "numbers": [0, -1.5, 1 - 10**399, True, None, np.float64(0.1)],
    "keys": {1: "int", 0.5: "float", "one": (1, (2,))},
    "tensors": [torch.arange(6).view(2, 3).T, torch.full((2,), torch.nan), torch.tensor(1.0, dtype=torch.bfloat16)],
    "mapping": MappingProxyType({"a": 1}),
    "deep": nested(15),
}
COMPLEX, SPARSE = torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()
NOT_KEPT: list[tuple[str, Any, str]] = [
    ("object", {"a": object()}, r"extra\['a'\]: must be text, a number, a tensor, a list or a mapping to be kept"),
    ("complex", {"a": COMPLEX}, r"extra\['a'\]: must be a dense tensor of bool, uint8, .*; got torch.complex64"),
    (
        "sparse",
        {"a": [0, SPARSE]},
        r"extra\['a'\]\[1\]: must be a dense tensor .*; got torch.float32, torch.sparse_coo",
    ),
    ("meta", {"a": torch.empty(1, device="meta")}, r"extra\['a'\]: must be a dense tensor .*, on meta"),
    ("set", {"a": {1}}, r"extra\['a'\]: must be text, .*; got \{1\}"),
    ("array", {"a": np.ones(2)}, r"extra\['a'\]: must be text, a number, a tensor,"),
    ("bytes", {"a": b"b"}, r"extra\['a'\]: must be text, .*; got b'b'"),
    (
        "nan",
        {"a": {"b": float("nan")}},
        r"extra\['a'\]\['b'\]: must be a finite number \(tensors hold others\).*; got nan",
    ),
    ("digits", {"a": -(10**399)}, r"extra\['a'\]: must be a number of fewer than 400 digits"),
    ("many digits", {"a": 10**5000}, "must be a number of fewer than 400 digits .*; got an integer of 16,610 bits"),
    ("surrogate", {"a": "\ud800"}, r"extra\['a'\]: must be a text without half surrogate pairs"),
    ("key", {"a": {(1, 2): 3}}, r"a key of extra\['a'\]: must be text or a number .*; got \(1, 2\)"),
    ("deep", nested(17), "lists and mappings may be 16 inside each other"),
    ("list", [1], "extra: must be a mapping .*; got \\[1\\]"),
    ("number", 3, "extra: must be a mapping .*; got 3"),
]


def test_what_else_is_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    start("prefixkv", "llama").save(tmp_path, extra=KEPT)
    found = Saved.read(tmp_path).extra()
    tensors = zip(found.pop("tensors"), KEPT["tensors"], strict=True)
    assert found == {name: value for name, value in KEPT.items() if name != "tensors"}
    for one, other in tensors:
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize(("extra", "says"), [case[1:] for case in NOT_KEPT], ids=[case[0] for case in NOT_KEPT])
def test_what_could_not_come_back_is_refused_before_anything_is_made(extra: Any, says: str, tmp_path: Path) -> None:
    with type_checker.off(), pytest.raises(ConfigError, match=says):
        start("prefixkv", "llama").save(tmp_path / "new", extra=extra)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", [None, 3, b"folder"])
def test_a_folder_is_a_path(folder: Any) -> None:
    for use in (start("prefixkv", "llama").save, lambda one: CompressedCache.load(tiny.model("llama"), one)):
        with type_checker.off(), pytest.raises(ConfigError, match=f"folder: must be a path, .*; got {folder}"):
            use(folder)
