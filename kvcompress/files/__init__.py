"""Files of users: written whole or not at all, one writer at a time, and read within limits."""

from __future__ import annotations

from kvcompress.files.writing import append_line, check_output, locked, replacing, write_text

__all__ = ["append_line", "check_output", "locked", "replacing", "write_text"]
