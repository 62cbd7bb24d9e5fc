"""Commands in child processes that need no Python of their own to start and import everything again."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from typer.testing import CliRunner

from kvcompress.cli import app


class Ended(NamedTuple):
    """What became of a command."""

    code: int  # negative: the signal that ended it
    stdout: str
    stderr: str


class Command:
    """`kvcompress` with some arguments, in a process of its own from now on."""

    def __init__(self, said: Path, *arguments: object, **environment: str) -> None:
        """Starts it; it leaves what it prints under the path `said`, with suffixes."""
        self.said = said
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads: it starts none
            self.pid = os.fork()
        if self.pid == 0:
            self._run(list(map(str, arguments)), environment)

    def _run(self, arguments: list[str], environment: dict[str, str]) -> None:
        code = 70
        try:
            os.environ.update(environment)
            torch.set_num_threads(1)
            result = CliRunner().invoke(app, arguments)
            self.said.with_suffix(".out").write_text(result.stdout)
            self.said.with_suffix(".err").write_text(result.stderr)
            code = result.exit_code
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)

    def wait(self) -> Ended:
        """Waits for its end."""
        _, status = os.waitpid(self.pid, 0)
        said = [self.said.with_suffix(suffix) for suffix in (".out", ".err")]
        return Ended(os.waitstatus_to_exitcode(status), *(p.read_text() if p.exists() else "" for p in said))
