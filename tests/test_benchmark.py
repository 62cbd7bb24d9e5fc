"""A benchmark pairs what it compares, counts what caches hold, and says what it did; no test looks at a time."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache
from typer.testing import CliRunner, Result

from benchmarks import reducers
from kvcompress import REDUCERS, CompressedCache, CompressionConfig
from kvcompress.cli import app
from kvcompress.errors import ConfigError
from kvcompress.evaluation import LoadedModel, benchmark, contestants, timing
from kvcompress.evaluation.benchmark import rounds_of, text_rows, weight_bytes
from kvcompress.evaluation.contestants import REFERENCES
from kvcompress.evaluation.measurement import Measurement, Spread
from kvcompress.evaluation.memory import held_bytes, peak_of
from tests import checkpoints, tiny

CPU = torch.device("cpu")
FIFTH = CompressionConfig.preset("prefixkv", budget=0.2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel("tiny", checkpoints.text_model(), checkpoints.text_tokenizer())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_text(tmp_path_factory.mktemp("text"))


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def measure(loaded: LoadedModel, *configs: tuple[str, CompressionConfig], **given: Any) -> list[Measurement]:
    return list(benchmark.benchmark(loaded, configs, **{"rounds": 1, "new_tokens": 2, "prompt_tokens": [50], **given}))


# -- what is measured --------------------------------------------------------------------------------------------------


def test_every_length_and_batch_has_the_references_and_every_configuration(loaded: LoadedModel) -> None:
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    given: dict[str, Any] = {"prompt_tokens": [20, 50], "batches": [1, 3], "rounds": 2, "on_round": count}
    found = measure(loaded, ("prefixkv", FIFTH), ("mine", CompressionConfig.preset("snapkv", budget=40)), **given)
    cells = [(tokens, batch) for tokens in (20, 50) for batch in (1, 3)]
    policies = [*REFERENCES, "prefixkv", "mine"]
    assert [(m.prompt_tokens, m.batch, m.policy) for m in found] == [(*cell, p) for cell in cells for p in policies]
    assert [(m.budget, m.budget_unit) for m in found[2:5]] == [(None, None), (0.2, "fraction"), (40, "tokens")]
    assert rounds == rounds_of(2, 2, 2, 2) == 60
    for measurement in found:
        assert measurement.note is None
        for spread in (measurement.seconds_to_first_token, measurement.seconds_per_token):
            assert spread is not None and 0 < spread.low <= spread.median <= spread.high
        assert (measurement.first_token_ratio == measurement.per_token_ratio == 1.0) == (
            measurement.policy == "DynamicCache"
        )


def test_the_bytes_held_are_those_of_the_tensors(loaded: LoadedModel) -> None:
    dynamic, quantized, floor, fifth = measure(loaded, ("prefixkv", FIFTH), batches=[2])
    slot = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, float32
    assert dynamic.held_bytes == 2 * 52 * slot  # the last token chosen is never read
    assert floor.held_bytes is None and floor.largest_batch is None
    assert dynamic.held_bytes is not None and quantized.held_bytes is not None and fifth.held_bytes is not None
    assert quantized.held_bytes < 0.5 * dynamic.held_bytes
    assert 0.2 * dynamic.held_bytes < fifth.held_bytes < 0.5 * dynamic.held_bytes


def test_held_bytes_of_a_quantized_cache_count_codes_scales_and_the_rest(loaded: LoadedModel) -> None:
    config = loaded.model.config
    cache = QuantizedCache("quanto", config, nbits=4, q_group_size=16, residual_length=128)
    with torch.inference_mode():
        loaded.model(tiny.token_ids(1, 64, seed=0), **tiny.with_cache(cache))
    codes = 3 * 2 * 64 * 2 * 8 // 2  # layers, keys and values, tokens, heads, head_dim; half a byte each
    numbers = 3 * 2 * 64 * 2 * 8 // 16 * 2 * 4  # a scale and a shift in float32 for each group of 16
    assert held_bytes(cache) == codes + numbers


def test_held_bytes_of_a_compressed_cache_are_those_of_its_report(loaded: LoadedModel) -> None:
    cache = CompressedCache(loaded.model, FIFTH)
    with torch.inference_mode():
        loaded.model(tiny.token_ids(1, 64, seed=0), **tiny.with_cache(cache))
        report = cache.report()
        assert held_bytes(cache) == report.kv_bytes + report.index_bytes
    assert held_bytes(DynamicCache()) == 0


def test_the_largest_batch_is_what_the_limit_leaves_over_the_bytes_of_a_row(loaded: LoadedModel) -> None:
    weights, limit = weight_bytes(loaded.model), 10_000_000
    dynamic, *_, fifth = measure(loaded, ("prefixkv", FIFTH), batches=[2], memory_limit=limit)
    for measurement in (dynamic, fifth):
        assert measurement.row_bytes == -(-(measurement.held_bytes or 0) // 2)
        assert measurement.largest_batch == (limit - weights) // measurement.row_bytes
    assert (fifth.largest_batch or 0) > 2 * (dynamic.largest_batch or 0)
    assert measure(loaded, memory_limit=1000)[0].largest_batch == 0  # not even the weights fit
    assert measure(loaded)[0].largest_batch is None


def test_steps_take_turns_and_one_caches_step_follows_the_others(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[str]] = []
    in_turns = timing.in_turns

    def watched(runs: dict[str, Any], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
        order: list[str] = []

        def noted(name: str) -> Any:
            return lambda: (order.append(name), runs[name]())[1]

        times = in_turns({name: noted(name) for name in runs}, rounds, warm_up)
        turns.append(order)
        return times

    monkeypatch.setattr(benchmark, "in_turns", watched)
    measure(loaded, ("prefixkv", FIFTH), rounds=2, new_tokens=3)
    assert turns == [["0", "1", "2", "3"] * 4] * 2


def test_ratios_are_those_of_the_same_turn(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine twice as slow in every other step shows in the spread, not in the ratio.
    seconds = {"0": [1.0, 2.0, 1.0, 2.0], "1": [3.0, 6.0, 3.0, 6.0]}
    monkeypatch.setattr(benchmark, "in_turns", lambda runs, *rest, **given: {name: seconds[name] for name in runs})
    base, fifth = measure(loaded, ("prefixkv", FIFTH), new_tokens=3, references=["DynamicCache"])
    assert fifth.per_token_ratio == fifth.first_token_ratio == 3.0
    assert base.seconds_per_token == Spread(2.0, 1.5, 2.0)
    assert fifth.tokens_per_second is not None and fifth.tokens_per_second.median == pytest.approx(1 / 6)


def test_what_runs_out_of_memory_is_noted_and_the_others_run_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **given: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(contestants, "QuantizedCache", no_room)
    dynamic, quantized, *_ = measure(loaded, ("prefixkv", FIFTH))
    assert quantized == Measurement("QuantizedCache", None, None, 50, 1, note="out of memory")
    assert dynamic.note is None and dynamic.seconds_per_token is not None


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes optimum-quanto's extension one that is not compiled and cannot be; tells where it would be."""
    import optimum.quanto.library.extensions as extensions
    from optimum.quanto.library.extensions import extension

    def fail(*args: object, **given: object) -> None:
        raise RuntimeError("Error building extension 'quanto_cpp':\n[1/3] c++\n" + "/bin/sh: c++: not found\n" * 100)

    for kind in ("cpp", "cuda"):
        if extension.is_extension_available(f"quanto_{kind}"):
            monkeypatch.setattr(extension.get_extension(f"quanto_{kind}"), "_lib", None)
            monkeypatch.setattr(extension.get_extension(f"quanto_{kind}"), "build_directory", str(tmp_path))
    monkeypatch.setattr(extension, "load", fail)
    monkeypatch.setattr(extensions, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path / "cpp" / "build"


def test_a_reference_that_cannot_be_compiled_is_noted_once_and_the_others_run_on(
    loaded: LoadedModel, no_compiler: Path
) -> None:
    waits: list[str] = []
    found = measure(loaded, ("prefixkv", FIFTH), prompt_tokens=[20, 30], on_wait=waits.append)
    notes = [measurement.note for measurement in found if measurement.policy == "QuantizedCache"]
    assert len(notes) == 2 and notes[0] == notes[1] and len(notes[0] or "") < 400
    assert (notes[0] or "").startswith("unavailable: optimum-quanto's extension cannot be compiled (RuntimeError: ")
    assert [m.note for m in found if m.policy != "QuantizedCache"] == [None] * 6
    assert waits == ["compiling optimum-quanto's extension for QuantizedCache, a minute or two, this once"]


def test_a_lock_that_a_killed_compiler_left_is_named(loaded: LoadedModel, no_compiler: Path) -> None:
    no_compiler.mkdir(parents=True)
    (no_compiler / "lock").touch()
    waits: list[str] = []
    measure(loaded, references=["QuantizedCache"], on_wait=waits.append)
    assert len(waits) == 1 and waits[0].endswith(f"if none does, because it was killed, delete {no_compiler / 'lock'}")


def test_a_reference_that_the_model_cannot_have_is_noted_and_the_others_run_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*args: object, **given: object) -> None:
        raise ValueError("heads of 7 numbers")

    monkeypatch.setattr(benchmark, "prepare_extension", lambda *given: None)
    monkeypatch.setattr(contestants, "QuantizedCache", odd)
    _, quantized, *_ = measure(loaded, ("prefixkv", FIFTH))
    assert quantized.note == "unavailable: ValueError: heads of 7 numbers"
    monkeypatch.setattr(contestants, "DynamicCache", odd)  # without which nothing runs
    with pytest.raises(ValueError, match="heads of 7"):
        measure(loaded)


def test_without_the_base_there_are_no_ratios(loaded: LoadedModel) -> None:
    (fifth,) = measure(loaded, ("prefixkv", FIFTH), references=[])
    assert fifth.first_token_ratio is None and fifth.per_token_ratio is None and fifth.seconds_per_token is not None


def test_rows_of_a_batch_are_different_text(loaded: LoadedModel) -> None:
    rows = text_rows(loaded, 3, 40)
    assert rows.shape == (3, 40) and len({tuple(row) for row in rows.tolist()}) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt_tokens": []}, "prompt_tokens: must be at least 1; got none"),
        ({"batches": [1, 0]}, "batches: must be at least 1; got 1, 0"),
        ({"rounds": 0}, "rounds: must be at least 1; got 0"),
        ({"references": ["StaticCache"]}, "references: unknown 'StaticCache'; known: DynamicCache, QuantizedCache"),
    ],
)
def test_numbers_below_one_and_unknown_references_are_refused(
    loaded: LoadedModel, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        measure(loaded, **given)


# -- clock and memory --------------------------------------------------------------------------------------------------


def test_a_stopwatch_tells_the_time_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    watch = timing.Stopwatch(CPU)
    for _ in range(3):
        watch.mark()
    assert watch.laps() == [0.5, 2.5]


def test_on_a_gpu_marks_are_events_and_laps_wait_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            Event.clock += 250.0
            self.time = Event.clock

        def elapsed_time(self, later: Event) -> float:
            assert waited
            return later.time - self.time

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    watch = timing.Stopwatch(torch.device("cuda:1"))
    for _ in range(3):
        watch.mark()
    assert not waited and watch.laps() == [0.25, 0.25] and waited == [torch.device("cuda:1")]


def test_what_is_collected_between_steps_is_short_and_what_was_frozen_stays_so() -> None:
    with timing.short_collections():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with timing.short_collections():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_the_peak_of_a_run_counts_what_it_touched() -> None:
    size = 64 * 2**20
    peak = peak_of(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if peak is None:
        pytest.skip("this system tells no peak")
    assert 0.9 * size < peak < 2 * size


@pytest.mark.cuda
def test_on_a_gpu_the_peak_is_that_of_torchs_allocations() -> None:
    device, size = torch.device("cuda"), 64 * 2**20
    assert peak_of(lambda: torch.ones(size, dtype=torch.uint8, device=device), device) == size


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_tells_every_measurement_and_what_ran(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    CompressionConfig.preset("uniform", budget=0.4).dump(file)
    arguments = ["--preset", "prefixkv", "--preset", "kivi4", "--config", file, "--budget", "0.5", "--budget", "20"]
    arguments += ["--prompt-tokens", 40, "--prompt-tokens", 60, "--batch", 2, "--rounds", 1, "--new-tokens", 2]
    result = run("bench", "--model", text, *arguments, "--json", "--memory-limit", "1GiB", "--plot", tmp_path / "p")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    first = [entry for entry in told["measurements"] if entry["prompt_tokens"] == 40]
    expected = [(name, None) for name in REFERENCES]
    expected += [("prefixkv", 0.5), ("prefixkv", 20), ("kivi4", 1.0), ("mine", 0.5), ("mine", 20)]
    assert [(entry["policy"], entry["budget"]) for entry in first] == expected
    assert len(told["measurements"]) == 2 * len(expected) and told["memory_limit"] == 2**30
    assert all(entry["seconds_per_token_low"] <= entry["seconds_per_token"] for entry in first)
    assert [entry["config"]["allocator"]["name"] for entry in told["configs"]] == ["prefix"] * 2 + ["uniform"] * 3
    assert {"torch", "transformers", "kvcompress"} <= set(told["versions"]) and told["threads"] >= 1
    assert {Path(path).stem for path in told["pictures"]} == {
        "speed-40-tokens-batch-2-fraction",
        "speed-40-tokens-batch-2-tokens",
        "speed-60-tokens-batch-2-fraction",
        "speed-60-tokens-batch-2-tokens",
        "speed-by-prompt-tokens-batch-2",
    }


def test_people_get_a_table_for_each_length(text: Path) -> None:
    result = run("bench", "--model", text, "--prompt-tokens", 30, "--rounds", 1, "--new-tokens", 1)
    assert result.exit_code == 0 and "Prompt of 30 tokens, batch 1" in result.stdout
    for label in ("DynamicCache", "QuantizedCache", "floor", "auto 20 %", "tokens/s", "1.00x"):
        assert label in result.stdout, label
    assert "largest" not in result.stdout
    told = " ".join(result.stdout.split())
    assert "x: the median of the ratios to DynamicCache's time of the same turn, not the ratio of the medians" in told
    alone = run(
        "bench", "--model", text, "--prompt-tokens", 30, "--rounds", 1, "--new-tokens", 1, "--reference", "none"
    )
    assert "ratios" not in alone.stdout


def test_references_are_those_asked_for_and_one_that_is_missing_is_a_warning(text: Path, no_compiler: Path) -> None:
    quick = ["--model", text, "--prompt-tokens", 30, "--rounds", 1, "--new-tokens", 1]
    for arguments, names in (
        (["--reference", "none"], []),
        (["--reference", "floor", "--reference", "DynamicCache"], ["DynamicCache", "floor"]),
        (["--reference", "DynamicCache,QuantizedCache"], ["DynamicCache", "QuantizedCache"]),
    ):
        result = run("bench", *quick, *arguments, "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["references"] == names
        assert [entry["policy"] for entry in told["measurements"]] == [*names, "auto"]
        wanted = "QuantizedCache" in names
        assert ("warning: QuantizedCache is unavailable: optimum-quanto's" in result.stderr) == wanted
        assert ("compiling optimum-quanto's extension" in result.stderr) == wanted
    result = run("bench", *quick)
    assert result.exit_code == 0 and "unavailable" in result.stdout and "not found" not in result.stdout


def test_a_prompt_longer_than_the_model_was_trained_for_is_warned_about(text: Path) -> None:
    result = run("bench", "--model", text, "--prompt-tokens", 512, "--rounds", 1, "--new-tokens", 1, "--json")
    assert result.exit_code == 0 and result.stderr.startswith("warning: prompts and new tokens reach 513")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--preset", "prefixvk"], 1, "did you mean 'prefixkv'"),
        (["--budget", "a fifth"], 1, "got 'a fifth'"),
        (["--config", "missing.yaml"], 1, "missing.yaml: cannot be read"),
        (["--memory-limit", "much"], 2, "'much' is no size"),
        (["--batch", "0"], 2, "--batch"),
        (["--reference", "StaticCache"], 2, "'StaticCache' is no reference"),
        (["--reference", "none,floor"], 2, "'none' is no reference"),
        (["--rounds", "0"], 2, "--rounds"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(arguments: list[str], code: int, says: str) -> None:
    result = run("bench", "--model", "./missing", *arguments)
    assert result.exit_code == code and result.stdout == "" and says in result.stderr


def test_the_benchmark_of_reducers_has_a_row_for_each_that_needs_no_vision_tower() -> None:
    """With how much of the image is left, in bytes and operations, and what the reducer itself takes."""
    table = reducers.measured(reducers.Prefill(reducers.build_model(layers=4, hidden=64)), 1)
    names, _, kept, operations, *_ = ([*column.cells] for column in table.columns)
    assert names == [name for name in REDUCERS.names() if name != "visionzip"]
    assert all(0 < float(str(share)[:-1]) < 1 for share in [*kept, *operations])
