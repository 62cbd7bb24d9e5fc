"""Tensors on disk: safetensors, written as a stream and read only where a checksum is right."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvcompress.errors import ConfigError

DTYPES = {  # that a file can hold, by what it calls them
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_AT_ONCE = 2**22  # bytes


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
    """Writes tensors in the format of safetensors, one at a time, from whatever device they are on.

    Returns:
        SHA-256 of what was written, in hexadecimal.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)
    file.write(begin)
    for tensor in tensors.values():
        whole = tensor.detach().cpu().contiguous()
        content = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
        file.write(content)
        digest.update(content)
    return digest.hexdigest()


def read_tensors(path: Path, what: str, sha256: str) -> dict[str, Tensor]:
    """Reads what `write_tensors` wrote, into CPU memory.

    Args:
        path: the file.
        what: what an error calls it.
        sha256: what `write_tensors` returned.

    Raises:
        ConfigError: if it cannot be read, or holds anything else.
    """
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{what} {path}: cannot be read: it is no regular file")
        with open(path, "rb") as file:
            while content := file.read(_AT_ONCE):
                digest.update(content)
        if digest.hexdigest() != sha256:
            raise ConfigError(f"{what} {path}: is damaged: it does not hold what was written to it")
        with safe_open(path, framework="pt") as found:
            return {name: found.get_tensor(name).clone() for name in found.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
