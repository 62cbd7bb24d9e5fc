"""A compressed cache comes from disk: nothing of a file is believed that is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.cache.manifest import MANIFEST, TENSORS, Manifest, name_of, read_manifest
from kvcompress.cache.plain import from_json, must
from kvcompress.cache.report import report_on
from kvcompress.cache.state import CacheState
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError, KVCompressError
from kvcompress.files import path_of, read_tensors
from kvcompress.policies.fingerprint import fingerprint_of

_ROOM = 1024  # slots
_WAY_OUT = "save the cache again, or make a new CompressedCache or Document and read the prompt again"


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
        folder = path_of(folder, "folder")
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
    manifest = read_manifest(folder, _WAY_OUT)
    try:
        return manifest, _read_tensors(folder, manifest)
    except ConfigError:
        again = read_manifest(folder, _WAY_OUT)  # somebody may have saved another one in between
        if again == manifest:
            raise
        return again, _read_tensors(folder, again)


def _read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    if not TENSORS.fullmatch(manifest.tensors):
        raise ConfigError(f"cache {folder}: {MANIFEST} names no file of tensors of kvcompress; {_WAY_OUT}")
    try:
        return read_tensors(folder / manifest.tensors, "cache", manifest.tensors_sha256)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_WAY_OUT}") from None


def _check_model(folder: Path, manifest: Manifest, decoder: PreTrainedModel) -> None:
    differences = manifest.model.differences(fingerprint_of(decoder))
    if not differences and manifest.dtype != name_of(decoder.dtype):
        differences = [f"dtype {manifest.dtype} instead of {name_of(decoder.dtype)}"]
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
