"""Where on an image each of its tokens comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.evaluation.models import LoadedModel
from kvcompress.integrations import adapter_for


@dataclass(frozen=True)
class PatchGrid:
    """The image tokens of a prompt that lie on one grid of patches.

    Attributes:
        positions: of each token in the prompt.
        cells: row and column of its patch, both from 0 at the top left.
        shape: rows and columns of the grid.

    Raises:
        ConfigError: if positions and cells differ in number, or a cell lies outside the grid.
    """

    positions: tuple[int, ...]
    cells: tuple[tuple[int, int], ...]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.cells):
            raise ConfigError(
                f"cells: one for each image token; got {len(self.cells)} for {len(self.positions)} tokens"
            )
        for row, column in self.cells:
            if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
                raise ConfigError(
                    f"cells: ({row}, {column}) lies outside the grid of {' x '.join(map(str, self.shape))}"
                )


def square_grid(positions: Sequence[int]) -> PatchGrid:
    """The grid of an image whose tokens come row by row and as many rows as columns, as in LLaVA-1.5.

    Args:
        positions: of each image token in the prompt, ascending.

    Raises:
        ConfigError: if their number is no square.
    """
    side = isqrt(len(positions))
    if not positions or side * side != len(positions):
        raise ConfigError(
            f"positions: {len(positions)} image tokens fill no square grid; say where each one lies with "
            "PatchGrid(positions, cells, shape)"
        )
    return PatchGrid(tuple(positions), tuple(divmod(index, side) for index in range(len(positions))), (side, side))


def patch_grids(loaded: LoadedModel, inputs: dict[str, Tensor]) -> list[PatchGrid]:
    """The grids of a prompt of one row, in order: one an image; of LLaVA-NeXT a base grid, then the grid of its tiles.

    Args:
        loaded: the model.
        inputs: what `encode_prompt` gave.

    Raises:
        UnsupportedModelError: if the image tokens fit no grid that the model makes.
    """
    layout = adapter_for(loaded.model).image_layout(loaded.model, inputs["input_ids"], dict(inputs))
    found = []
    for number, grid in enumerate(() if layout is None else layout.grids[0]):
        own = (layout.grid[0] == number).nonzero().flatten()  # type: ignore[union-attr]
        cells = [(row, column) for row, column in layout.cell[0, own].tolist()]  # type: ignore[union-attr]
        found.append(PatchGrid(tuple(own.tolist()), tuple(cells), (grid.height, grid.width)))
    return found


def image_positions(loaded: LoadedModel, input_ids: Tensor) -> list[int]:
    """Positions of the image tokens in a prompt of one row; none for a model without vision."""
    is_image = adapter_for(loaded.model).image_tokens(loaded.model, input_ids)
    found: list[int] = [] if is_image is None else is_image[0].nonzero().flatten().tolist()
    return found
