"""Where image tokens belong in their images, against features that carry their own coordinates."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from kvcompress import CompressedCache
from kvcompress.errors import UnsupportedModelError
from kvcompress.integrations import adapter_for
from kvcompress.policies.images import ImageLayout
from tests import tiny
from tests.strategies import examples

PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24], [24, 24]]


@functools.cache
def next_model() -> Any:
    """A LLaVA-NeXT whose tiles are put together in many ways."""
    model = tiny.build("llava_next_36")
    model.config.image_grid_pinpoints = PINPOINTS
    return model


def packed(model: Any, size: tuple[int, int]) -> Tensor:
    """Features of one image as LLaVA-NeXT puts them together: grid, row and column first, -1 where a line ends."""
    side, (height, width) = 6, size
    down, across = get_anyres_image_grid_shape((height, width), PINPOINTS, 24)
    cells = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    tiles = [torch.cat([torch.zeros(side**2, 1), cells], 1)]
    for row in range(down):
        for column in range(across):
            tiles.append(torch.cat([torch.ones(side**2, 1), cells + torch.tensor([row, column]) * side], 1))
    patches = torch.stack(tiles).float()
    sizes = torch.tensor([size])
    (features,), _ = model.model.pack_image_features([patches], sizes, "default", torch.full((3,), -1.0))
    tiled = features[:, 0] == 1
    features[tiled, 1:] -= features[tiled, 1:].amin(0)  # a padded edge was cut off
    return features


def check(layout: ImageLayout, ids: Tensor, rows: list[list[Tensor]]) -> None:
    """Asserts that every column has the grid and the cell that its feature tells."""
    for row, images in enumerate(rows):
        columns = (ids[row] == tiny.IMAGE_TOKEN).nonzero().flatten().tolist()
        wanted = [(number, feature) for number, image in enumerate(images) for feature in image.long().tolist()]
        for column, (number, (grid, *cell)) in zip(columns, wanted, strict=True):
            assert int(layout.grid[row, column]) == (-1 if grid < 0 else 2 * number + grid)
            if grid >= 0:
                assert layout.cell[row, column].tolist() == cell
        assert (layout.grid[row] >= 0).sum() == sum(feature[0] >= 0 for _, feature in wanted)
        sizes = []
        for number, image in enumerate(images):
            for grid in (0, 1):
                height, width = (image[image[:, 0] == grid][:, 1:].amax(0).long() + 1).tolist()
                sizes.append((number, height, width))
        assert [(grid.image, grid.height, grid.width) for grid in layout.grids[row]] == sizes


@examples(25)
@given(rows=st.lists(st.lists(st.tuples(st.integers(5, 90), st.integers(5, 90)), max_size=2), min_size=1, max_size=3))
def test_llava_next_has_a_base_grid_and_one_of_all_tiles(rows: list[list[tuple[int, int]]]) -> None:
    """For images of any shape, several in a row or none, from their sizes and from their features."""
    model = next_model()
    features = [[packed(model, size) for size in row] for row in rows]
    parts = [[torch.tensor([5, 6]), *(torch.full((len(f),), tiny.IMAGE_TOKEN) for f in row)] for row in features]
    longest = max(sum(map(len, part)) for part in parts)
    ids = torch.stack([torch.nn.functional.pad(torch.cat(part), (longest - sum(map(len, part)), 0)) for part in parts])
    sizes = [size for row in rows for size in row]
    adapter = adapter_for(model)
    by_size = adapter.image_layout(model, ids, {"image_sizes": torch.tensor(sizes).view(-1, 2)})
    check(by_size, ids, features)
    newline = model.model.image_newline.detach()
    made = [torch.randn(len(f), 32).where(f[:, :1] >= 0, newline) for row in features for f in row]
    outputs = {"image": SimpleNamespace(pooler_output=made)}
    check(adapter.image_layout(model, ids, {"mm_encoder_outputs": outputs}), ids, features)


@pytest.mark.parametrize("size", [(24, 48), (30, 70), (70, 30), (47, 48), (10, 80), (24, 24)])
@torch.no_grad()
def test_generate_and_a_plain_call_reduce_the_same(size: tuple[int, int]) -> None:
    """`generate` makes the features before the model is called."""
    model = next_model()
    count = len(packed(model, size))
    down, across = get_anyres_image_grid_shape(size, PINPOINTS, 24)
    ids = torch.cat([tiny.token_ids(1, 3, 1), torch.full((1, count), tiny.IMAGE_TOKEN), tiny.token_ids(1, 4, 2)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": torch.tensor([size])}
    inputs["pixel_values"] = torch.randn(1, 1 + down * across, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    plain, generated = (
        CompressedCache(model, "full", reducer={"name": "lightkv", "windows": [2, 1]}) for _ in range(2)
    )
    model(**inputs, **tiny.with_cache(plain))
    model.generate(**inputs, **tiny.with_cache(generated), max_new_tokens=1, do_sample=False)
    assert plain.report() == generated.report()
    assert plain.report().vision_retention < 0.95


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["default", "full"])
@torch.no_grad()
def test_llava_has_one_square_grid_an_image_and_maybe_a_class_token(images: int, strategy: str) -> None:
    model, extra = tiny.model("llava_36"), int(strategy == "full")
    piece = [5, *[tiny.IMAGE_TOKEN] * (36 + extra)]
    ids = torch.tensor([piece * images + [7]])
    pixels = tiny.images("llava_36", images, seed=1)
    settings = {**pixels, "vision_feature_select_strategy": strategy}
    layout = adapter_for(model).image_layout(model, ids, settings)
    assert [(grid.image, grid.height, grid.width) for grid in layout.grids[0]] == [(n, 6, 6) for n in range(images)]
    column = 0
    for number in range(images):
        assert layout.grid[0, column : column + 1 + extra].tolist() == [-1] * (1 + extra)
        column += 1 + extra
        for cell in range(36):
            assert int(layout.grid[0, column]) == number
            assert layout.cell[0, column].tolist() == [cell // 6, cell % 6]
            column += 1
    cache = CompressedCache(model, "full", reducer="tome")
    model(ids, **settings, **tiny.with_cache(cache))
    assert [layer[0] for layer in cache.report().image_tokens] == [images * (n + extra) for n in (36, 18, 9)]


BREAK, END = 90, 91  # tokens that Pixtral's processor puts after each row of an image, and after the last


def written(sizes: list[tuple[int, int]], breaks: bool = True) -> Tensor:
    """Ids of images of so many rows and columns between text, as Pixtral's processor writes them."""
    ids = [5]
    for height, width in sizes:
        row = [tiny.IMAGE_TOKEN] * width + [BREAK] * breaks
        ids += [*(row * height)[: -1 if breaks else None], END, 7]
    return torch.tensor([ids])


def pixels(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Random pixels of images of so many patches down and across, padded to the largest, and their sizes."""
    largest = [4 * max(side) for side in zip(*sizes, strict=True)]
    values = torch.randn(len(sizes), 3, *largest, generator=torch.Generator().manual_seed(6))
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes) * 4}


def cells(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Number of the image, row and column of every image token."""
    places = [(number, *size) for number, size in enumerate(sizes)]
    return [[number, row, column] for number, high, wide in places for row in range(high) for column in range(wide)]


@examples(25)
@given(sizes=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=3))
@example(sizes=[(2, 1)] * 3)  # as many tokens as two of them with a class token, which this tower does not have
def test_images_of_any_shape_have_their_own_grids(sizes: list[tuple[int, int]]) -> None:
    """From the images' sizes, and from the tokens between their rows where only the features are known."""
    model, ids = tiny.model("llava_pixtral"), written(sizes)
    features = SimpleNamespace(pooler_output=[torch.zeros(high * wide, 32) for high, wide in sizes])
    for inputs in (pixels(sizes), {"mm_encoder_outputs": {"image": features}}):
        layout = adapter_for(model).image_layout(model, ids, inputs)
        grids = [(grid.image, grid.height, grid.width) for grid in layout.grids[0]]
        assert grids == [(number, *size) for number, size in enumerate(sizes)]
        columns = (ids[0] == tiny.IMAGE_TOKEN).nonzero().flatten()
        found = torch.cat([layout.grid[0, columns, None], layout.cell[0, columns]], 1)
        assert found.tolist() == cells(sizes)


@torch.no_grad()
def test_generate_and_a_plain_call_reduce_images_of_any_shape_the_same() -> None:
    """Two images in two rows of a batch that are not square, of which `generate` hands on the features alone."""
    model, sizes = tiny.model("llava_pixtral"), [(4, 6), (2, 12)]
    rows = [written([size])[0] for size in sizes]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), **pixels(sizes)}
    plain, generated = (
        CompressedCache(model, "full", reducer={"name": "lightkv", "windows": [1], "after": [1]}) for _ in range(2)
    )
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**inputs, position_ids=positions, **tiny.with_cache(plain))
    model.generate(**inputs, **tiny.with_cache(generated), max_new_tokens=1, do_sample=False)
    assert plain.report() == generated.report()
    assert plain.report().image_tokens == [[24, 24], [12, 12], [12, 12]]


@pytest.mark.parametrize("breaks", [False, True])
def test_images_whose_shape_nothing_tells_are_refused(breaks: bool) -> None:
    """Rows without an end between them, and two images whose features came as one."""
    model, sizes = tiny.model("llava_pixtral"), [(2, 6), (2, 6)]
    ids = written(sizes, breaks)
    counts = [24] if breaks else [12, 12]
    features = SimpleNamespace(pooler_output=[torch.zeros(count, 32) for count in counts])
    with pytest.raises(
        UnsupportedModelError, match=rf"image 0 has {counts[0]} features.*model\(\*\*inputs, cache=cache"
    ):
        adapter_for(model).image_layout(model, ids, {"mm_encoder_outputs": {"image": features}})
    assert adapter_for(model).image_layout(model, ids, pixels(sizes)) is not None


@torch.no_grad()
def test_a_tower_of_one_size_that_is_not_square_has_its_own_grid() -> None:
    """Its configuration gives height and width apart."""
    model = tiny.build("llava_36")
    model.config.vision_config.image_size, model.config.vision_config.patch_size = [16, 36], [4, 4]
    ids = torch.tensor([[5, *[tiny.IMAGE_TOKEN] * 36, 7]])
    layout = adapter_for(model).image_layout(model, ids, {})
    assert [(grid.height, grid.width) for grid in layout.grids[0]] == [(4, 9)]


@pytest.mark.parametrize(("name", "tokens"), [("llava_36", 35), ("llava_36", 37), ("llava_next_36", 191)])
def test_tokens_that_fit_no_grid_are_refused(name: str, tokens: int) -> None:
    ids = torch.full((1, tokens), tiny.IMAGE_TOKEN)
    model = tiny.model(name)
    with pytest.raises(UnsupportedModelError, match=rf"row 0 has {tokens} image tokens, and its 1 images would have"):
        adapter_for(model).image_layout(model, ids, {"image_sizes": torch.tensor([[48, 48]])})
