"""Files that commands write at the end of their work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcompress.errors import ConfigError

FORMATS = (".json", ".yaml", ".yml")


def check_writable(option: str, path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Finds out whether a file can be written before the work is done rather than after it; leaves it as it is.

    Raises:
        ConfigError: if the name ends in none of the formats, or the file cannot be written.
    """
    if path.suffix not in formats:
        raise ConfigError(f"{option} {path}: the file name must end in one of {', '.join(formats)}")
    known = path.exists()
    try:
        with path.open("a"):
            pass
        if not known:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror or error}") from None
