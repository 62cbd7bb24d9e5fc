"""Vision families: what is an image and where its tokens belong, and the laws of the cache with each of them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from kvcompress import CompressedCache
from kvcompress.cache import hooks
from kvcompress.errors import UnsupportedModeError, UnsupportedModelError
from kvcompress.integrations import adapter_for
from kvcompress.testing.running import require_masked
from tests import tiny
from tests.reference import Reference, held, recorded
from tests.vision import FAMILIES, IMAGE, VIDEO, Family, Written, text_ids

MERGING = {"name": "lightkv", "after": [1], "windows": [1]}
SLIDING = {"gemma3", "paligemma2"}  # some layers keep transformers' own cache
REDUCED = {name: family for name, family in FAMILIES.items() if name not in SLIDING}
every_reduced_family = pytest.mark.parametrize("family", REDUCED.values(), ids=REDUCED.keys())
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
positioned = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.axes > 1], ids=lambda family: family.name
)


def generated(model: Any, cache: Any, inputs: dict[str, Any], tokens: int = 3, **settings: Any) -> Tensor:
    """Ids of the prompt and of greedy steps after it."""
    found: Tensor = model.generate(
        **inputs, **tiny.with_cache(cache), max_new_tokens=tokens, do_sample=False, **settings
    )
    return found


def next_turn(ids: Tensor, mask: Tensor, tokens: int, seed: int) -> dict[str, Tensor]:
    """The conversation so far, and more text."""
    more = torch.cat([ids, text_ids(len(ids), tokens, seed)], 1)
    return {
        "input_ids": more,
        "attention_mask": torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1),
    }


@every_family
def test_with_room_for_all_tokens_are_those_of_a_dynamic_cache(family: Family) -> None:
    """In a padded batch with images, and in the turn after it."""
    inputs = family.two_rows()
    found = []
    for model, cache in (
        (tiny.untouched(family.name), DynamicCache()),
        (tiny.model(family.name), CompressedCache(tiny.model(family.name), "prefixkv", budget=1.0)),
    ):
        first = generated(model, cache, inputs)
        found.append(generated(model, cache, next_turn(first, inputs["attention_mask"], 4, seed=3)))
    assert torch.equal(*found)


@every_family
def test_physical_equals_masked(family: Family) -> None:
    """Prompt, decode steps and a second turn at a budget of 0.3, against all tokens with the others hidden."""
    model, inputs = tiny.model(family.name), family.two_rows()
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    with recorded(model, cache) as steps:
        first = generated(model, cache, inputs)
        generated(model, cache, next_turn(first, inputs["attention_mask"], 4, seed=3))
    assert cache.report().retention < 0.4
    require_masked(Reference(family.name), cache, steps)


def test_a_mixture_of_experts_is_served_as_a_dense_model_is() -> None:
    """Qwen3-VL's, in one turn at a budget of 0.3."""
    family = replace(FAMILIES["qwen3_vl"], name="qwen3_vl_moe")
    model, inputs = tiny.model(family.name), family.two_rows()
    cache = CompressedCache(model, "prefixkv", budget=0.3)
    with recorded(model, cache) as steps:
        generated(model, cache, inputs)
    require_masked(Reference(family.name), cache, steps)


# -- where image tokens belong -----------------------------------------------------------------------------------------


def check_layout(model: Any, inputs: dict[str, Any], seen: list[list[Written]]) -> None:
    """Asserts that every column has the grid and the cell that it was written for; pictures first, then videos."""
    ids = inputs["input_ids"]
    layout = adapter_for(model).image_layout(model, ids, inputs)
    marks = adapter_for(model).image_tokens(model, ids)
    assert torch.equal(marks, (ids == IMAGE) | (ids == VIDEO))
    for row, written in enumerate(seen):
        first, grids = 0, []
        in_order = [one for kind in ("image", "video") for one in written if one.kind == kind]
        numbers = itertools.count()
        for one in in_order:
            number = next(numbers)
            for frame, size in enumerate(one.grids):
                number = next(numbers) if one.apart and frame else number
                grids.append((number, *size, frame if one.kind == "video" else None))
        assert [(grid.image, grid.height, grid.width, grid.frame) for grid in layout.grids[row]] == grids
        for kind, token in (("image", IMAGE), ("video", VIDEO)):
            columns = (ids[row] == token).nonzero().flatten()
            wanted: list[tuple[int, ...]] = []
            for one in (one for one in in_order if one.kind == kind):
                wanted += [(-1, 0, 0) if grid < 0 else (first + grid, *cell) for grid, *cell in one.cells]
                first += len(one.grids)
            grid = layout.grid[row, columns]
            cell = layout.cell[row, columns].masked_fill(grid.unsqueeze(1) < 0, 0)
            assert torch.cat([grid.unsqueeze(1), cell], 1).tolist() == [list(one) for one in wanted]


@every_family
@pytest.mark.parametrize("number", [0, 1, 2])
@torch.no_grad()
def test_every_image_token_has_its_cell(family: Family, number: int) -> None:
    """Pictures of several sizes and videos, several in a row of a padded batch, called plainly and by `generate`."""
    model, sizes = tiny.model(family.name), (*family.sizes, *family.sizes)
    frames = family.video[0]
    first, second = [("image", sizes[number])], [("image", sizes[number + 1]), ("image", sizes[number])]
    if "video" in family.kinds:
        first = [("video", family.video), *first]
        second.insert(1, ("video", (frames + number * (family.axes > 1), *family.video[1:])))
    rows = [[3, *(part for one in parts for part in (one, 2))] for parts in (first, second)]
    inputs = family.prompt(rows)
    seen = [[family.write(*one) for one in parts] for parts in (first, second)]
    check_layout(model, inputs, seen)
    with recorded(model) as steps:
        generated(model, DynamicCache(), inputs, tokens=1)
    check_layout(model, steps[0].inputs, seen)


@positioned
def test_cells_are_the_positions_that_the_model_gives(family: Family) -> None:
    """Row and column of a cell are the model's own positions, counted from the image's first."""
    model = tiny.model(family.name)
    inputs = family.prompt([[2, ("video", (3, 2, 4)), 3, ("image", (1, 4, 2)), 1, ("image", (1, 1, 5)), 2]])
    positions, _ = model.model.get_rope_index(**inputs)
    layout = adapter_for(model).image_layout(model, inputs["input_ids"], inputs)
    for number in range(len(layout.grids[0])):
        columns = (layout.grid[0] == number).nonzero().flatten()
        own = positions[1:, 0, columns]
        assert torch.equal(layout.cell[0, columns], (own - own.amin(1, keepdim=True)).T)
    assert len(layout.grids[0]) == 5


# -- pictures as image processors hand them on ----------------------------------------------------------------------

PICTURES = [(37, 90), (80, 44), (61, 61)]  # height and width in pixels
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2VL", {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 1024}),
    "qwen3_vl": ("Qwen2VL", {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 1024}),
    "llava_next_video": ("LlavaNext", {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    "llava_onevision": ("LlavaOnevision", {"size": {"height": 20, "width": 20}}),
    "mistral3": ("Pixtral", {"patch_size": 8, "size": {"longest_edge": 64}}),
    "internvl": ("GotOcr2", {"size": {"height": 24, "width": 24}, "crop_to_patches": True, "max_patches": 4}),
    "idefics3": ("Idefics3", {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}),
    "gemma3": (
        "Gemma3",
        {
            "size": {"height": 24, "width": 24},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 8,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    "paligemma": ("Siglip", {"size": {"height": 16, "width": 16}}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("picture", PICTURES, ids=str)
@torch.no_grad()
def test_a_picture_from_its_processor_has_as_many_cells_as_features(name: str, picture: tuple[int, int]) -> None:
    """The grids cover what the model makes of the pixels, and a reducer takes them."""
    kind, settings = PROCESSORS[name]
    processor = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(
        transformers, f"{kind}ImageProcessor"
    )
    model = tiny.model(name)
    if hasattr(model.config, "image_grid_pinpoints"):
        settings = {**settings, "image_grid_pinpoints": model.config.image_grid_pinpoints}
    image = np.random.default_rng(sum(picture)).integers(0, 255, (*picture, 3), dtype=np.uint8)
    found = dict(processor(**settings)([image], return_tensors="pt"))
    found = {key: value for key, value in found.items() if key not in ("num_patches", "num_crops", "rows", "cols")}
    features = model.model.get_image_features(**found, return_dict=True).pooler_output
    counts = [len(one) for one in features]
    between = [7] if name in ("idefics3", "gemma3") else []  # whose tiles are apart
    ids = [5, *(number for count in counts for number in (*[IMAGE] * count, *between)), 6, 8]
    inputs = {"input_ids": torch.tensor([ids]), **found}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if FAMILIES[name].axes > 1:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if FAMILIES[name].typed is not None:
        inputs["token_type_ids"] = FAMILIES[name].types(inputs["input_ids"])
    layout = adapter_for(model).image_layout(model, inputs["input_ids"], inputs)
    cells = sum(grid.height * grid.width for grid in layout.grids[0])
    assert cells == int((layout.grid >= 0).sum()) and layout.image_tokens == [sum(counts)]
    reducer = None if name in SLIDING else "uniform_grid"
    cache = CompressedCache(model, "full", reducer=reducer)
    model(**inputs, **tiny.with_cache(cache))
    assert cache.report().image_tokens[0] == [sum(counts)]
    assert reducer is None or cache.report().vision_retention < 0.9


# -- reducers ----------------------------------------------------------------------------------------------------------


def kept_positions(cache: CompressedCache, row: int) -> list[int]:
    """Columns of a row that the first layer got."""
    return held(cache)[0][row][0]


@every_reduced_family
@torch.no_grad()
def test_what_a_reducer_leaves_is_read_at_its_own_positions(family: Family) -> None:
    """Tokens dropped before the first layer are as if the decoder had been given the others alone."""
    model, decoder = tiny.model(family.name), tiny.untouched(family.name).get_decoder()
    whole = family.prompt([[7, ("image", family.sizes[0]), 6, *_video(family)]])
    cache = CompressedCache(model, "full", reducer={"name": "uniform_grid", "after": [0], "keep_shares": [0.5]})
    given: dict[str, Any] = {}
    outputs: list[Tensor] = []
    handles = [
        model.get_decoder().register_forward_pre_hook(lambda m, a, kwargs: given.update(kwargs), with_kwargs=True),
        model.get_decoder().register_forward_hook(lambda m, a, output: outputs.append(output.last_hidden_state)),
    ]
    model(**whole, **tiny.with_cache(cache))
    for handle in handles:
        handle.remove()
    kept = kept_positions(cache, 0)
    assert cache.report().vision_retention < 0.6
    columns = torch.arange(whole["input_ids"].shape[1])
    less = {"inputs_embeds": given["inputs_embeds"][:, kept]}
    positions = given.get("position_ids")
    less["position_ids"] = columns[None, kept] if positions is None else positions[..., kept]
    if given.get("visual_pos_masks") is not None:
        stays = torch.isin(columns, torch.tensor(kept))[given["visual_pos_masks"][0]]
        less["visual_pos_masks"] = given["visual_pos_masks"][:, kept]
        less["deepstack_visual_embeds"] = [features[stays] for features in given["deepstack_visual_embeds"]]
    if family.typed == "prompt":
        less["attention_mask"] = torch.ones(1, 1, len(kept), len(kept), dtype=torch.bool)
    wanted = decoder(**less, **tiny.with_cache(DynamicCache())).last_hidden_state
    torch.testing.assert_close(outputs[0][:, kept], wanted, rtol=0, atol=2e-5)


def _video(family: Family) -> list[Any]:
    return [("video", family.video), 3] if "video" in family.kinds else []


@every_reduced_family
@torch.no_grad()
def test_generate_and_a_plain_call_reduce_the_same(family: Family) -> None:
    """In a padded batch, whose tokens a plain call and `generate` place alike."""
    model, inputs = tiny.model(family.name), family.two_rows()
    plain, whole = (CompressedCache(model, "full", reducer=MERGING) for _ in range(2))
    first = 0 if family.name != "paligemma" else 1  # where the family begins to count
    at = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + first
    positions = {} if family.axes > 1 else {"position_ids": at}
    model(**inputs, **positions, **tiny.with_cache(plain))
    generated(model, whole, inputs, tokens=1)
    assert plain.report() == whole.report()
    assert plain.report().vision_retention < 0.9


@torch.no_grad()
def test_hooks_of_a_cache_of_the_language_model_alone_are_no_obstacle() -> None:
    """Which knows nothing of what the whole model adds after its first layers."""
    family = FAMILIES["qwen3_vl"]
    model, inputs = tiny.build(family.name), family.two_rows()
    hooks.reduce_between(list(model.get_decoder().layers))
    settings = {"name": "uniform_grid", "after": [0], "keep_shares": [0.5]}
    found, wanted = (CompressedCache(one, "full", reducer=settings) for one in (model, tiny.model(family.name)))
    logits = model(**inputs, **tiny.with_cache(found)).logits
    assert torch.equal(logits, tiny.model(family.name)(**inputs, **tiny.with_cache(wanted)).logits)


@pytest.mark.parametrize("family", [one for one in FAMILIES.values() if "video" in one.kinds], ids=lambda one: one.name)
@torch.no_grad()
def test_every_frame_of_a_video_has_windows_of_its_own(family: Family) -> None:
    """Of each frame's tokens, in every window, half are merged into the other half."""
    model = tiny.model(family.name)
    size = (3, *family.video[1:])
    inputs = family.prompt([[3, ("video", size), 4]])
    cache = CompressedCache(model, "full", reducer=MERGING)
    model(**inputs, **tiny.with_cache(cache))
    layout = adapter_for(model).image_layout(model, inputs["input_ids"], inputs)
    left = layout.grid[0, held(cache)[1][0][0]]
    tokens = layout.grids[0][0].height * layout.grids[0][0].width
    assert tokens >= 8
    assert [int((left == frame).sum()) for frame in range(3)] == [tokens - tokens // 2] * 3


# -- positions of three axes -------------------------------------------------------------------------------------------


@positioned
def test_a_conversation_goes_on_at_its_own_positions(family: Family, tmp_path: Path) -> None:
    """Whatever the model read in between, and in another process, which has read nothing."""
    inputs, model = family.prompt([[5, ("image", (1, 5, 4)), 4]]), tiny.model(family.name)
    cache = CompressedCache(model, "prefixkv", budget=0.6)
    first = generated(model, cache, inputs)
    turn = next_turn(first, inputs["attention_mask"], 5, seed=4)
    wanted = generated(model, copy.deepcopy(cache), turn)
    cache.save(tmp_path / "story")
    generated(model, CompressedCache(model, "uniform"), family.prompt([[6, ("image", (1, 2, 9)), 2]]), tokens=1)
    assert torch.equal(generated(model, cache, turn), wanted)
    model.model.rope_deltas = None
    assert torch.equal(generated(model, CompressedCache.load(model, tmp_path / "story"), turn), wanted)


@positioned
def test_rows_take_their_positions_along(family: Family) -> None:
    """A row that is repeated or chosen goes on as it does in its own batch."""
    inputs, model = family.two_rows(), tiny.model(family.name)
    cache = CompressedCache(model, "prefixkv", budget=0.6)
    first = generated(model, cache, inputs)
    turn = next_turn(first, inputs["attention_mask"], 5, seed=4)
    wanted = generated(model, copy.deepcopy(cache), turn)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    found = generated(model, cache, {name: value[[1, 0, 1]] for name, value in turn.items()})
    assert torch.equal(found, wanted[[1, 0, 1]])


@positioned
def test_tokens_taken_back_leave_the_positions_of_a_conversation_that_ended_there(family: Family) -> None:
    """Before an image, after it and within it; a turn that follows is that of a conversation which never went on."""
    model, wide, tall = tiny.model(family.name), ("image", (1, 3, 6)), ("image", (1, 6, 3))
    rows = [[6, wide, 3, tall, 4], [4, tall, 3, wide, 4]]
    inputs, cache = family.prompt(rows), CompressedCache(model, "full")
    ids = generated(model, cache, inputs)
    positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in inputs if "pixel" not in name})
    seen, valid = int(cache.get_seq_length()), inputs["attention_mask"].bool()
    for columns in range(6, valid.shape[1], 3):
        shorter = copy.deepcopy(cache)
        shorter.crop(columns - seen)
        highest = positions.amax(0).masked_fill(~valid, -1)[:, :columns].amax(1)
        wanted = (highest + 1 - valid[:, :columns].sum(1))[:, None]
        assert torch.equal(shorter._state.sequence.rotary_offset, wanted)
    for number, columns in ((1, 6), (3, 29)):
        shorter, fresh = copy.deepcopy(cache), CompressedCache(model, "full")
        shorter.crop(columns - seen)
        less = family.prompt([row[:number] for row in rows])
        if number > 1:  # the first image of each row
            less["pixel_values"] = inputs["pixel_values"].unflatten(0, (4, -1))[::2].flatten(0, 1)
        assert torch.equal(less["input_ids"], ids[:, :columns])
        turn = next_turn(ids[:, :columns], less["attention_mask"], 5, seed=8)
        whole = {**less, **turn}
        if number > 1:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(less["mm_token_type_ids"], (0, 5))
        else:
            whole = turn
        assert torch.equal(generated(model, shorter, turn), generated(model, fresh, whole))


@positioned
def test_a_later_turn_is_taken_back_to_the_positions_of_the_one_before(family: Family) -> None:
    """A turn of text, decode steps, and an image, of which nothing is left."""
    model, inputs = tiny.model(family.name), family.prompt([[5, ("image", (1, 5, 4)), 4]])
    cache, nothing = CompressedCache(model, "full"), torch.ones_like(inputs["input_ids"][:, :0])
    first = generated(model, cache, next_turn(nothing, nothing, 4, seed=5))
    seen, copied = int(cache.get_seq_length()), copy.deepcopy(cache)
    ids = torch.cat([first, inputs["input_ids"]], 1)
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (first.shape[1], 0))
    whole = {**inputs, "input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    generated(model, cache, whole)
    if tiny.CACHE == "cache":  # releases before 5.24 place a later turn's image as text
        assert int(cache._state.sequence.rotary_offset) < 0
    cache.crop(seen - int(cache.get_seq_length()))
    turn = next_turn(first, torch.ones_like(first), 4, seed=6)
    assert torch.equal(generated(model, cache, turn), generated(model, copied, turn))


@positioned
def test_an_image_of_a_later_turn_has_the_positions_that_a_dynamic_cache_gives_it(family: Family) -> None:
    """A turn of text, one with an image, and one of text."""
    inputs = family.prompt([[5, ("image", (1, 5, 4)), 4]])
    found = []
    for model, cache in (
        (tiny.untouched(family.name), DynamicCache()),
        (tiny.model(family.name), CompressedCache(tiny.model(family.name), "prefixkv", budget=1.0)),
    ):
        mask = torch.ones_like(inputs["input_ids"][:, :0])
        first = generated(model, cache, next_turn(mask, mask, 4, seed=5))
        ids = torch.cat([first, inputs["input_ids"]], 1)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (first.shape[1], 0))
        whole = {**inputs, "input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
        second = generated(model, cache, whole)
        found.append(generated(model, cache, next_turn(second, torch.ones_like(second), 4, seed=3)))
    assert torch.equal(*found)


@positioned
def test_beams_read_the_same_images(family: Family) -> None:
    """The rows that `generate` makes of one have its images, which a reducer sees in each of them."""
    inputs, model = family.two_rows(), tiny.model(family.name)
    cache = CompressedCache(model, "prefixkv", budget=1.0)
    wanted = generated(tiny.untouched(family.name), DynamicCache(), inputs, num_beams=2)
    assert torch.equal(generated(model, cache, inputs, num_beams=2), wanted)
    cache = CompressedCache(model, "full", reducer=MERGING)
    generated(model, cache, inputs, tokens=1, num_beams=2)
    counts = cache.report().image_tokens[0]
    assert counts[0] == counts[1] and counts[2] == counts[3] and cache.report().vision_retention < 0.9


@positioned
@torch.no_grad()
def test_a_new_conversation_begins_at_zero(family: Family) -> None:
    """Plain calls for text alone are not moved by images of an earlier conversation."""
    model = tiny.model(family.name)
    model(**family.prompt([[5, ("image", (1, 5, 4)), 4]]), **tiny.with_cache(CompressedCache(model, "full")))
    ids = text_ids(1, 7, seed=2)
    cache, whole = CompressedCache(model, "full"), tiny.untouched(family.name)
    model(ids[:, :5], **tiny.with_cache(cache))
    found = model(ids[:, 5:], **tiny.with_cache(cache)).logits[:, -1]
    torch.testing.assert_close(found, whole(ids).logits[:, -1], rtol=0, atol=1e-5)


@positioned
@torch.no_grad()
def test_a_plain_call_with_a_mask_and_no_positions_is_refused_after_images(family: Family) -> None:
    """What transformers makes of it are positions of other tokens; without the mask, or with positions, it goes on."""
    model, inputs = tiny.model(family.name), family.prompt([[5, ("image", (1, 5, 4)), 4]])
    cache = CompressedCache(model, "uniform", budget=0.8)
    model(**inputs, **tiny.with_cache(cache))
    step = {"input_ids": torch.tensor([[5]])}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(UnsupportedModeError, match=r"position_ids: .*all 32 positions.*leave attention_mask out"):
        model(**step, attention_mask=mask, **tiny.with_cache(cache))
    at = (mask.cumsum(1) - 1)[:, -1:] + model.model.rope_deltas
    copied = copy.deepcopy(cache)
    given = model(**step, attention_mask=mask, position_ids=at.expand(3, 1, 1), **tiny.with_cache(copied))
    assert torch.equal(model(**step, **tiny.with_cache(cache)).logits, given.logits)


@positioned
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scorer": "expected_attention"}, r"scorer expected_attention: .*3 numbers \(M-RoPE\); choose another"),
        ({"scorer": "leverage"}, r"scorer leverage: .*\(M-RoPE\)"),
        ({"scorer": "kvzip"}, r"scorer kvzip: .*\(M-RoPE\)"),
        ({"reducer": {"name": "lightkv", "positions": "contiguous"}}, "positions='contiguous'.*choose positions='orig"),
        ({"reducer": {"name": "lightkv", "positions": "per_layer"}}, "positions='per_layer'"),
    ],
    ids=str,
)
def test_what_takes_a_position_to_be_one_number_is_refused(family: Family, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        CompressedCache(tiny.model(family.name), "snapkv", **settings)


@torch.no_grad()
def test_frames_of_a_video_are_no_tiles_of_an_image() -> None:
    """Frames of 12 x 12 tokens have the windows of a picture, four along each side, where tiles are split into six."""
    family = FAMILIES["qwen2_5_vl"]
    model, inputs = tiny.model(family.name), family.prompt([[3, ("video", (2, 12, 12)), 4]])
    cache = CompressedCache(model, "full", reducer={"name": "lightkv", "after": [1], "windows": None})
    model(**inputs, **tiny.with_cache(cache))
    assert [layer[0] for layer in cache.report().image_tokens] == [288, 16 * 2 * 5, 16 * 2 * 5]


@torch.no_grad()
def test_one_image_of_several_has_no_tiles_in_llava_onevision() -> None:
    """Where `batch_num_images` says so, from the sizes and from the features that `generate` makes."""
    family, side = FAMILIES["llava_onevision"], 5
    model, ids = tiny.model(family.name), torch.tensor([[5, *[IMAGE] * 26, 6, *[IMAGE] * 26, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_sizes": torch.tensor([[20, 40], [40, 20]]),
    }
    inputs |= {"pixel_values": torch.zeros(2, 1, 3, 20, 20), "batch_num_images": torch.tensor([2])}
    seen = [family.write("image", family.sizes[0])] * 2
    alone = [replace(one, grids=one.grids[:1], cells=[*one.cells[: side**2], (-1, 0, 0)]) for one in seen]
    check_layout(model, inputs, [alone])
    with recorded(model) as steps:
        generated(model, DynamicCache(), inputs, tokens=1)
    check_layout(model, steps[0].inputs, [alone])


@pytest.mark.parametrize("name", ["vipllava", "internvl", "idefics3", "smolvlm"])
@pytest.mark.parametrize("pixels", [16, 24, 40])
def test_tiles_are_as_large_as_the_tower_makes_them(name: str, pixels: int) -> None:
    """Towers of one size, whose pictures are scaled to it."""
    model = copy.deepcopy(tiny.model(name))
    tower = model.config.vision_config
    tower.image_size = pixels if isinstance(tower.image_size, int) else [pixels, pixels]
    side = pixels // 4 if name == "vipllava" else pixels // 8
    ids = torch.tensor([[5, *[IMAGE] * side**2, 7]])
    layout = adapter_for(model).image_layout(model, ids, {})
    assert [(grid.height, grid.width) for grid in layout.grids[0]] == [(side, side)]
    with pytest.raises(UnsupportedModelError, match=rf"row 0 has {side**2 - 1} image tokens"):
        adapter_for(model).image_layout(model, ids[:, 2:], {})


@positioned
def test_images_whose_shape_nothing_tells_are_refused(family: Family) -> None:
    model, ids = tiny.model(family.name), torch.tensor([[5, *[IMAGE] * 12, 7]])
    with pytest.raises(UnsupportedModelError, match="reducer: nothing tells the shape of the images; pass image_grid"):
        adapter_for(model).image_layout(model, ids, {})
