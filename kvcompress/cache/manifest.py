"""What a saved cache says of itself: the manifest beside its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kvcompress.errors import ConfigError
from kvcompress.files import parse_json, read_text
from kvcompress.policies.configured import Configured
from kvcompress.policies.fingerprint import Fingerprint

MANIFEST = "cache.json"
FORMAT = 1
TENSORS = re.compile(r"cache-[0-9a-f]{16}\.safetensors")  # names of the file with the tensors
_BYTES = 64 * 2**20  # of the manifest


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


def read_manifest(folder: Path, way_out: str) -> Manifest:
    """The manifest in a folder, whole as it was written.

    Args:
        folder: where it is.
        way_out: how errors end.

    Raises:
        ConfigError: if there is none, or one that is damaged or of another release.
    """
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


def name_of(dtype: torch.dtype) -> str:
    """What a manifest calls a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
