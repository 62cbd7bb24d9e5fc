"""Records of RULER's tasks, ready for `kvcompress evaluate --question unseen`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation.ruler import generators
from kvcompress.files import read_structure
from kvcompress.policies.registry import unknown_name

LEAST = 512  # tokens; below it templates and examples leave no room
_SECONDS = 900  # after which a generator is taken not to end: theirs try for ever what does not fit
_INSTALL = "pip install 'kvcompress[ruler]'"


def task_names() -> list[str]:
    """RULER's thirteen tasks, in the package's order.

    Raises:
        MissingDependencyError: if the package is not installed.
    """
    return list(_tasks(_folder()))


def make_records(
    tokenizer: Any, tasks: Sequence[str] = (), *, length: int = 4096, samples: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """Makes samples of RULER's tasks with the generators of nvidia-long-context-eval.

    Source: Hsieh et al., RULER, arXiv 2404.06654; NVIDIA's package of it, whose functions and texts are used where they
    lie. *Deviates:* sizes grow by smaller steps, so that short texts are filled too; questions of qa are drawn from all
    rather than taken from the first; needles are named by every tenth of its words; NLTK's rules part sentences without
    its trained model; a question comes after an empty line.

    Args:
        tokenizer: of the model; a fast one of transformers. It says how long a text is.
        tasks: names; all if there are none.
        length: tokens of context, question and answer together, at most, without a chat template.
        samples: of each task.
        seed: of what is drawn.

    Returns:
        Records with `id`, `context`, `question`, `answer_prefix`, `answer` (parts that all must be there are joined by
        `<AND>`, those of which one must by `<OR>`), `max_new_tokens` as RULER sets it, and the task as `kind`.

    Raises:
        ConfigError: if a task is unknown, a length is too short for one, or the tokenizer is no fast one.
        MissingDependencyError: if the package, or one that it needs, is not installed.
    """
    folder = _folder()
    known = _tasks(folder)
    for name in tasks:
        if name not in known:
            raise ConfigError(str(unknown_name("task", "task", name, known)))
    if samples < 1:
        raise ConfigError(f"samples: must be at least 1; got {samples}")
    if length < LEAST:
        raise ConfigError(f"length: must be at least {LEAST} tokens; got {length}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"tokenizer: must be a fast one of transformers, so that texts can be counted; got "
            f"{type(tokenizer).__name__}"
        )
    records = []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tokenizer.json"
        backend.save(str(file))
        for name in dict.fromkeys(tasks or known):
            job = {
                "folder": str(folder / "data" / "synthetic"),
                "generator": known[name]["task"],
                "arguments": known[name]["args"],
                "tokenizer": str(file),
                "length": length,
                "samples": samples,
                "seed": seed,
            }
            made = _run(name, job, Path(place))
            records += [_record(name, number, one) for number, one in enumerate(made)]
    return records


def _record(task: str, number: int, made: dict[str, Any]) -> dict[str, Any]:
    """A sample as `kvcompress evaluate` reads it; of qa's answers one must be there, of other tasks' all."""
    joined = ("<OR>" if task.startswith("qa") else "<AND>").join(made["answers"])
    return {
        "id": f"{task}-{number}",
        "kind": task,
        "context": made["context"],
        "question": made["question"],
        "answer_prefix": made["answer_prefix"],
        "answer": joined,
        "max_new_tokens": made["tokens"],
    }


def _run(task: str, job: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    file = place / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, generators.__file__, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, encoding="utf-8", check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"length: '{task}' found nothing of {job['length']} tokens within {_SECONDS} s; give a larger one"
        ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        if last[0].startswith("ModuleNotFoundError"):
            raise MissingDependencyError(f"ruler: '{task}' needs a package: {last[0].partition(': ')[2]}: {_INSTALL}")
        raise ConfigError(f"task '{task}': the generator of nvidia-long-context-eval failed: {last[0]}")
    made = [json.loads(line) for line in done.stdout.splitlines()]
    if len(made) < job["samples"] or not all(one["answers"] and one["question"] for one in made):
        raise ConfigError(
            f"length: {job['length']} tokens are too few for {job['samples']} samples of '{task}'; give a larger one, "
            "or leave the task out"
        )
    return made


def _folder() -> Path:
    found = find_spec("long_context_eval")
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(f"ruler: the package nvidia-long-context-eval makes its tasks: {_INSTALL}")
    return Path(found.submodule_search_locations[0])


def _tasks(folder: Path) -> dict[str, Any]:
    try:
        found = read_structure(folder / "synthetic.yaml", "ruler: the package's tasks")
        return {str(name): {"task": task["task"], "args": task["args"]} for name, task in found.items()}
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"ruler: the package in {folder} is not as expected ({type(error).__name__}: {error}); version 26.3 is"
        ) from None
