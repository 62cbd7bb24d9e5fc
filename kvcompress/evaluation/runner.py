"""A grid of caches on the same samples: quality, memory and speed of each, with confidence intervals."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from kvcompress import __version__
from kvcompress.errors import BudgetWarning, ConfigError, UnsupportedModelError
from kvcompress.evaluation.data import Mode, Sample, check_mode, data_hash, load_samples
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.grid import Cell, Configurations, cells_of
from kvcompress.evaluation.measuring import Measure
from kvcompress.evaluation.metrics import METRICS, PERPLEXITY, check_metrics
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.overshoot import warn_of_overshoots
from kvcompress.evaluation.repetition import check_asked
from kvcompress.evaluation.results import ResultsFile, Row, writing_results
from kvcompress.evaluation.summary import summarise
from kvcompress.progress import progress_bar

_GATHERED = 8  # samples of each process between two exchanges with the others


@dataclass(frozen=True)
class Progress:
    """How far a grid is.

    Attributes:
        cell: the cache that is at work, or was finished.
        cells: all of them.
        done: samples that all cells together have behind them.
        total: samples of all cells together.
        measured: of those done, how many were measured now and not read from a file.
        row: the results of the cell, once it is finished.
        records: what new samples gave.
    """

    cell: Cell
    cells: Sequence[Cell]
    done: int
    total: int
    measured: int
    row: Row | None = None
    records: Sequence[Row] = ()


def evaluate(
    loaded: LoadedModel,
    data: str | Sequence[Sample],
    configs: Configurations = ("auto",),
    *,
    source: str | None = None,
    budgets: Sequence[float | int | str] = (),
    metrics: Iterable[str] | None = None,
    images: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    question: Mode = "seen",
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    progress: bool = False,
    processes: Processes | None = None,
) -> list[Row]:
    """Evaluates a model with every configuration at every budget, and with the full cache, on the same samples.

    Args:
        loaded: the model.
        data: what `load_samples` reads, or samples.
        configs: presets, files, dicts or `CompressionConfig`s, or a mapping from names to these.
        source: what results call the data; `data` itself, or "samples", if None.
        budgets: bare amounts; each configuration's own if there are none.
        metrics: names in `METRICS`; `default_metrics` if None.
        images: as in `load_samples`.
        limit: as in `load_samples`.
        max_new_tokens: most tokens of a generated answer, unless the data say so for a question.
        question: "seen": a cache is compressed once the whole prompt is read; "unseen": after the context (a document,
            an image or both), and questions that follow each other on one context are asked from one compressed copy.
        seed: of generated data, of what policies draw and of the confidence intervals.
        output: a .jsonl file; what it holds of the same run is not done again. None writes nothing.
        overwrite: whether to start over where the file exists.
        on_progress: is told how far the grid is, in the first process alone.
        progress: whether a bar on stderr shows it, likewise.
        processes: those that share the work; None for what `accelerate launch` started.

    Returns:
        A row for each cell, the full cache's first, in the order of the grid; the same in every process. One
        `BudgetWarning` names those that held more than their budget, in tokens.

    Raises:
        ConfigError: if data, a configuration, a metric or the output is wrong, a question that is to be unseen has no
            context, one that is to be seen a scorer that wants a repetition, or no sample could be evaluated.
        UnsupportedModelError: if there are images and the model sees none.
        MissingDependencyError: if a metric needs a package that is not installed.
    """
    processes = Processes.current() if processes is None else processes
    cells = cells_of(configs, budgets)
    if source is None:
        source = data if isinstance(data, str) else "samples"
    samples = load_samples(data, images=images, limit=limit, seed=seed) if isinstance(data, str) else list(data)
    if not samples:
        raise ConfigError("data: holds no samples")
    wanted = check_metrics(default_metrics(samples) if metrics is None else metrics)
    if any(sample.has_image for sample in samples) and not loaded.sees_images:
        raise UnsupportedModelError(
            f"data '{source}': has images, but '{loaded.name}' is a text model ({loaded.model.config.model_type}); "
            "choose a LLaVA model (llava, llava_next)"
        )
    check_mode(question, samples)
    check_asked(question, {cell.name: cell.config for cell in cells if cell.config is not None})
    run = _run(loaded, source, samples, wanted, max_new_tokens, question, seed)
    if len(set(processes.gather([run["data_hash"]]))) > 1:
        raise ConfigError(f"data '{source}': the processes read different samples; give all of them the same files")
    path = None if output is None else Path(output)
    if path is not None and isinstance(data, str) and path.exists() and Path(data).exists() and path.samefile(data):
        raise ConfigError(f"output {path}: is the file of the data; give another file")
    measure, total = Measure(wanted, max_new_tokens, seed, question), len(cells) * len(samples)
    with ExitStack() as held:
        tell = held.enter_context(progress_bar(progress and processes.first, "samples", total))

        def told(now: Progress) -> None:
            tell(now.done, label=now.cell.name)
            if on_progress is not None:
                on_progress(now)

        grid = _Grid(loaded, samples, cells, measure, run, processes, told)

        def begin() -> ResultsFile:
            held.enter_context(writing_results(path))
            return ResultsFile(path, run, overwrite=overwrite)

        return grid.work(processes.from_first(begin))


def default_metrics(samples: Sequence[Sample]) -> list[str]:
    """What is measured where nothing is asked for.

    The perplexity of the answers where all samples have one, ROUGE-L against the full cache's text, exact answers for
    scenes, and recall of needles.
    """
    kinds = {sample.kind for sample in samples}
    found = [PERPLEXITY] if all((sample.answer or "").strip() for sample in samples) else []
    if kinds == {"needle"}:
        return [*found, "recall"]
    drawn = all(sample.picture is not None for sample in samples)
    return [*found, "rougeL", *(["exact"] if drawn and found else [])]


class _Grid:
    def __init__(
        self,
        loaded: LoadedModel,
        samples: list[Sample],
        cells: list[Cell],
        measure: Measure,
        run: Row,
        processes: Processes,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.loaded, self.samples, self.cells, self.measure = loaded, samples, cells, measure
        self.run, self.processes, self.on_progress = run, processes, on_progress
        self.done = self.measured = 0

    def work(self, file: ResultsFile) -> list[Row]:
        """Every cell that the file does not hold yet."""
        finished = {row["cell"]: row for row in file.rows}
        for cell in self.cells:
            given = finished.get(cell.name, {}).get("config")
            if cell.name in finished and given != _config(cell):
                raise ConfigError(
                    f"output: its '{cell.name}' is of another configuration; --overwrite (overwrite=True) starts over, "
                    "or give another file"
                )
        rows = []
        reference = file.records.get(self.cells[0].name, {})
        for cell in self.cells:
            row = finished.get(cell.name)
            if row is None:
                records = self._records(cell, reference, file)
                if cell.config is None:
                    reference = records
                row = self._row(cell, records)
                if self.processes.first:
                    file.add_row(row)
            else:
                self.done += len(self.samples)
            rows.append(row)
            self._tell(cell, row=row)
        if self.processes.first:
            warn_of_overshoots(rows)
        return rows

    def _records(self, cell: Cell, reference: dict[str, Row], file: ResultsFile) -> dict[str, Row]:
        """What every sample gave with one cache, from the file where it is there."""
        known = file.records.get(cell.name, {})
        missing = [sample for sample in self.samples if sample.name not in known]
        found = {sample.name: known[sample.name] for sample in self.samples if sample.name in known}
        self.done += len(found)
        size = 1 if self.processes.count == 1 else _GATHERED * self.processes.count
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            mine = [
                {"cell": cell.name, "sample": sample.name, **self._measured(cell, sample, reference)}
                for sample in self.processes.mine(part)
            ]
            records = self.processes.gather(mine)
            for record in records:
                found[record["sample"]] = record
                if self.processes.first:
                    file.add_record(cell.name, record)
            self.done, self.measured = self.done + len(part), self.measured + len(part)
            self._tell(cell, records=records)
        return found

    def _measured(self, cell: Cell, sample: Sample, reference: dict[str, Row]) -> Row:
        known = reference.get(sample.name, {})
        if "skipped" in known:
            return {"skipped": known["skipped"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)  # one at the end tells what each cache held
            return self.measure(self.loaded, sample, cell.config, known.get("text"))

    def _row(self, cell: Cell, records: dict[str, Row]) -> Row:
        # in the order of the samples, whatever order they were measured in: sums of floats depend on it
        ordered = [records[sample.name] for sample in self.samples]
        used = [record for record in ordered if "skipped" not in record]
        if not used:
            raise ConfigError(
                f"data: none of {len(ordered)} samples could be evaluated with {cell.name}; the first, "
                f"'{ordered[0]['sample']}': {ordered[0]['skipped']}"
            )
        skipped = [{"sample": r["sample"], "reason": r["skipped"]} for r in ordered if "skipped" in r]
        return {
            "cell": cell.name,
            "policy": cell.policy,
            "budget": cell.budget,
            "budget_unit": cell.unit,
            **{name: value for name, value in self.run.items() if name != "metrics"},
            "samples": len(used),
            "skipped": len(skipped),
            "skipped_samples": skipped,
            **summarise(used, self.run["metrics"], self.run["seed"]),
            "config": _config(cell),
        }

    def _tell(self, cell: Cell, *, row: Row | None = None, records: Sequence[Row] = ()) -> None:
        if self.on_progress is not None and self.processes.first:
            total = len(self.cells) * len(self.samples)
            self.on_progress(Progress(cell, self.cells, self.done, total, self.measured, row, records))


def _config(cell: Cell) -> Row | None:
    return None if cell.config is None else cell.config.model_dump(mode="json")


def _run(
    loaded: LoadedModel,
    source: str,
    samples: list[Sample],
    metrics: list[str],
    max_new_tokens: int,
    question: Mode,
    seed: int,
) -> Row:
    """What two runs must share for the results of one to stand beside those of the other."""
    return {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "data": source,
        "data_hash": data_hash(samples),
        "metrics": metrics,
        "max_new_tokens": max_new_tokens if any(METRICS[name].reads_text for name in metrics) else None,
        "question": question,
        "seed": seed,
        "versions": {
            "kvcompress": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
