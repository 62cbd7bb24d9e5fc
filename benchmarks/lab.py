"""Figures as they come: printed, kept in a file, and left out where time is up."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvcompress
from benchmarks import random_models, steps
from benchmarks.machine import about
from kvcompress import CompressedCache
from kvcompress.files import write_text

About = Mapping[str, Any]  # what a figure is about: model, batch, tokens, cache


class Lab:
    """Where figures are taken, and what they were."""

    def __init__(self, device: torch.device, tiny: bool, output: Path, minutes: float) -> None:
        """Starts the clock, and says what everything runs on.

        Args:
            device: of the models.
            tiny: whether models and prompts are small ones.
            output: the JSON file.
            minutes: after which nothing more is begun.
        """
        self.device, self.tiny, self.output = device, tiny, output
        self.end = time.monotonic() + 60 * minutes
        self.failures = 0
        self.rows: list[dict[str, Any]] = []
        self.row("machine", about(device))
        self.bandwidth = steps.bandwidth(device, 2**20 if tiny else 2**30)  # bytes per second
        self.row("machine", {}, copied_tb_per_s=self.bandwidth / 1e12)

    def row(self, section: str, about: About, **figures: Any) -> None:
        """Prints a line and writes all lines to the file; a figure that is None is left out."""
        row = {**about, **{name: figure for name, figure in figures.items() if figure is not None}}
        self.rows.append({"section": section, **row})
        print(f"{section:9}", *(f"{name}={_shown(value)}" for name, value in row.items()), flush=True)
        write_text(self.output, json.dumps(self.rows, indent=1) + "\n")

    def attempt(self, section: str, about: About, run: Callable[[], Any], seconds: float = 5) -> Any:
        """What a function returns; None, and a line that says why, where it fails or too few seconds are left."""
        if time.monotonic() + seconds > self.end:
            self.row(section, about, left_out="too little time is left; run this section alone or give more --minutes")
            return None
        try:
            return run()
        except Exception as error:
            self.failures += 1
            self.row(section, about, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            traceback.print_exc(limit=-4)
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def model(self, section: str, kind: str) -> PreTrainedModel | None:
        """A model without any trace of a compressed cache; the one before is gone. None where it cannot be made."""

        def made() -> PreTrainedModel:
            model = random_models.of_kind(kind, self.device, self.tiny)
            kvcompress.restore(model)
            return model

        found: PreTrainedModel | None = self.attempt(section, {"model": kind}, made)
        return found

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random tokens."""
        return torch.randint(4, 400, (batch, tokens), device=self.device)

    def milliseconds(self, step: steps.Step) -> float:
        """Of a decode step."""
        return steps.milliseconds(step, self.device, 2 if self.tiny else 20)

    def decoding(
        self, section: str, about: About, model: PreTrainedModel, cache: CompressedCache, batch: int
    ) -> dict[str, float]:
        """Milliseconds of a decode step, captured and in Python, with one cache that has read its prompt.

        Captured steps come first, so that all they wait for (kernels that are compiled, a step in Python, the capture)
        is counted in `until_captured_s`.
        """
        found: dict[str, float] = {}
        step = steps.captured(model, cache, batch) if cache.is_compileable else None
        if step is not None:
            waited = [steps.seconds(step, self.device) for _ in range(2)]
            found["captured"] = self.milliseconds(step)
            figures = {"mode": cache.report().decoding, "ms": found["captured"]}
            self.row(section, about, **figures, until_captured_s=sum(waited), aim="until_captured_s at most 5")
        elif cache.is_compileable:
            self.row(section, about, mode="captured", skipped=f"there are no graphs of a {self.device.type} device")
        else:
            self.row(section, about, mode="captured", skipped="this cache decodes step by step in Python")
        cache.after_turn()
        found["eager"] = self.milliseconds(steps.in_python(model, cache, batch))
        self.row(section, about, mode="eager", ms=found["eager"])
        return found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
