"""Files of users: written whole or not at all, one writer at a time, and read within limits."""

from __future__ import annotations

from kvcompress.files.pictures import open_picture, picture_path, read_picture
from kvcompress.files.reading import DIGITS, parse_json, parse_yaml, path_of, read_bytes, read_structure, read_text
from kvcompress.files.tensors import DTYPES, read_tensors, write_tensors
from kvcompress.files.writing import append_line, check_output, locked, make_folder, replacing, write_text

__all__ = [
    "DIGITS",
    "DTYPES",
    "append_line",
    "check_output",
    "locked",
    "make_folder",
    "open_picture",
    "parse_json",
    "parse_yaml",
    "path_of",
    "picture_path",
    "read_bytes",
    "read_picture",
    "read_structure",
    "read_tensors",
    "read_text",
    "replacing",
    "write_tensors",
    "write_text",
]
