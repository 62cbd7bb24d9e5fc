"""A compressed cache on disk: what it holds in safetensors, what that means in JSON, and nothing that runs code."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache.decoding import catch_up_if_needed
from kvcompress.cache.plain import from_json, must, to_json
from kvcompress.cache.report import report_on
from kvcompress.cache.state import CacheState
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, ConfigError, KVCompressError, UnsupportedModeError
from kvcompress.files import (
    locked,
    make_folder,
    parse_json,
    read_tensors,
    read_text,
    replacing,
    write_tensors,
    write_text,
)
from kvcompress.parallel import ALONE
from kvcompress.policies.configured import Configured
from kvcompress.policies.fingerprint import Fingerprint, fingerprint_of

MANIFEST = "cache.json"
FORMAT = 1
_BYTES = 64 * 2**20  # of the manifest
_TENSORS = re.compile(r"cache-[0-9a-f]{16}\.safetensors")
_ROOM = 1024  # slots
_WAY_OUT = "save the cache again, or make a new CompressedCache and run the prompt again"


class Manifest(Configured):
    """What `cache.json` holds.

    Args:
        kvcompress_cache: number of the format.
        tensors: name of the file beside it that holds the tensors.
        tensors_sha256: checksum of that file.
        model: fingerprint of the model's decoder.
        dtype: of the model, such as "bfloat16".
        config: how the cache compresses.
        state: what the cache holds, with names for its tensors.
        extra: what else was saved with it.
        sha256: checksum of all of this.
    """

    kvcompress_cache: int
    tensors: str
    tensors_sha256: str
    model: Fingerprint
    dtype: str
    config: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, Any] = Field(default_factory=dict)
    sha256: str = ""

    def checksum(self) -> str:
        """SHA-256 of every field but itself."""
        fields = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# -- saving ------------------------------------------------------------------------------------------------------------


def save(
    cache: CacheState,
    model: PreTrainedModel,
    folder: str | PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a cache to a folder; see `CompressedCache.save`.

    Args:
        cache: what the cache knows.
        model: the decoder that it belongs to.
        folder: where to.
        overwrite: whether a cache that is there is replaced.
        extra: what else to keep with it: text, numbers, tensors, lists and mappings.
    """
    folder = Path(folder)
    manifest_path = folder / MANIFEST
    whole = _whole(cache)  # refuses before anything is made
    make_folder(folder, "cache")
    with locked(manifest_path, "cache"):
        before = None
        if manifest_path.exists():
            before = _read_manifest(folder, "only a folder with a saved cache is overwritten; give another one")
            if not overwrite:
                raise ConfigError(f"cache {folder}: exists already; overwrite=True replaces it, or give another folder")
        tensors: dict[str, Tensor] = {}
        state, kept = to_json(whole, tensors, {}), to_json(dict(extra or {}), tensors, {})
        name = f"cache-{secrets.token_hex(8)}.safetensors"
        with replacing(folder / name, "cache") as file:
            digest = write_tensors(file, tensors)
        try:
            fields: dict[str, Any] = {
                "kvcompress_cache": FORMAT,
                "tensors": name,
                "tensors_sha256": digest,
                "model": fingerprint_of(model),
                "dtype": _name_of(model.dtype),
                "config": cache.asked.model_dump(mode="json"),
                "state": state,
                "extra": kept,
            }
            manifest = Manifest(**fields)
            manifest = manifest.model_copy(update={"sha256": manifest.checksum()})
            write_text(manifest_path, manifest.model_dump_json(), "cache")  # from here on it is the new one
        except BaseException:
            with suppress(OSError):
                (folder / name).unlink()
            raise
        if before is not None and _TENSORS.fullmatch(before.tensors):
            with suppress(OSError):
                (folder / before.tensors).unlink()


def _whole(cache: CacheState) -> dict[str, Any]:
    """What a cache holds, as plain values; refuses what could not go on elsewhere."""
    cache.check_ready()
    if cache.heads is not ALONE:
        raise UnsupportedModeError(
            "save: several processes share the heads of this cache, and each holds its own alone; save a cache of the "
            "model in one process"
        )
    if cache.waiting is not None:
        raise CacheStateError(
            "save: the last forward may still be undone; call crop(0) or compress() first, which ends that"
        )
    try:
        CompressionConfig.read(cache.asked.model_dump(mode="json"))
    except KVCompressError as error:
        raise ConfigError(
            f"save: its configuration could not be read again: {error}; register policies of your own, as in "
            '@SCORERS.register("mine")'
        ) from None
    catch_up_if_needed(cache)
    return cache.saved()


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A cache that was saved, as it was read; whether it fits a model is not known yet.

    Attributes:
        folder: where it was read from.
        config: how the cache compresses.
    """

    folder: Path
    config: CompressionConfig
    _manifest: Manifest
    _tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> Saved:
        """Reads a folder.

        Raises:
            ConfigError: if it holds no cache, a damaged one, or one of another release or with unknown policies.
        """
        folder = Path(folder)
        manifest, tensors = _read(folder)
        try:
            config = CompressionConfig.read(manifest.config)
        except KVCompressError as error:
            raise ConfigError(
                f"cache {folder}: its configuration cannot be used here: {error}. Policies of your own have to be "
                "registered before it is loaded (import the module that defines them)"
            ) from None
        return cls(folder, config, manifest, tensors)

    def fill(self, state: CacheState, decoder: PreTrainedModel) -> None:
        """Lets a new cache hold what was saved.

        Args:
            state: of the new cache, made with `config`.
            decoder: that it belongs to.

        Raises:
            ConfigError: if it was saved from another model, or does not hold what this release reads.
        """
        _check_model(self.folder, self._manifest, decoder)
        places = [_place(layer, decoder) for layer in decoder.layers]  # type: ignore[union-attr]
        with self._told(), torch.no_grad():
            parts = dict(self._manifest.state["dict"])
            made: dict[tuple[str, torch.device], Tensor] = {}
            pairs = zip(
                parts.pop("layers"), (places[one] for one in state.numbers), strict=False
            )  # none before the first token
            layers = [from_json(one, self._tensors, made, place) for one, place in pairs]
            own = _own_from(parts.pop("own", None), self._tensors, made, places)
            rest = {name: from_json(part, self._tensors, made, places[0]) for name, part in parts.items()}
            _check_room(layers, rest["table"])
            state.restore({**rest, "layers": layers, "own": own}, places)
            _check_state(state, decoder)

    def extra(self) -> dict[str, Any]:
        """What else was saved with it; tensors are on the CPU.

        Raises:
            ConfigError: if it does not hold what this release reads.
        """
        with self._told():
            found: dict[str, Any] = from_json(self._manifest.extra, self._tensors, {}, torch.device("cpu"))
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what is of another kind than it should be fails anywhere
            raise ConfigError(
                f"cache {self.folder}: does not hold what this release of kvcompress reads ({type(error).__name__}: "
                f"{error}); {_WAY_OUT}"
            ) from None


def _own_from(
    saved: Any, tensors: dict[str, Tensor], made: dict[tuple[str, torch.device], Tensor], places: list[torch.device]
) -> dict[int, Any]:
    """What layers that are transformers' own hold, each where it computes."""
    return {number: from_json(one, tensors, made, places[number]) for number, one in (saved or {"dict": []})["dict"]}


def _read(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    manifest = _read_manifest(folder, _WAY_OUT)
    try:
        return manifest, _read_tensors(folder, manifest)
    except ConfigError:
        again = _read_manifest(folder, _WAY_OUT)  # somebody may have saved another one in between
        if again == manifest:
            raise
        return again, _read_tensors(folder, again)


def _read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    if not _TENSORS.fullmatch(manifest.tensors):
        raise ConfigError(f"cache {folder}: {MANIFEST} names no file of tensors of kvcompress; {_WAY_OUT}")
    try:
        return read_tensors(folder / manifest.tensors, "cache", manifest.tensors_sha256)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_WAY_OUT}") from None


def _read_manifest(folder: Path, way_out: str) -> Manifest:
    path = folder / MANIFEST
    if not path.exists():
        raise ConfigError(f"cache {folder}: there is no saved cache in it (no {MANIFEST}); {way_out}")
    try:
        content = parse_json(read_text(path, "cache", _BYTES), f"cache {path}:")
        if not isinstance(content, dict) or "kvcompress_cache" not in content:
            raise ConfigError(f"cache {path}: is not a cache that kvcompress saved")
        if content["kvcompress_cache"] != FORMAT:
            raise ConfigError(
                f"cache {path}: has the format {content['kvcompress_cache']!r}, and this release of kvcompress reads "
                f"{FORMAT}"
            )
        try:
            manifest = Manifest(**content)
        except (ConfigError, TypeError):
            raise ConfigError(f"cache {path}: is damaged: fields are missing, unknown or of another kind") from None
        if manifest.sha256 != manifest.checksum():
            raise ConfigError(f"cache {path}: is damaged: it does not hold what was written to it")
    except ConfigError as error:
        raise ConfigError(f"{error}; {way_out}") from None
    return manifest


def _check_model(folder: Path, manifest: Manifest, decoder: PreTrainedModel) -> None:
    differences = manifest.model.differences(fingerprint_of(decoder))
    if not differences and manifest.dtype != _name_of(decoder.dtype):
        differences = [f"dtype {manifest.dtype} instead of {_name_of(decoder.dtype)}"]
    if differences:
        raise ConfigError(
            f"cache {folder}: was saved from another model ({', '.join(differences)}); load that model, or make a new "
            "CompressedCache for this one and run the prompt again"
        )


def _check_room(layers: list[Any], table: Any) -> None:
    """Whether buffers have no more room than the table accounts for; without a table they get a little at most."""
    for layer in layers:
        store = layer["store"]
        if "slots" in store:  # without gaps, so what is there is what there is room for
            counts = store["slots"]
            must(counts.ndim == 2 and int(counts.min(initial=1)) > 0, "slots of heads")
            must(int(counts.sum()) == len(store["keys"]) == len(store["values"]), f"{counts.sum()} slots of heads")
            continue
        used = store["keys"].shape[2]
        if table is None:
            store["capacity"] = min(store["capacity"], used + max(used, _ROOM))
        room, width = store["capacity"], store["capacity"] if table is None else table["index"].shape[-1]
        must(0 <= room <= max(used, width), f"room for {room} tokens")


def _check_state(state: CacheState, decoder: PreTrainedModel) -> None:
    """Whether what was read fits together and to the model; what was saved does."""
    batch, heads = state.sequence.batch, decoder.config.num_key_value_heads
    for layer in state.layers:
        keys, values, index = layer.store.keys, layer.store.values, layer.index
        must((keys is None) == (index is None), "a layer without its keys")
        if keys is None or values is None or index is None:
            continue
        must(layer.store.rows_and_heads == (batch, heads), f"keys of the shape {tuple(keys.shape)}")
        must(layer.store.has_room(layer.held - layer.packed_rows), "fewer slots than tokens")
        slots = layer.store.packed + layer.slots
        must(index.shape[0] in (1, batch) and index.shape[1] in (1, heads), "the shape of an index")
        must(index.shape[2] >= layer.store.packed and slots <= layer.store.packed + layer.store.capacity, "slots")
        must(index.dtype == torch.int32 and layer.held.ndim == 2, "an index of another kind")
        must(len(layer.held) == batch and layer.held.shape[1] in (1, heads), "counts of other rows or heads")
        must(not index.numel() or int(index.max()) < state.sequence.seen, "tokens that were not seen")
    report_on(state)


def _place(layer: nn.Module, decoder: PreTrainedModel) -> torch.device:
    """Where a decoder layer computes."""
    device = next(layer.parameters()).device
    if device.type == "meta":  # accelerate brings its weights when they are needed
        device = torch.device(getattr(getattr(layer, "_hf_hook", None), "execution_device", None) or decoder.device)
    return device


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
