"""Tiny vision models with random weights and the true architecture, and prompts as their processors write them.

Ids of text lie below those of `MARKS`; every prompt is a batch of two rows, the shorter one padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny

IMAGE, VIDEO, START, END, BREAK = 96, 95, 94, 93, 92  # ids of tokens
MARKS = BREAK
Size = tuple[int, int, int]  # frames, rows and columns of tokens

TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Written:
    """A picture or a video as a processor writes it.

    Attributes:
        kind: "image" or "video".
        size: frames, rows and columns of its tokens.
        ids: ids of all its tokens, marks included.
        grids: height and width of each of its grids, in order.
        cells: grid, row and column of each image token; -1 where it has no cell.
    """

    kind: str
    size: Size
    ids: list[int]
    grids: list[tuple[int, int]]
    cells: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of its tiny model.
        write: a picture or video of so many frames, rows and columns, from its kind and size.
        pixels: the other inputs, from everything that a batch holds, in order.
        kinds: what it sees.
        sizes: of pictures in the prompts.
        axes: positions of a token.
    """

    name: str
    write: Callable[[str, Size], Written]
    pixels: Callable[[list[Written]], dict[str, Any]]
    kinds: Sequence[str] = ("image",)
    sizes: Sequence[Size] = ((1, 2, 6), (1, 4, 4))
    axes: int = 1

    def prompt(self, rows: Sequence[Sequence[Any]], seed: int = 0) -> dict[str, Any]:
        """Inputs of rows that each hold numbers of text tokens, and pictures or videos as a kind and a size."""
        seen: list[Written] = []
        written = []
        for number, parts in enumerate(rows):
            ids: list[int] = []
            for place, part in enumerate(parts):
                if isinstance(part, int):
                    ids += text_ids(1, part, seed + 17 * number + place)[0].tolist()
                else:
                    seen.append(self.write(*part))
                    ids += seen[-1].ids
            written.append(ids)
        longest = max(map(len, written))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in written])
        pixels = self.pixels(seen) if seen else {}
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), **pixels}
        if self.axes > 1:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return inputs

    def two_rows(self, seed: int = 0) -> dict[str, Any]:
        """A picture each between text, and a video if the family sees any."""
        rows: list[list[Any]] = [[7, ("image", self.sizes[0]), 6], [4, ("image", self.sizes[1]), 5]]
        if "video" in self.kinds:
            rows[0] += [("video", self.video), 3]
        return self.prompt(rows, seed)

    @property
    def video(self) -> Size:
        """Size of the video in the prompts."""
        return (2, *self.sizes[0][1:])


def text_ids(batch: int, tokens: int, seed: int) -> Tensor:
    """Random text tokens, none of them a mark or padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, MARKS, (batch, tokens), generator=generator)


def random_pixels(*shape: int) -> Tensor:
    """Random pixels, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- Qwen-VL -----------------------------------------------------------------------------------------------------------

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def _qwen2_vl() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}}
    tower = {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}}
    tower = {**_QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    tower |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    rope = {**_MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope}
    tower = {**_QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen(kind: str, size: Size, apart: bool = False) -> Written:
    """Frames one after the other, in Qwen3-VL's videos each between marks of its own, after its time."""
    frames, height, width = size
    token = IMAGE if kind == "image" else VIDEO
    if kind == "video" and apart:
        ids = [number for frame in range(frames) for number in (9 + frame, START, *[token] * (height * width), END)]
    else:
        ids = [START, *[token] * (frames * height * width), END]
    cells = [(f, r, c) for f in range(frames) for r in range(height) for c in range(width)]
    return Written(kind, size, ids, [(height, width)] * frames, cells)


def _qwen_pixels(seen: list[Written]) -> dict[str, Any]:
    inputs = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        sizes = [one.size for one in seen if one.kind == kind]
        if sizes:
            thw = torch.tensor([[frames, 2 * height, 2 * width] for frames, height, width in sizes])
            inputs |= {name: random_pixels(int(thw.prod(1).sum()), 3 * 2 * 4 * 4), f"{kind}_grid_thw": thw}
    return inputs


def _qwen3(kind: str, size: Size) -> Written:
    return _qwen(kind, size, apart=True)


FAMILIES: dict[str, Family] = {}


def _add(builder: Callable[[], PreTrainedModel], family: Family) -> None:
    tiny.add(family.name, builder)
    FAMILIES[family.name] = family


_add(_qwen2_vl, Family("qwen2_vl", _qwen, _qwen_pixels, ("image", "video"), axes=3))
_add(_qwen2_5_vl, Family("qwen2_5_vl", _qwen, _qwen_pixels, ("image", "video"), axes=3))
_add(_qwen3_vl, Family("qwen3_vl", _qwen3, _qwen_pixels, ("image", "video"), axes=3))
