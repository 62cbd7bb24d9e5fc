"""From what a user names to samples: a built-in name with settings, or a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError, did_you_mean
from kvcompress.evaluation.data.built_in import needle, pages, shapes, text
from kvcompress.evaluation.data.files import FORMATS, read_file
from kvcompress.evaluation.data.sample import Sample, with_unique_names

BUILT_IN: dict[str, Callable[..., list[Sample]]] = {
    "shapes": shapes,
    "pages": pages,
    "needle": needle,
    "text": text,
}


def load_samples(source: str, *, images: Path | None = None, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Reads or makes samples.

    Args:
        source: a file (.json in LLaVA's conversation format, MM-Vet's or as a list of questions; .jsonl of questions;
            .txt), or a built-in name: "shapes" (held-out scenes of ShapesLLaVA), "pages" (held-out pages of
            PagesLLaVA), "needle" (a needle in a haystack), "text" (English prose and its continuation). A built-in name
            may carry settings after a colon: "needle:length=2000,depth=0.5", "pages:kind=table", "text:length=500".
        images: the folder that image paths are relative to; the file's own (for MM-Vet `images` beside it) if None.
        limit: the first so many samples; None for all of a file, and what a built-in source makes by default.
        seed: of what built-in sources draw; a file is read in its order.

    Returns:
        At least one sample, each with a name of its own.

    Raises:
        ConfigError: if there is no such source, it cannot be read, is of another form or holds no samples.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"samples: must be at least 1; got {limit}")
    name, _, settings = source.partition(":")
    if name in BUILT_IN and not Path(source).exists():
        given = _settings(source, BUILT_IN[name], settings)
        if limit is not None:
            given["count"] = limit
        return with_unique_names(BUILT_IN[name](**given, seed=seed))
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data: '{source}' is neither a file ({', '.join(FORMATS)}) nor a built-in name ({', '.join(BUILT_IN)})"
            + did_you_mean(name, BUILT_IN)
        )
    if images is not None and not images.is_dir():
        raise ConfigError(f"images: '{images}' is no folder")
    samples = read_file(path, images)
    if not samples:
        raise ConfigError(f"data {path}: holds no samples")
    return with_unique_names(samples)[:limit]


def _settings(source: str, make: Callable[..., list[Sample]], text: str) -> dict[str, Any]:
    """Reads `name=value,...` for the keyword arguments that a built-in source has besides count and seed."""
    known = {name: field for name, field in inspect.signature(make).parameters.items() if name not in ("count", "seed")}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value:
            raise ConfigError(f"data '{source}': settings are {', '.join(f'{key}=...' for key in known)}; got '{part}'")
        kind = str(known[name].annotation)
        try:
            found[name] = int(value) if "int" in kind else float(value) if "float" in kind else value
        except ValueError:
            raise ConfigError(f"data '{source}': {name} must be a number; got '{value}'") from None
    return found
