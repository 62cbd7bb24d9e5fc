"""Writing: a file is replaced whole or stays what it was, a line is appended whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from kvcompress.errors import ConfigError

OVERWRITE = "--overwrite replaces it, or give another file"


def write_text(path: Path, text: str, what: str = "output") -> None:
    """Replaces a file by a text in UTF-8, whole or not at all; see `replacing`.

    Raises:
        ConfigError: if it cannot be written, or the text holds what UTF-8 cannot (half a surrogate pair).
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{what} {path}: the text holds half a surrogate pair, which UTF-8 cannot hold") from None
    with replacing(path, what) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, what: str = "output") -> Iterator[BinaryIO]:
    """Gives a file to write to that takes the place of `path` once all of it is on disk.

    What is written goes to a temporary file in the same folder, which is synced to disk and renamed. Whatever goes
    wrong inside, Ctrl-C and a full disk included, leaves the old file as it was and removes the temporary one. Where
    `path` is a link, what it points at is replaced. A file that exists keeps its permissions.

    Args:
        path: the file to replace or make, in a folder that exists.
        what: what an error calls it, such as "profile".

    Yields:
        The temporary file, open for bytes.

    Raises:
        ConfigError: if it cannot be written; an `OSError` raised inside counts.
    """
    target = _target(path, what)
    temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.tmp")
    try:
        before = _regular(target)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                os.chmod(temporary, stat.S_IMODE(before.st_mode))
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise unwritable(path, error, what) from None


def make_folder(folder: Path, what: str = "output") -> None:
    """Makes a folder and those above it where they are missing.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise unwritable(folder, error, what) from None


def append_line(path: Path, line: bytes, what: str = "output") -> None:
    """Appends a line, whole or not at all: what a full disk took of it is cut off again.

    Args:
        path: the file; made where it is missing.
        line: its bytes, the line feed at the end included.
        what: what an error calls the file.

    Raises:
        ConfigError: if it cannot be written; the file is then what it was.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
            except BaseException:
                os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise unwritable(path, error, what) from None


def check_output(path: Path, what: str = "output", *, overwrite: bool = False) -> None:
    """Finds out before the work whether a file can be written after it; makes its folder, and touches nothing else.

    Args:
        path: the file.
        what: what an error calls it.
        overwrite: whether it may exist.

    Raises:
        ConfigError: if it cannot be written, or exists and may not.
    """
    target = _target(path, what)
    try:
        found = _regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        trial = target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.tmp")
        with open(trial, "xb"):
            pass
        trial.unlink()
    except OSError as error:
        raise unwritable(path, error, what) from None
    if found is not None and not overwrite:
        raise ConfigError(f"{what} {path}: exists already; {OVERWRITE}")


@contextmanager
def locked(path: Path, what: str = "output") -> Iterator[None]:
    """Keeps other processes, and other threads, from writing to a file by this function; the system frees it on a kill.

    The lock is a hidden file beside it, `.{name}.lock`, which stays and is empty.

    Args:
        path: the file, which need not exist; its folder must.
        what: what an error calls it.

    Raises:
        ConfigError: if somebody else holds it, or the folder cannot be written to.
    """
    target = _target(path, what)
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{what} {path}: another process is writing to it; wait until it has ended, or give another file"
        ) from None
    except OSError as error:
        raise unwritable(path, error, what) from None
    try:
        yield
    finally:
        lock.release()


def unwritable(path: Path, error: Exception, what: str = "output") -> ConfigError:
    """The error for a file that the system does not let us write."""
    return ConfigError(f"{what} {path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def _target(path: Path, what: str) -> Path:
    """The file itself, where a path is a link."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what the file system cannot encode
        raise unwritable(path, error, what) from None


def _regular(path: Path) -> os.stat_result | None:
    """What the system knows of a file; None if there is none.

    Raises:
        OSError: if it is a folder, a pipe or a device.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is no regular file")
    return found


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
