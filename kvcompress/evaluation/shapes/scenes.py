"""Scenes of drawn objects on a grid: made from a seed, drawn with Pillow."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from math import pi, sin, sqrt
from typing import TYPE_CHECKING

import numpy as np

from kvcompress.errors import MissingDependencyError
from kvcompress.evaluation.splits import split_seed

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

GRID = 3  # rows, and columns
CELL = 48  # pixels, each way
IMAGE_SIZE = GRID * CELL
COLOURS = {
    "red": (222, 52, 44),
    "green": (44, 172, 66),
    "blue": (56, 92, 232),
    "yellow": (242, 218, 56),
    "purple": (172, 66, 202),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
_RADIUS = {"small": 12, "large": 20}  # pixels, before variation
_SMOOTHING = 2  # drawn this many times larger, then scaled down
# Seeds of the scenes of each split; a split never reaches into the next.


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene.

    Attributes:
        row: of the grid, from 1 (top).
        column: of the grid, from 1 (left).
        size: one of `SIZES`.
        colour: one of `COLOURS`.
        shape: one of `SHAPES`.
    """

    row: int
    column: int
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a grid, at most one a cell.

    Attributes:
        things: the objects in reading order.
        seed: what they were drawn from, and what their jitter and background are drawn from.
    """

    things: tuple[Thing, ...]
    seed: int

    def at(self, row: int, column: int) -> Thing | None:
        """The object in a cell, rows and columns counted from 1."""
        return next((thing for thing in self.things if (thing.row, thing.column) == (row, column)), None)


def scene_seed(split: str, index: int) -> int:
    """The seed of a scene of a split, as `split_seed` has them: "train", "validation" or "test"."""
    return split_seed(split, index)


def sample_scene(seed: int) -> Scene:
    """Draws a scene: three to seven objects, of few colours and shapes, so that counts vary."""
    draw = random.Random(seed)
    cells = [(row, column) for row in range(1, GRID + 1) for column in range(1, GRID + 1)]
    colours = draw.sample(list(COLOURS), draw.randint(2, 5))
    shapes = draw.sample(SHAPES, draw.randint(2, 4))
    things = [
        Thing(row, column, draw.choice(SIZES), draw.choice(colours), draw.choice(shapes))
        for row, column in draw.sample(cells, draw.randint(3, 7))
    ]
    return Scene(tuple(sorted(things)), seed)


def draw_scene(scene: Scene) -> Image:
    """Draws a scene as an RGB image of `IMAGE_SIZE` pixels each way; the same scene gives the same pixels.

    Raises:
        MissingDependencyError: if pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise MissingDependencyError("image: pillow draws scenes: pip install 'kvcompress[demo]'") from None
    draw = random.Random(scene.seed ^ 0x5CE7E5)
    side = IMAGE_SIZE * _SMOOTHING
    canvas = Image.new("RGB", (side, side))
    layer = Image.new("L", (side, side))
    pen, mask = ImageDraw.Draw(canvas), ImageDraw.Draw(layer)
    for thing in scene.things:
        radius = _RADIUS[thing.size] + draw.uniform(-1.5, 1.5)
        room = CELL / 2 - radius - 1
        x = (thing.column - 0.5) * CELL + draw.uniform(-room, room) / 2
        y = (thing.row - 0.5) * CELL + draw.uniform(-room, room) / 2
        colour = tuple(min(255, max(0, level + draw.randint(-14, 14))) for level in COLOURS[thing.colour])
        centre = (x * _SMOOTHING, y * _SMOOTHING)
        _draw_shape(pen, thing.shape, centre, radius * _SMOOTHING, colour)
        _draw_shape(mask, thing.shape, centre, radius * _SMOOTHING, 255)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    objects = np.asarray(canvas.reduce(_SMOOTHING), dtype=np.float32)
    cover = np.asarray(layer.reduce(_SMOOTHING), dtype=np.float32)[..., None] / 255
    # the canvas is black around the objects, so its edges are already mixed with black by their cover
    pixels = objects + (1 - cover) * _background(np.random.default_rng(scene.seed), size)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _background(draw: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A dark, slightly tinted slope with noise."""
    level = draw.uniform(25, 85, size=(1, 1, 1)) + draw.uniform(-12, 12, size=(1, 1, 3))
    down, right = np.linspace(-0.5, 0.5, size[0])[:, None, None], np.linspace(-0.5, 0.5, size[1])[None, :, None]
    slope = down * draw.uniform(-30, 30) + right * draw.uniform(-30, 30)
    noise = draw.normal(0, 4, size=(*size, 1))
    return np.asarray(level + slope + noise, dtype=np.float32)


def _draw_shape(
    pen: ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: int | tuple[int, ...]
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "ring":
        inner = 0.5 * radius
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=fill, width=round(radius - inner))
    elif shape == "square":
        half = 0.88 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        half, drop = radius * sqrt(3) / 2 * 1.1, radius * sin(pi / 6) * 1.4
        pen.polygon([(x, y - radius), (x - half, y + drop), (x + half, y + drop)], fill=fill)
    else:  # a cross
        arm = 0.3 * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def describe(things: Iterable[Thing]) -> str:
    """The long answer: each object with its place, in reading order."""
    return " ".join(f"row {thing.row} column {thing.column}: {thing}." for thing in things)
