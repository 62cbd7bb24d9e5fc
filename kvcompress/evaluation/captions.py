"""Captions of many images: a compressed cache for each batch, and a file of lines that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.repetition import check_read_once
from kvcompress.files import append_line, check_output, locked, open_picture, parse_json, read_bytes
from kvcompress.files.reading import DATA_BYTES
from kvcompress.progress import progress_bar
from kvcompress.reuse.prompts import Prompter, answering

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_WAY_OUT = "--overwrite starts over, or give another file"


def pictures_in(folder: Path) -> list[Path]:
    """The images in a folder, by name.

    Raises:
        ConfigError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"images: '{folder}' is no folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not found:
        raise ConfigError(f"images: there is none in {folder}; known endings: {', '.join(_ENDINGS)}")
    return found


def unreadable(paths: Sequence[Path], folder: Path | None = None) -> dict[str, str]:
    """Names of those images that cannot be read, and why.

    Args:
        paths: of the images.
        folder: where images must lie once links are followed; None allows any place.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            open_picture(path, folder)
        except ConfigError as error:
            found[path.name] = " ".join(str(error).split())
    return found


def caption_images(
    loaded: LoadedModel,
    paths: Sequence[Path],
    prompt: str,
    config: CompressionConfig,
    max_new_tokens: int,
    folder: Path | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Describes images, some of them together in one batch.

    Args:
        loaded: a model that sees images.
        paths: of the images.
        prompt: what is asked of each.
        config: how the cache is compressed.
        max_new_tokens: most tokens of a caption.
        folder: where images must lie once links are followed; None allows any place.
        batch_size: images of a batch; None for all of them.
        progress: whether a bar on stderr shows how many are described.

    Returns:
        For each its name, `image`, and its `caption`.

    Raises:
        ConfigError: if an image cannot be read, the size of a batch is below 1, or the scorer wants a repetition.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1; got {batch_size}")
    check_read_once({"config": config}, "captioning", "caption one image at a time with a Document")
    found: list[dict[str, Any]] = []
    with progress_bar(progress, "images", len(paths)) as tell:
        for first in range(0, len(paths), batch_size or len(paths) or 1):
            part = paths[first : first + (batch_size or len(paths))]
            found += _caption_batch(loaded, part, prompt, config, max_new_tokens, folder)
            tell(len(found))
    return found


@torch.inference_mode()
def _caption_batch(
    loaded: LoadedModel,
    paths: Sequence[Path],
    prompt: str,
    config: CompressionConfig,
    max_new_tokens: int,
    folder: Path | None,
) -> list[dict[str, Any]]:
    prompter = Prompter(loaded.model, loaded.processor)
    rows = [prompter.turn(prompt, [open_picture(path, folder)], first=True) for path in paths]
    longest = max(row["input_ids"].shape[1] for row in rows)
    inputs: dict[str, torch.Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(row[name].shape == row["input_ids"].shape for row in rows):  # one for each token
            fill = prompter.padding if name == "input_ids" else 0
            values = [torch.nn.functional.pad(one, (longest - one.shape[1], 0), value=fill) for one in values]
        elif len({one.shape[1:] for one in values}) > 1:  # tiles of images of several sizes
            most = max(one.shape[1] for one in values)
            padding = [0, 0] * (values[0].ndim - 2)
            values = [torch.nn.functional.pad(one, (*padding, 0, most - one.shape[1])) for one in values]
        inputs[name] = torch.cat(values)
    cache = CompressedCache(loaded.model, config)
    wanted = answering(prompter, max_new_tokens, {})
    output = loaded.model.generate(**inputs, **cache_argument(cache), **wanted)  # type: ignore[operator]
    texts = loaded.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [{"image": path.name, "caption": str(text).strip()} for path, text in zip(paths, texts, strict=True)]


class CaptionsFile:
    """A .jsonl of captions that one run at a time adds to; open it as a context.

    Attributes:
        done: names of the images whose captions are there.
    """

    def __init__(self, path: Path, run: str, *, overwrite: bool = False) -> None:
        """Looks at nothing yet.

        Args:
            path: the file.
            run: what the run is told from others by.
            overwrite: whether a file that is there is started over.
        """
        self._path, self._run, self._overwrite = path, run, overwrite
        self._held = ExitStack()
        self.done: set[str] = set()

    def __enter__(self) -> CaptionsFile:
        path = self._path
        if path.suffix != ".jsonl":
            raise ConfigError(f"output {path}: captions are written as lines of JSON; the name must end in .jsonl")
        check_output(path, overwrite=True)
        self._held.enter_context(locked(path))
        try:
            self._take_up()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, line: dict[str, Any]) -> None:
        """Appends a caption, whole or not at all."""
        append_line(self._path, json.dumps({**line, "run": self._run}, ensure_ascii=False).encode() + b"\n")
        self.done.add(line["image"])

    def _take_up(self) -> None:
        """Finds what is done, and cuts off what a kill tore."""
        path = self._path
        content = read_bytes(path, "output", DATA_BYTES) if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        torn = content[len(whole) :]
        for number, text in enumerate(whole.splitlines(), 1):
            where = f"output {path}: line {number}"
            try:
                line = parse_json(text.decode("utf-8"), where)
            except (ConfigError, UnicodeDecodeError):
                line = None
            fields = line if isinstance(line, dict) else {}
            if not {"image", "caption", "run"} <= fields.keys() or not isinstance(fields["image"], str):
                raise ConfigError(f"{where}: is no caption that kvcompress wrote; give another file")
            if fields["run"] != self._run and not self._overwrite:
                raise ConfigError(f"{where}: was written with another model, prompt or configuration; {_WAY_OUT}")
            self.done.add(fields["image"])
        if torn and not torn.startswith(b'{"image": '[: len(torn)]):
            raise ConfigError(f"output {path}: does not end in a caption that kvcompress wrote; give another file")
        if self._overwrite and content:
            self.done.clear()
            whole = b""
        if len(whole) < len(content):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
