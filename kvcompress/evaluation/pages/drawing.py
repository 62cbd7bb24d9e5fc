"""Pages drawn with Pillow's own bitmap font, a token a patch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.errors import MissingDependencyError
from kvcompress.evaluation.pages.contents import COLOURS, SIDE, Cell, Page
from kvcompress.evaluation.pages.vocabulary import NEWLINE

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH = 28  # pixels, each way
IMAGE_SIZE = SIDE * PATCH
BAR = 3  # pixels of a bar's length for one
_BAR_COLOUR = np.array([70.0, 130.0, 180.0])
_A_LINE = 4  # characters of a token on a line of its patch
_FONT = (6, 11)  # pixels of a character
_SMOOTHING = 3  # objects are drawn this many times larger, then scaled down


def draw_page(page: Page) -> Image:
    """Draws a page as an RGB image of `IMAGE_SIZE` pixels each way; the same page gives the same pixels.

    Raises:
        MissingDependencyError: if pillow is not installed.
    """
    image: Image = _pillow()[0].fromarray(draw_cells(page.cells, page.seed))
    return image


def draw_cells(cells: Sequence[Cell], seed: int) -> np.ndarray:
    """Patches as pixels, uint8 `[IMAGE_SIZE, IMAGE_SIZE, 3]`; jitter, colours and noise come from the seed."""
    draw = np.random.default_rng(seed)
    paper, ink = _colours(draw)
    pixels = np.broadcast_to(paper, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    shifts = draw.uniform(0, 0.5, size=(len(cells), 2)).astype(np.float32)
    strengths = draw.uniform(0.85, 1.0, size=len(cells))
    bar = _BAR_COLOUR + draw.uniform(-20, 20, size=3)
    tint = draw.uniform(-14, 14, size=3)
    for number, cell in enumerate(cells):
        top, left = number // SIDE * PATCH, number % SIDE * PATCH
        patch = pixels[top : top + PATCH, left : left + PATCH]
        if cell.look == "bar":
            patch[7:21, : 1 + BAR * int(cell.text)] = bar
        elif cell.look in ("left", "right"):
            first = number - (cell.look == "right")  # both halves stand where the left one says
            whole = _shifted(_object(cell.thing[1]), shifts[first])
            cover = whole[:, :PATCH] if cell.look == "left" else whole[:, PATCH:]
            patch += cover[..., None] * (np.asarray(COLOURS[cell.thing[0]], np.float32) + tint - patch)
        else:
            patch += _shifted(_glyphs(cell.text), shifts[number])[..., None] * (strengths[number] * (ink - patch))
    pixels += draw.normal(0, 5, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    return np.asarray(pixels.clip(0, 255).round().astype(np.uint8))


def _colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of paper and ink."""
    return draw.uniform(215, 250) + draw.uniform(-8, 8, size=3), draw.uniform(15, 60) + draw.uniform(-15, 15, size=3)


def _shifted(cover: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Moved down and to the right by a part of a pixel; nothing stands in the last row and column."""
    for axis, part in enumerate(shift):
        cover = cover + part * (np.roll(cover, 1, axis) - cover)
    return cover


@cache
def _glyphs(text: str) -> np.ndarray:
    """A token in its patch, four characters a line: how much ink each pixel gets, from 0 to 1."""
    patch = np.zeros((PATCH, PATCH), np.float32)
    if text == NEWLINE:
        _draw_newline(patch)
    large = 2 if len(text) <= 2 else 1  # marks and digits are drawn twice as large
    per_line = _A_LINE // large
    lines = [text[start : start + per_line] for start in range(0, len(text.rstrip()), per_line)]
    pitch = 9 if len(lines) < 3 else 8  # pixels; descenders reach into the next line
    width, height = (size * large for size in _FONT)
    top = (PATCH - height - pitch * (len(lines) - 1)) // 2
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            y, x = top + row * pitch, 1 + column * width
            part = patch[y : y + height, x : x + width]
            np.maximum(part, np.kron(_glyph(character), np.ones((large, large), np.float32)), out=part)
    return patch


@cache
def _glyph(character: str) -> np.ndarray:
    image_module, draw_module, font = _pillow()
    image = image_module.new("L", _FONT)
    draw_module.Draw(image).text((0, 0), character, font=font, fill=255)
    return np.asarray(image, np.float32) / 255


def _draw_newline(patch: np.ndarray) -> None:
    """An arrow that turns back, as the mark on a keyboard."""
    patch[9:15, 18:20] = patch[13:15, 6:20] = 1
    for step in range(4):
        patch[13 - step : 15 + step, 5 + step] = 1


@cache
def _object(shape: str) -> np.ndarray:
    """An object over two patches, in their middle: how much of each pixel it covers, `[PATCH, 2 * PATCH]`."""
    image_module, draw_module, _ = _pillow()
    image = image_module.new("L", (2 * PATCH * _SMOOTHING, PATCH * _SMOOTHING))
    pen: Any = draw_module.Draw(image)
    x, y, wide, high = (size * _SMOOTHING for size in (PATCH, PATCH / 2, 18, 11))
    box = (x - wide, y - high, x + wide, y + high)
    if shape in ("circle", "ring"):
        pen.ellipse(box, fill=255)
        if shape == "ring":
            pen.ellipse((x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), fill=0)
    elif shape == "square":
        pen.rectangle(box, fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - high), (x - wide, y + high), (x + wide, y + high)], fill=255)
    elif shape == "diamond":
        pen.polygon([(x, y - high), (x - wide, y), (x, y + high), (x + wide, y)], fill=255)
    elif shape == "cross":
        pen.rectangle((x - wide, y - high / 3, x + wide, y + high / 3), fill=255)
        pen.rectangle((x - wide / 4, y - high, x + wide / 4, y + high), fill=255)
    elif shape == "heart":
        pen.ellipse((x - wide, y - high, x, y + high / 4), fill=255)
        pen.ellipse((x, y - high, x + wide, y + high / 4), fill=255)
        pen.polygon([(x - wide, y - high / 4), (x + wide, y - high / 4), (x, y + high)], fill=255)
    else:  # a star of four rays
        pen.polygon(
            [(x + a * wide, y + b * high) for a, b in ((0, -1), (0.2, -0.25), (1, 0), (0.2, 0.25), (0, 1))]
            + [(x + a * wide, y + b * high) for a, b in ((-0.2, 0.25), (-1, 0), (-0.2, -0.25))],
            fill=255,
        )
    return np.asarray(image.reduce(_SMOOTHING), np.float32) / 255


@cache
def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise MissingDependencyError("image: pillow draws pages: pip install 'kvcompress[demo]'") from None
    return Image, ImageDraw, ImageFont.load_default_imagefont()
