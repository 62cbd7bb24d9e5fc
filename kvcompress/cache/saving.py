"""A compressed cache goes to disk: its tensors in safetensors, what they mean in JSON, and nothing that runs code."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.manifest import FORMAT, MANIFEST, TENSORS, Manifest, name_of, read_manifest
from kvcompress.cache.plain import check_extra, to_json
from kvcompress.cache.state import CacheState
from kvcompress.cache.tables import catch_up_if_needed
from kvcompress.config import CompressionConfig
from kvcompress.errors import CacheStateError, ConfigError, KVCompressError, UnsupportedModeError
from kvcompress.files import locked, make_folder, path_of, replacing, write_tensors, write_text
from kvcompress.parallel import ALONE
from kvcompress.policies.fingerprint import fingerprint_of


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
    folder = path_of(folder, "folder")
    manifest_path = folder / MANIFEST
    check_extra(extra)  # which refuses before anything is made, and so does the next
    whole = _whole(cache)
    make_folder(folder, "cache")
    with locked(manifest_path, "cache"):
        before = None
        if manifest_path.exists():
            before = read_manifest(folder, "only a folder with a saved cache is overwritten; give another one")
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
                "dtype": name_of(model.dtype),
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
        if before is not None and TENSORS.fullmatch(before.tensors):
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
