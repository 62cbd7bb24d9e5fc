"""Files: what is written replaces the old file whole or not at all, whatever goes wrong, and one writer at a time."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kvcompress import CompressionConfig
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import ConfigError
from kvcompress.evaluation.conversations import Conversation, write_conversations
from kvcompress.evaluation.plots import save
from kvcompress.files import append_line, check_output, locked, replacing, write_text

OLD = b"Drawn by kvcompress before\n"
Writer = Callable[[Path], Any]
PROFILE = LayerProfile(budgets=[0.5], retention=[[0.5] * 200])
WRITERS: dict[str, tuple[str, Writer]] = {
    "config": ("file.yaml", CompressionConfig.preset("prefixkv").dump),
    "config-json": ("file.json", CompressionConfig.preset("prefixkv").dump),
    "profile": ("file.json", PROFILE.dump),
    "profile-yaml": ("file.yaml", PROFILE.dump),
    "picture": ("file.png", lambda path: save(Figure(), path)),
    "drawing": ("file.svg", lambda path: save(Figure(), path)),
    "conversations": ("file.json", lambda path: write_conversations(path, [Conversation("a", None, (("b", "c"),))])),
    "text": ("file.txt", lambda path: write_text(path, "new" * 50_000)),
}
EVERY_WRITER = pytest.mark.parametrize("name", WRITERS)


def prepared(folder: Path, name: str) -> tuple[Path, Writer]:
    file, write = WRITERS[name]
    path = folder / file
    path.write_bytes(OLD)
    return path, write


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- whole or not at all -----------------------------------------------------------------------------------------------


@EVERY_WRITER
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    path, write = prepared(tmp_path, name)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        write(path)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == [path.name]


@EVERY_WRITER
def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, write = prepared(tmp_path, name)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == [path.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a file system")
@pytest.mark.parametrize("name", ["config", "profile", "profile-yaml", "picture", "text"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(small_disk: Path, name: str) -> None:
    path, write = prepared(small_disk, name)
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        file.write(b"\0" * 65536)
    held = set(os.listdir(small_disk))
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        write(path)
    assert path.read_bytes() == OLD and set(os.listdir(small_disk)) == held


@EVERY_WRITER
def test_what_is_replaced_keeps_its_permissions_and_the_link_to_it(tmp_path: Path, name: str) -> None:
    path, write = prepared(tmp_path, name)
    path.chmod(0o640)
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(path.name)
    write(link)
    assert link.is_symlink() and path.read_bytes() != OLD and path.stat().st_mode & 0o777 == 0o640


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new.txt", "a")
    finally:
        os.umask(before)
    assert (tmp_path / "new.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "NUL", "surrogate", "below a file", "long"])
def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    path = {
        "device": Path("/dev/full"),
        "NUL": tmp_path / "a\0b",
        "surrogate": tmp_path / "a\ud800b",
        "below a file": tmp_path / "file" / "deeper",
        "long": tmp_path / ("a" * 300),
    }.get(kind, tmp_path / kind)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    (tmp_path / "file").touch()
    held = os.listdir(tmp_path)
    for attempt in (lambda: write_text(path, "a"), lambda: check_output(path, overwrite=True)):
        with pytest.raises(ConfigError, match="cannot be written"):
            attempt()
    assert os.listdir(tmp_path) == held


def test_what_the_writer_raises_comes_out_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        write_text(path, "\ud800")
    assert path.read_bytes() == OLD


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_line_that_the_disk_takes_in_part_is_cut_off_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    path, write, calls = tmp_path / "lines", os.write, []
    append_line(path, b"first\n")

    def short(handle: int, data: Any) -> int:
        calls.append(data)
        if len(calls) > taken:
            full()
        return write(handle, bytes(data[:1]))

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        append_line(path, b"second line\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"first\n"
    append_line(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


def test_a_line_that_the_system_takes_in_parts_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:3])))
    append_line(tmp_path / "lines", b"in parts\n")
    monkeypatch.undo()
    assert (tmp_path / "lines").read_bytes() == b"in parts\n"


# -- before the work ---------------------------------------------------------------------------------------------------


def test_a_check_before_the_work_changes_nothing(tmp_path: Path) -> None:
    path, dangling = tmp_path / "file.json", tmp_path / "dangling.json"
    path.write_bytes(OLD)
    dangling.symlink_to("nowhere.json")
    check_output(path, overwrite=True)
    check_output(dangling)
    check_output(tmp_path / "deep/new.json")
    with pytest.raises(ConfigError, match=r"file\.json: exists already; --overwrite"):
        check_output(path)
    assert path.read_bytes() == OLD and dangling.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling.json", "deep", "file.json"] and not os.listdir(tmp_path / "deep")


def test_a_file_has_one_writer_at_a_time_whatever_name_it_goes_by(tmp_path: Path) -> None:
    path, link = tmp_path / "lines", tmp_path / "link"
    link.symlink_to(path.name)
    with locked(path):
        for other in (path, link):
            with pytest.raises(ConfigError, match="another process is writing to it"), locked(other):
                pass
    with locked(link):
        pass
