"""Results on disk: a line for each finished cell of a grid, beside it a line for each sample, safe against kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError

Row = dict[str, Any]
TIMED = ("seconds_to_first_token", "tokens_per_second", "peak_bytes")  # what differs from run to run
_WAY_OUT = "--overwrite (overwrite=True) starts over, or give another file"


def read_results(path: str | Path) -> list[Row]:
    """The finished cells in a results file, in the order in which they were run; a torn last line does not count.

    Raises:
        ConfigError: if the file cannot be read or is no results file.
    """
    rows = _lines(Path(path), "results")
    if not all("policy" in row and "metrics" in row for row in rows):
        raise ConfigError(f"results {path}: is no file of results")
    return rows


def read_samples(path: str | Path) -> list[Row]:
    """What each sample gave in each cell, from the file beside a results file.

    Raises:
        ConfigError: if it cannot be read.
    """
    return [line for line in _lines(samples_path(Path(path)), "samples") if "run" not in line]


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

    Every line is written at once and handed to the system, so that a kill can tear the last line alone; opening cuts
    that off, and what is left is taken as done.
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
        check_writable(path)
        beside = samples_path(path)
        if overwrite:
            for file in (path, beside):
                file.unlink(missing_ok=True)
        self._resume(path, beside, run)

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
        for file in (path, beside):
            _cut_torn_line(file)
        self.rows = read_results(path) if path.exists() else []
        lines = _lines(beside, "samples") if beside.exists() else []
        if not lines:
            if self.rows:
                raise ConfigError(f"output {path}: {beside.name}, which belongs to it, is missing; {_WAY_OUT}")
            _append(beside, {"run": run})
            return
        before = lines[0].get("run")
        if not isinstance(before, dict):
            raise ConfigError(f"output {path}: {beside.name} is no file of samples; {_WAY_OUT}")
        other = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        if other:
            changes = ", ".join(f"{name} was {_short(before.get(name))}, is {_short(run.get(name))}" for name in other)
            raise ConfigError(f"output {path}: belongs to another run: {changes}; {_WAY_OUT}")
        for record in lines[1:]:
            self.records.setdefault(record["cell"], {})[record["sample"]] = record


def check_writable(path: Path) -> None:
    """Makes the folder of a file.

    Raises:
        ConfigError: if that or the file cannot be written.
    """
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _append(path: Path, line: Row) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def _lines(path: Path, kind: str) -> list[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{kind} {path}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
        if not isinstance(found[-1], dict):
            raise ConfigError(f"{kind} {path}: line {number} is no JSON object")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output {path}: cannot be written: {error.strerror or error}")
