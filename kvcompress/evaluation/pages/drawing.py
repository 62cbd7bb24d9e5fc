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
_A_LINE = 4  # characters of a token on a line of its patch
_FONT = (6, 11)  # pixels of a character
_SMOOTHING = 3  # objects are drawn this many times larger, then scaled down


def draw_page(page: Page) -> Image:
    """Draws a page as an RGB image of `IMAGE_SIZE` pixels each way; the same page gives the same pixels.

    Raises:
        MissingDependencyError: if pillow is not installed.
    """
    return _pillow()[0].fromarray(draw_cells(page.cells, page.seed))


def draw_cells(cells: Sequence[Cell], seed: int) -> np.ndarray:
    """Patches as pixels, uint8 `[IMAGE_SIZE, IMAGE_SIZE, 3]`; jitter, colours and noise come from the seed."""
    draw = np.random.default_rng(seed)
    paper, ink = _colours(draw)
    pixels = np.broadcast_to(paper, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    shifts = draw.integers(-2, 3, size=(len(cells), 2))
    strengths = draw.uniform(0.75, 1.0, size=len(cells))
    bar = draw.uniform(40, 215, size=3)
    tint = draw.uniform(-14, 14, size=3)
    for number, cell in enumerate(cells):
        top, left = number // SIDE * PATCH, number % SIDE * PATCH
        down, right = (int(shift) for shift in shifts[number])
        patch = pixels[top : top + PATCH, left : left + PATCH]
        if cell.look == "bar":
            patch[6 + down : 22 + down, : 1 + BAR * int(cell.text)] = bar
        elif cell.look in ("left", "right"):
            whole = _object(cell.thing[1])  # both halves stand where the left one says
            down, right = (int(shift) for shift in shifts[number - (cell.look == "right")])
            cover = np.roll(whole, (down, right), (0, 1))[:, : PATCH] if cell.look == "left" else None
            cover = np.roll(whole, (down, right), (0, 1))[:, PATCH:] if cover is None else cover
            patch += cover[..., None] * (np.asarray(COLOURS[cell.thing[0]], np.float32) + tint - patch)
        else:
            glyphs = _glyphs(cell.text)
            height, width = glyphs.shape
            y = min(max((PATCH - height) // 2 + down, 0), PATCH - height)
            x = min(max(2 + right, 0), PATCH - width)
            part = patch[y : y + height, x : x + width]
            part += glyphs[..., None] * strengths[number] * (ink - part)
    pixels += draw.normal(0, 5, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    return np.asarray(pixels.clip(0, 255).round().astype(np.uint8))


def _colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of paper and ink; a quarter of all pages are bright on dark."""
    bright = draw.uniform(215, 250) + draw.uniform(-8, 8, size=3)
    dark = draw.uniform(15, 60) + draw.uniform(-15, 15, size=3)
    return (dark, bright) if draw.random() < 0.25 else (bright, dark)


@cache
def _glyphs(text: str) -> np.ndarray:
    """A token, four characters a line: how much ink each pixel gets, from 0 to 1."""
    if text == NEWLINE:
        return _newline()
    lines = [text[start : start + _A_LINE] for start in range(0, len(text), _A_LINE)]
    pitch = 9 if len(lines) < 3 else 8  # pixels; descenders reach into the next line
    width, height = _FONT
    block = np.zeros((height + pitch * (len(lines) - 1), width * len(lines[0])), np.float32)
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            part = block[row * pitch : row * pitch + height, column * width : (column + 1) * width]
            np.maximum(part, _glyph(character), out=part)
    return block


@cache
def _glyph(character: str) -> np.ndarray:
    image_module, draw_module, font = _pillow()
    image = image_module.new("L", _FONT)
    draw_module.Draw(image).text((0, 0), character, font=font, fill=255)
    return np.asarray(image, np.float32) / 255


def _newline() -> np.ndarray:
    """An arrow that turns back, as the mark on a keyboard."""
    mark = np.zeros((11, 18), np.float32)
    mark[1:7, 15:17] = mark[5:7, 3:17] = 1
    for step in range(4):
        mark[5 - step : 7 + step, 2 + step] = 1
    return mark


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
