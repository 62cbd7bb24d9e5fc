"""A kill at any moment: the next run goes on, and ends with what an undisturbed one gives.

A child process dies by SIGKILL at a moment that is drawn among all its writes, syncs, renames and steps of progress, a
write half done included. The suite kills 20 times; `KVCOMPRESS_KILLS=1000 pytest -n 0 tests/test_kills.py` so often.
"""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress import CompressionConfig
from kvcompress.config.profile import LayerProfile
from kvcompress.evaluation import LoadedModel, evaluate, load_model, read_results, read_samples
from kvcompress.evaluation.calibration import calibrate
from kvcompress.evaluation.data import Sample
from kvcompress.evaluation.results import samples_path, without_timings
from tests import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = int(os.environ.get("KVCOMPRESS_KILLS", "20"))
QUESTIONS = [
    Sample("fox", "Over what?", "A dog."),
    Sample("jugs", "How many?", "Five."),
    Sample("sphinx", "Who?", "Me."),
]
Moments = Callable[[], None]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(checkpoints.save_text(tmp_path_factory.mktemp("text"))))


def grid(loaded: LoadedModel, path: Path, moment: Moments = lambda: None) -> None:
    evaluate(
        loaded, QUESTIONS, ["streaming", "prefixkv"], budgets=[0.3], metrics=["contained"], max_new_tokens=2,
        output=path, on_progress=lambda _: moment(),
    )  # fmt: skip


def profile(loaded: LoadedModel, path: Path, moment: Moments = lambda: None) -> None:
    found = calibrate(
        loaded, CompressionConfig.preset("prefixkv"), QUESTIONS, budgets=[0.5], on_sample=lambda _: moment()
    )
    found.dump(path)


def told(path: Path) -> Any:
    """What two runs must agree on."""
    if path.suffix == ".json":
        return LayerProfile.load(path)
    return [[without_timings(line) for line in lines] for lines in (read_results(path), read_samples(path))]


def watched(patch: pytest.MonkeyPatch, moment: Callable[[Any], None]) -> None:
    """Calls `moment` before each change of a file, with what is about to be written."""
    for name in ("write", "fsync", "replace", "truncate", "unlink", "chmod"):
        real = getattr(os, name)

        def call(*given: Any, name: str = name, real: Any = real) -> Any:
            moment(given if name == "write" else None)
            return real(*given)

        patch.setattr(os, name, call)


def moments_of(work: Callable[[Moments], None]) -> int:
    """How many moments a run has."""
    count = 0

    def moment(_: Any = None) -> None:
        nonlocal count
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        watched(patch, moment)
        work(moment)
    return count


def killed(work: Callable[[Moments], None], last: int, share: float) -> None:
    """Runs in a child that dies at a moment; a write is done to a share before it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads; the child starts none
        child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return
    try:
        torch.set_num_threads(1)
        write, left = os.write, last

        def moment(writing: Any = None) -> None:
            nonlocal left
            if left == 0:
                if writing is not None:
                    write(writing[0], bytes(writing[1])[: round(share * len(writing[1]))])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        with pytest.MonkeyPatch.context() as patch:
            watched(patch, moment)
            work(moment)
    finally:
        os._exit(3)


@pytest.fixture(scope="module")
def undisturbed(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, int]]]:
    """What each kind of run gives, and how many moments it has."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for name, work in (("grid.jsonl", grid), ("profile.json", profile)):
        count = moments_of(lambda moment, name=name, work=work: work(loaded, folder / name, moment))  # type: ignore[misc]
        found[name] = told(folder / name), count
    yield found


@pytest.mark.parametrize("turn", range(KILLS * 3 // 5))
def test_an_evaluation_that_was_killed_goes_on_and_ends_like_an_undisturbed_one(
    loaded: LoadedModel, undisturbed: dict[str, tuple[Any, int]], tmp_path: Path, turn: int
) -> None:
    expected, count = undisturbed["grid.jsonl"]
    draw, path = random.Random(turn), tmp_path / "grid.jsonl"
    killed(lambda moment: grid(loaded, path, moment), draw.randrange(count), draw.random())
    kept = samples_path(path).read_bytes() if samples_path(path).exists() else b""
    grid(loaded, path)
    assert told(path) == expected
    assert samples_path(path).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # nothing was measured again


@pytest.mark.parametrize("turn", range(KILLS - KILLS * 3 // 5))
def test_a_calibration_that_was_killed_leaves_the_old_profile_or_the_new_one_and_can_be_run_again(
    loaded: LoadedModel, undisturbed: dict[str, tuple[Any, int]], tmp_path: Path, turn: int
) -> None:
    expected, count = undisturbed["profile.json"]
    draw, path = random.Random(1000 + turn), tmp_path / "profile.json"
    old = LayerProfile(budgets=[0.5], retention=[[0.25, 0.75]])
    old.dump(path)
    killed(lambda moment: profile(loaded, path, moment), draw.randrange(count), draw.random())
    assert told(path) in (old, expected)
    profile(loaded, path)
    assert told(path) == expected
