"""Results on disk: a line for each finished cell of a grid, beside it a line for each sample, safe against kills."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError, shown
from kvcompress.evaluation.lines import check_cell, check_sample
from kvcompress.files import append_line, check_output, locked, parse_json, read_bytes
from kvcompress.files.reading import DATA_BYTES

Row = dict[str, Any]
TIMED = ("seconds_to_first_token", "tokens_per_second", "peak_bytes")  # what differs from run to run
_WAY_OUT = "--overwrite (overwrite=True) starts over, or give another file"
_CELL, _RUN = b'{"cell": "', b'{"run": {'  # how our lines begin


def read_results(path: str | Path) -> list[Row]:
    """The finished cells in a results file, in the order in which they were run; a torn last line does not count.

    Raises:
        ConfigError: if the file cannot be read, is no results file, or two runs wrote to it at once.
    """
    return _cells(Path(path), _Lines(Path(path), "results"))


def read_samples(path: str | Path) -> list[Row]:
    """What each sample gave in each cell, from the file beside a results file.

    Raises:
        ConfigError: if it cannot be read, is no file of samples, or two runs wrote to it at once.
    """
    beside = samples_path(Path(path))
    return _samples(beside, _Lines(beside, "samples"))[1]


def samples_path(path: Path) -> Path:
    """Where the lines of samples are: `grid.jsonl` has `grid.samples.jsonl` beside it."""
    return path.with_suffix(f".samples{path.suffix}")


def without_timings(row: Row) -> Row:
    """A row or a sample's line without what differs from run to run."""
    kept = {name: value for name, value in row.items() if name not in TIMED}
    if "ci" in kept:
        kept["ci"] = {name: bounds for name, bounds in kept["ci"].items() if name not in TIMED}
    return kept


class ResultsFile:
    """The two files of a run: `path` with cells, `samples_path(path)` with a first line on the run and then samples.

    Every line is appended at once, whole or not at all, so that a kill can tear the last line alone; opening cuts that
    off, and what is left is taken as done. Files are looked through before anything in them is changed. Hold
    `writing_results(path)` for as long as lines are added.
    """

    def __init__(self, path: Path | None, run: Row, *, overwrite: bool = False) -> None:
        """Opens or begins the files; None keeps everything in memory alone.

        Raises:
            ConfigError: if they cannot be written, are no results, or belong to a run with other settings or data.
        """
        self.rows: list[Row] = []
        self.records: dict[str, dict[str, Row]] = {}  # by cell, then by sample
        self._path = path
        if path is None:
            return
        check_results_file(path, overwrite=overwrite)
        if overwrite:
            for file in (samples_path(path), path):
                file.unlink(missing_ok=True)
        self._resume(path, samples_path(path), run)

    def add_record(self, cell: str, record: Row) -> None:
        """Writes what a sample gave."""
        self.records.setdefault(cell, {})[record["sample"]] = record
        if self._path is not None:
            _append(samples_path(self._path), record)

    def add_row(self, row: Row) -> None:
        """Writes a finished cell."""
        self.rows.append(row)
        if self._path is not None:
            _append(self._path, row)

    def _resume(self, path: Path, beside: Path, run: Row) -> None:
        cells, samples = _Lines(path, "output"), _Lines(beside, "output")
        self.rows = _cells(path, cells)
        before, records = _samples(beside, samples)
        if before is not None:
            before = {"question": "seen", **before}  # which nothing else was once
            other = [name for name in {**before, **run} if before.get(name) != run.get(name)]
            if other:
                changes = ", ".join(
                    f"{name} was {_short(before.get(name))}, is {_short(run.get(name))}" for name in other
                )
                raise ConfigError(f"output {path}: belongs to another run: {changes}; {_WAY_OUT}")
        for number, record in enumerate(records, 2):
            check_sample(record, f"output {beside}: line {number}", run.get("metrics", ()))
            self.records.setdefault(record["cell"], {})[record["sample"]] = record
        for lines in (cells, samples):
            lines.cut_torn_end()
        if before is None:
            _append(beside, {"run": run})


@contextmanager
def writing_results(path: Path | None) -> Iterator[None]:
    """Keeps every other run from writing to a results file; None does nothing.

    Raises:
        ConfigError: if another run writes to it, or the place cannot be written to.
    """
    if path is None:
        yield
        return
    check_output(path, overwrite=True)
    with locked(path):
        yield


def check_results_file(path: Path, *, overwrite: bool = False) -> None:
    """Finds out whether results can be written to a file; makes its folder, and changes nothing else.

    Args:
        path: of the cells.
        overwrite: whether the file itself may be anything; what lies in the way beside it may not.

    Raises:
        ConfigError: if its name does not end in .jsonl, it cannot be written, or it or the file beside it are no
            results.
    """
    if path.suffix != ".jsonl":
        raise ConfigError(f"output {path}: results are written as lines of JSON; the file name must end in .jsonl")
    beside = samples_path(path)
    for file in (path, beside):
        check_output(file, overwrite=True)
    before, _ = _samples(beside, _Lines(beside, "output"))
    if overwrite:
        return
    held = _Lines(path, "output")
    if (_cells(path, held) or held.torn) and before is None:
        raise ConfigError(f"output {path}: {beside.name}, which belongs to it, is missing; {_WAY_OUT}")


class _Lines:
    """The lines of a file: the whole ones, and what a kill left of one more. A file that is missing has none."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self.kind = path, kind
        content = read_bytes(path, kind, DATA_BYTES) if kind != "output" or os.path.exists(path) else b""
        whole = content.rfind(b"\n") + 1
        self.torn, self._length, self.found = content[whole:], whole, []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            where = f"{kind} {path}: line {number}"
            try:
                row = parse_json(line.decode("utf-8"), where)
            except ValueError:  # ConfigError and UnicodeDecodeError
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is no JSON object{self.way_out}")
            self.found.append(row)

    @property
    def way_out(self) -> str:
        """What an error adds where the file was to be written."""
        return f"; {_WAY_OUT}" if self.kind == "output" else ""

    def check_torn_end(self, *begins: bytes) -> None:
        """Raises ConfigError unless the torn line begins as one of ours does."""
        if not any(self.torn[: len(one)] == one[: len(self.torn)] for one in begins):
            raise ConfigError(
                f"{self.kind} {self._path}: is no file of results: its last line, which no line feed ends, is not one "
                f"that a killed run left{self.way_out}"
            )

    def cut_torn_end(self) -> None:
        """Cuts off what a kill left of a line."""
        if self.torn:
            try:
                os.truncate(self._path, self._length)
            except OSError as error:
                raise ConfigError(f"output {self._path}: cannot be written: {error.strerror or error}") from None


def _cells(path: Path, lines: _Lines) -> list[Row]:
    lines.check_torn_end(_CELL)
    names: set[str] = set()
    for number, row in enumerate(lines.found, 1):
        where = f"{lines.kind} {path}"
        check_cell(row, f"{where}: is no file of results: line {number}", lines.way_out)
        _check_single(row["cell"], names, f"{where}: line {number}", lines.way_out)
    return lines.found


def _samples(path: Path, lines: _Lines) -> tuple[Row | None, list[Row]]:
    """What the first line says of the run, None for an empty file, and the samples."""
    lines.check_torn_end(*([_CELL] if lines.found else [_RUN]))
    if not lines.found:
        return None, []
    where, run = f"{lines.kind} {path}", lines.found[0].get("run")
    if not isinstance(run, dict):
        raise ConfigError(f"{where}: {path.name} is no file of samples{lines.way_out}")
    names: set[tuple[str, str]] = set()
    for number, record in enumerate(lines.found[1:], 2):
        if "run" in record:
            raise _written_by_two(f"{where}: line {number}", "begins another run", lines.way_out)
        check_sample(record, f"{where}: line {number}")
        _check_single((record["cell"], record["sample"]), names, f"{where}: line {number}", lines.way_out)
    return run, lines.found[1:]


def _check_single(name: Any, names: set[Any], where: str, way_out: str) -> None:
    if name in names:
        raise _written_by_two(where, f"is about {shown(name)} a second time", way_out)
    names.add(name)


def _written_by_two(where: str, what: str, way_out: str) -> ConfigError:
    return ConfigError(f"{where} {what}: two runs wrote to the file at the same time{way_out or f'; {_WAY_OUT}'}")


def _append(path: Path, line: Row) -> None:
    append_line(path, json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
