"""Builds the distributions into dist/ and proves that what a user would install is whole.

The wheel is built from the sdist, so both are tried. It is then installed into a throw-away environment that borrows
the dependencies of the environment running this script, and used from outside the repository. Run it with `make dist`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PACKAGE = "kvcompress"
LINKS = ("policies", "integrations")

IMPORT_FROM_OUTSIDE = f"""
import pathlib, sys
import {PACKAGE}, {", ".join(f"{PACKAGE}.{link}" for link in LINKS)}

where = pathlib.Path({PACKAGE}.__file__).resolve()
home = pathlib.Path(sys.prefix).resolve()
if home not in where.parents:
    sys.exit(f"{PACKAGE} was imported from {{where}}, not from {{home}}")
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command and ends the script with its output when it fails."""
    # PYTHONPATH could put the source tree before the installed wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}\n{done.stdout}{done.stderr}")


def source_files() -> set[str]:
    """The package's files on disk, as paths relative to the repository."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def build() -> tuple[Path, Path]:
    """Builds the sdist, then the wheel from it; returns both paths."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    (wheel,) = DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every file of the package is in both archives, and the links are in neither."""
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.split("/", 1)[1] for member in archive if "/" in member.name}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())

    expected = source_files()
    for link in LINKS:
        if not any(name.startswith(f"{PACKAGE}/{link}/") for name in expected):
            sys.exit(f"{PACKAGE}/{link} holds no file")
    for archive_path, names in ((sdist, in_sdist), (wheel, in_wheel)):
        if missing := sorted(expected - names):
            sys.exit(f"{archive_path.name} lacks {', '.join(missing)}")
        if stray := sorted(name for name in names if name.split("/")[0] in LINKS):
            sys.exit(f"{archive_path.name} holds the links at the top level: {', '.join(stray)}")
    if stray := sorted(name for name in in_wheel if name.split("/")[0].split("-")[0] != PACKAGE):
        sys.exit(f"{wheel.name} would install more than {PACKAGE}: {', '.join(stray)}")


def check_install(wheel: Path) -> None:
    """The wheel, installed alone, can be imported, gives a working command and brings its pytest plug-in."""
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder).resolve()
        home = outside / "venv"
        venv.create(home)
        paths = {"base": str(home), "platbase": str(home)}
        python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"
        site_packages = Path(sysconfig.get_path("purelib", "venv", paths))

        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
        # A folder named in a .pth file is searched, but the .pth files in it are not read: the borrowed environment's
        # editable install of this package stays out of sight.
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))

        run(python, "-I", "-c", IMPORT_FROM_OUTSIDE, cwd=outside)
        run(python.parent / PACKAGE, "--help", cwd=outside)
        # Through the entry point of the wheel: the laws of one policy.
        run(python, "-m", "pytest", "-q", "--kvcompress-policies", "uniform", "-k", "meets_the_total", cwd=outside)


def main() -> None:
    """Builds, looks inside, installs and tries."""
    sdist, wheel = build()
    check_contents(sdist, wheel)
    check_install(wheel)
    print(f"{sdist.name} and {wheel.name}: whole, importable, command works")


if __name__ == "__main__":
    main()
