"""Tiny vision models with random weights and the true architecture, and prompts as their processors write them.

Ids of text lie below those of `MARKS`; every prompt is a batch of two rows, the shorter one padded on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.testing import models
from tests import tiny

IMAGE, VIDEO, START, END, BREAK = 96, 95, 94, 93, 92  # ids of tokens
MARKS = BREAK
Size = tuple[int, int, int]  # frames, rows and columns of tokens

TEXT: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
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
        apart: whether each grid counts as an image.
    """

    kind: str
    size: Size
    ids: list[int]
    grids: list[tuple[int, int]]
    cells: list[tuple[int, int, int]]
    apart: bool = False


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of its tiny model.
        write: a picture or video of so many frames, rows and columns, from its kind and size.
        pixels: the other inputs, from everything that a batch holds, in order.
        kinds: what it sees.
        sizes: of three pictures, in patches.
        video: size of the video in the prompts.
        axes: positions of a token.
        typed: what `token_type_ids` say attends to tokens after it too: "images", each, or the whole "prompt".
    """

    name: str
    write: Callable[[str, Size], Written]
    pixels: Callable[[list[Written]], dict[str, Any]]
    kinds: Sequence[str] = ("image",)
    sizes: Sequence[Size] = ((1, 2, 6), (1, 4, 4), (1, 5, 3))
    video: Size = (2, 2, 6)
    axes: int = 1
    typed: str | None = None

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
        if self.typed is not None:
            inputs["token_type_ids"] = self.types(ids)
        return inputs

    def types(self, ids: Tensor) -> Tensor:
        """What its processor says of each token: 1 for those of an image, or 0 for those of a prompt."""
        return (ids == IMAGE).int() if self.typed == "images" else torch.zeros_like(ids)

    def two_rows(self, seed: int = 0) -> dict[str, Any]:
        """A picture each between text, and a video if the family sees any."""
        rows: list[list[Any]] = [[7, ("image", self.sizes[0]), 6], [4, ("image", self.sizes[1]), 5]]
        if "video" in self.kinds:
            rows[0] += [("video", self.video), 3]
        return self.prompt(rows, seed)


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


def _qwen3_vl_moe() -> PreTrainedModel:
    dense = _qwen3_vl().config.to_dict()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**dense["text_config"], **experts, "model_type": "qwen3_vl_moe_text"},
        vision_config={**dense["vision_config"], "model_type": "qwen3_vl_moe_vision"},
        **_QWEN_IDS,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


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


tiny.add("qwen3_vl_moe", _qwen3_vl_moe)
_add(_qwen2_vl, Family("qwen2_vl", _qwen, _qwen_pixels, ("image", "video"), axes=3))
_add(_qwen2_5_vl, Family("qwen2_5_vl", _qwen, _qwen_pixels, ("image", "video"), axes=3))
_add(_qwen3_vl, Family("qwen3_vl", _qwen3, _qwen_pixels, ("image", "video"), axes=3))


# -- what features a model makes of a picture's patches, each of which carries its own row and column --------------


def places(height: int, width: int) -> Tensor:
    """Row and column of each patch, `[patches, 2]`."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()


def cells_of(features: Tensor, grid: int) -> list[tuple[int, int, int]]:
    """Cells of features that still carry their rows and columns, `[tokens, 2]`, however these were averaged."""
    row, column = (torch.unique(axis.round(decimals=3), return_inverse=True)[1].tolist() for axis in features.T)
    return [(grid, *cell) for cell in zip(row, column, strict=True)]


def size_of(cells: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Height and width of a grid."""
    return max(row for _, row, _ in cells) + 1, max(column for _, _, column in cells) + 1


# -- LLaVA-NeXT-Video and LLaVA-OneVision ------------------------------------------------------------------------------

_TILE = 20  # pixels along a side
_PINPOINTS = [[a * _TILE, b * _TILE] for a, b in ((1, 2), (2, 1), (2, 2))]
_LLAVA_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}


def _llava_next_video() -> PreTrainedModel:
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER, image_size=24, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT),
        image_grid_pinpoints=[[a * 24, b * 24] for a, b in ((1, 2), (2, 1), (2, 2))],
        vision_feature_layer=-2,
        **_LLAVA_IDS,
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def _llava_onevision() -> PreTrainedModel:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_TOWER, image_size=20, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",
        **_LLAVA_IDS,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _tiles(name: str) -> tuple[Any, int]:
    model = tiny.model(name).model
    return model, model.config.vision_config.image_size


def _tiled(name: str) -> Callable[[str, Size], Written]:
    def write(kind: str, size: Size) -> Written:
        """A base and tiles with line ends, as the model packs them; a video's frames as it pools them."""
        model, pixels = _tiles(name)
        side = pixels // 4
        if kind == "video":
            frames, features = size[0], places(side, side).unsqueeze(0)
            if name == "llava_onevision":
                pooled = model.apply_pooling(features)[0]
            else:
                pooled = model.vision_resampler(features)[0]
            cells = [cell for frame in range(frames) for cell in cells_of(pooled, frame)]
            ends = [(-1, 0, 0)] if name == "llava_onevision" else []
            return Written(
                kind, size, [START, *[VIDEO] * len(cells + ends), END], [size_of(cells)] * frames, cells + ends
            )
        image_size = torch.tensor([[4 * size[1], 4 * size[2]]])
        tiles = transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches(
            image_size[0], model.config.image_grid_pinpoints, pixels
        )
        patches, newline = torch.zeros(tiles, side**2, 2), torch.full((2,), -1.0)
        more = ("default",) if name != "llava_onevision" else ()
        aspect = {} if more else {"vision_aspect_ratio": model.config.vision_aspect_ratio}
        (features,), _ = model.pack_image_features([patches], image_size, *more, image_newline=newline, **aspect)
        cells, row, column = cells_of(places(side, side), 0), 0, 0
        for feature in features[side**2 :]:
            end = bool((feature < 0).all())
            cells.append((-1, 0, 0) if end else (1, row, column))
            row, column = (row + 1, 0) if end else (row, column + 1)
        grids = [(side, side), size_of([cell for cell in cells if cell[0] == 1])]
        return Written(kind, size, [START, *[IMAGE] * len(cells), END], grids, cells)

    return write


def _tiled_pixels(name: str) -> Callable[[list[Written]], dict[str, Any]]:
    def pixels(seen: list[Written]) -> dict[str, Any]:
        _, side = _tiles(name)
        pictures = [one.size for one in seen if one.kind == "image"]
        videos = [one.size for one in seen if one.kind == "video"]
        found: dict[str, Any] = {}
        if pictures:
            sizes = torch.tensor([[4 * height, 4 * width] for _, height, width in pictures])
            found |= {"pixel_values": random_pixels(len(pictures), 5, 3, side, side), "image_sizes": sizes}
        if videos:
            assert len({frames for frames, _, _ in videos}) == 1  # a batch of them has as many frames each
            found["pixel_values_videos"] = random_pixels(len(videos), videos[0][0], 3, side, side)
        return found

    return pixels


for _name, _builder in (("llava_next_video", _llava_next_video), ("llava_onevision", _llava_onevision)):
    _family = Family(
        _name, _tiled(_name), _tiled_pixels(_name), ("image", "video"), ((1, 5, 10), (1, 12, 5), (1, 11, 12))
    )
    _add(_builder, _family)


# -- VipLLaVA ----------------------------------------------------------------------------------------------------------


def _vipllava() -> PreTrainedModel:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER, image_size=16, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    plural = hasattr(config, "vision_feature_layers")  # before transformers 5.24
    setattr(config, f"vision_feature_layer{'s' * plural}", [-1, -2])
    return transformers.VipLlavaForConditionalGeneration(config)


def _square(kind: str, size: Size) -> Written:
    cells = cells_of(places(4, 4), 0)
    return Written(kind, size, [IMAGE] * 16, [(4, 4)], cells)


_add(_vipllava, Family("vipllava", _square, lambda seen: {"pixel_values": random_pixels(len(seen), 3, 16, 16)}))


# -- Mistral 3 ---------------------------------------------------------------------------------------------------------


def _mistral3() -> PreTrainedModel:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**_TOWER, image_size=64),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _merged(kind: str, size: Size) -> Written:
    """Features merged in squares, a break after each of their rows but the last, which an end follows."""
    merger = copy.deepcopy(tiny.model("mistral3").model.multi_modal_projector.patch_merger)
    merger.merging_layer = nn.Identity()
    features = merger(places(*size[1:]), torch.tensor([size[1:]]) * 4).view(-1, 2, 4).mean(-1)
    cells = cells_of(features, 0)
    height, width = size_of(cells)
    ids = ([IMAGE] * width + [BREAK]) * height
    return Written(kind, size, [*ids[:-1], END], [(height, width)], cells)


def _merged_pixels(seen: list[Written]) -> dict[str, Any]:
    sizes = torch.tensor([[4 * height, 4 * width] for _, height, width in (one.size for one in seen)])
    return {"pixel_values": random_pixels(len(seen), 3, *sizes.amax(0).tolist()), "image_sizes": sizes}


_add(_mistral3, Family("mistral3", _merged, _merged_pixels, sizes=((1, 4, 12), (1, 8, 6), (1, 6, 10))))


# -- InternVL, Idefics 3 and SmolVLM -----------------------------------------------------------------------------------


def _internvl() -> PreTrainedModel:
    tower = transformers.InternVLVisionConfig(**_TOWER, image_size=[24, 24])
    config = transformers.InternVLConfig(
        vision_config=tower,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
        vision_feature_layer=-1,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _idefics3() -> PreTrainedModel:
    config = transformers.Idefics3Config(
        vision_config={**_TOWER, "image_size": 24},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> PreTrainedModel:
    config = transformers.SmolVLMConfig(
        vision_config={**_TOWER, "image_size": 24},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _number_of_tiles(size: Size) -> int:
    """All of them, and a small picture of the whole where there are several."""
    return size[1] * size[2] + (size[1] * size[2] > 1)


def _internvl_tiles(kind: str, size: Size) -> Written:
    """One tile after the other."""
    shuffled = tiny.model("internvl").model.pixel_shuffle(places(6, 6).view(1, 6, 6, 2), scale_factor=0.5)
    features, tiles = shuffled.reshape(-1, 4, 2).mean(1), _number_of_tiles(size)
    cells = [cell for tile in range(tiles) for cell in cells_of(features, tile)]
    return Written(kind, size, [START, *[IMAGE] * len(cells), END], [size_of(cells)] * tiles, cells)


def _idefics3_tiles(kind: str, size: Size) -> Written:
    """Each tile between marks of its own."""
    shuffled = tiny.model("idefics3").model.connector.pixel_shuffle(places(6, 6).unsqueeze(0), 2)
    features, tiles = shuffled.reshape(-1, 4, 2).mean(1), _number_of_tiles(size)
    cells = [cell for tile in range(tiles) for cell in cells_of(features, tile)]
    ids = [number for _ in range(tiles) for number in (START, 9, *[IMAGE] * len(features))]
    return Written(kind, size, [*ids, START], [size_of(cells)] * tiles, cells, apart=True)


def _tile_pixels(*before: int) -> Callable[[list[Written]], dict[str, Any]]:
    return lambda seen: {
        "pixel_values": random_pixels(*before, sum(_number_of_tiles(one.size) for one in seen), 3, 24, 24)
    }


_COUNTS = ((1, 1, 1), (1, 1, 2), (1, 2, 2))
_add(_internvl, Family("internvl", _internvl_tiles, _tile_pixels(), sizes=_COUNTS))
_add(_idefics3, Family("idefics3", _idefics3_tiles, _tile_pixels(1), sizes=_COUNTS))
_add(_smolvlm, Family("smolvlm", _idefics3_tiles, _tile_pixels(1), sizes=_COUNTS))


# -- Gemma 3 and PaliGemma ---------------------------------------------------------------------------------------------


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    text = {**TEXT, "head_dim": 16, "sliding_window": 11, "layer_types": kinds, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**_TOWER, image_size=24, vision_use_head=False),
        mm_tokens_per_image=9,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gemma3_crops(kind: str, size: Size) -> Written:
    """The whole, and crops of it if there are several, each between marks of its own; features pooled as they are."""
    projector, crops = tiny.model("gemma3").model.multi_modal_projector, _number_of_tiles(size)
    features = projector.avg_pool(places(6, 6).T.view(1, 2, 6, 6)).flatten(2)[0].T
    cells = [cell for crop in range(crops) for cell in cells_of(features, crop)]
    ids = [number for crop in range(crops) for number in (9, START, *[IMAGE] * 9, END)]
    return Written(kind, size, ids, [size_of(cells)] * crops, cells, apart=True)


def _paligemma(text: transformers.PreTrainedConfig) -> PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**_TOWER, image_size=16, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _paligemma1() -> PreTrainedModel:
    return _paligemma(transformers.GemmaConfig(**TEXT, head_dim=16))


def _paligemma2() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return _paligemma(transformers.Gemma2Config(**TEXT, head_dim=16, sliding_window=11, layer_types=kinds))


_add(_gemma3, Family("gemma3", _gemma3_crops, _tile_pixels(), sizes=_COUNTS, typed="images"))
for _name, _builder in (("paligemma", _paligemma1), ("paligemma2", _paligemma2)):
    _square_pixels = FAMILIES["vipllava"].pixels
    _add(_builder, Family(_name, _square, _square_pixels, typed="prompt"))
