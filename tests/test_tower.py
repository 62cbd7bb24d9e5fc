"""What a vision tower's own attention says of image tokens, against the tower run by itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kvcompress import CompressedCache, restore
from kvcompress.cache import watching
from kvcompress.errors import UnsupportedModeError, UnsupportedModelError
from kvcompress.policies.context import Reduced, ReductionContext
from kvcompress.policies.reducers import VisionZip
from tests import tiny
from tests.vision import FAMILIES

SIDE = 6  # features along a side of an image or tile
seen: list[ReductionContext] = []


class Probe(VisionZip):
    """Tells what it was shown."""

    def reduce(self, layer: ReductionContext) -> Reduced:
        seen.append(layer)
        return super().reduce(layer)


def _llava_siglip() -> Any:
    """A LLaVA whose tower has no class token."""
    tower = {**tiny.VISION, "image_size": 24}
    del tower["projection_dim"]
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(**tower),
        text_config=transformers.LlamaConfig(**tiny.TEXT),
        image_token_id=tiny.IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


tiny.add("siglip_36", _llava_siglip)
MODELS = ("llava_36", "llava_next_36", "siglip_36")


def of_tower(name: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and keys of every patch of every image or tile, in the layer before the last, from the tower alone."""
    tower = copy.deepcopy(tiny.untouched(name)).model.vision_tower
    tower.set_attn_implementation("eager")
    layers = [module for path, module in tower.named_modules() if path.endswith("self_attn")]
    keys: list[Tensor] = []
    hook = layers[-2].k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    with torch.no_grad():
        weights = tower(pixels.flatten(0, -4), output_attentions=True, return_dict=True).attentions[-2]
    hook.remove()
    heads = weights.shape[1]
    key = torch.stack(keys[0].chunk(heads, -1)).mean(0)
    if "siglip" in name:
        return weights.mean((1, 2)), key
    return weights[:, :, 0, 1:].mean(1), key[:, 1:]


def tiles_of(name: str) -> list[tuple[int, int] | None]:
    """Tile and feature of each token of one image; None where a line of tiles ends."""
    raster: list[tuple[int, int] | None] = [(0, number) for number in range(SIDE**2)]
    if "next" in name:
        for row in range(2 * SIDE):
            for column in range(2 * SIDE):
                tile = 1 + 2 * (row // SIDE) + column // SIDE
                raster.append((tile, row % SIDE * SIDE + column % SIDE))
            raster.append(None)
    return raster


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_get_the_attention_of_their_features(name: str, generates: bool) -> None:
    """In the order of each row's images and tiles, in padded rows, by a forward and by `generate`, for beams too."""
    model, tiles = tiny.model(name), tiles_of(name)
    one = tiny.prompt(name, [4, 0, 3, 0, 5], seed=1)
    two = tiny.prompt(name, [6, 0, 2], seed=2)
    length = one["input_ids"].shape[1]
    pad = length - two["input_ids"].shape[1]
    ids = torch.cat([one["input_ids"], torch.nn.functional.pad(two["input_ids"], (pad, 0))])
    pixels = {key: torch.cat([one[key], two[key]]) for key in one if key not in ("input_ids", "attention_mask")}
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    cache = CompressedCache(model, "full", reducer=Probe(drop=0.6))
    seen.clear()
    given = {"input_ids": ids, "attention_mask": mask, **pixels, **tiny.with_cache(cache)}
    beams = 2 if generates else 1
    if generates:
        model.generate(**given, max_new_tokens=2, num_beams=beams, do_sample=False)
    else:
        with torch.no_grad():
            model(**given)
    (shown,) = seen
    assert shown.tower is not None
    attention, keys = of_tower(name, pixels["pixel_values"])
    images = iter(range(3))
    each = len(attention) // 3
    for row in range(2):
        tokens = (ids[row] == tiny.IMAGE_TOKEN).nonzero().flatten().tolist()
        wanted, wanted_keys = torch.zeros(length), torch.zeros(length, keys.shape[2])
        for number in range(len(tokens) // len(tiles)):
            image = next(images)
            for place, tile in enumerate(tiles):
                token = tokens[number * len(tiles) + place]
                if tile is not None:
                    wanted[token] = attention[image * each + tile[0], tile[1]]
                    wanted_keys[token] = keys[image * each + tile[0], tile[1]]
        for copied in range(beams):
            found = beams * row + copied
            torch.testing.assert_close(shown.tower.attention[found], wanted, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(shown.tower.keys[found], wanted_keys, rtol=1e-4, atol=1e-5)


def test_the_layer_is_that_of_the_features() -> None:
    """Another `vision_feature_layer`, of the call, is another layer's attention."""
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [4, 0, 5], seed=1)
    found = []
    for layer in (None, -2, -1):
        seen.clear()
        more = {} if layer is None else {"vision_feature_layer": layer}
        cache = CompressedCache(model, "full", reducer=Probe())
        with torch.no_grad():
            model(**inputs, **more, **tiny.with_cache(cache))
        assert seen[0].tower is not None
        found.append(seen[0].tower.attention)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_a_tower_is_watched_only_where_somebody_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks stay on the tower, look at nothing for other caches, and `restore` takes them off."""
    model, inputs = tiny.build("llava_36"), tiny.prompt("llava_36", [4, 0, 5], seed=1)
    CompressedCache(model, "full", reducer="visionzip")
    asked = []
    monkeypatch.setattr(watching, "look", lambda *args: asked.append(args))
    for other in (CompressedCache(model, "full", reducer="divprune"), transformers.DynamicCache()):
        with torch.no_grad():
            model(**inputs, **tiny.with_cache(other))
    assert not asked
    restore(model)
    modules: list[nn.Module] = list(model.model.vision_tower.modules())
    assert not any(module._forward_pre_hooks for module in modules)


# VipLLaVA's is read; where layers slide, no reducer acts at all.
_OTHERS = [name for name in FAMILIES if name not in ("vipllava", "gemma3")]


@pytest.mark.parametrize("name", [*_OTHERS, "llava_pixtral"])
def test_towers_that_cannot_be_read_are_refused(name: str) -> None:
    """Where several features make up a token, or the tower is of another kind; before anything is touched."""
    with pytest.raises(UnsupportedModelError, match=r"tower, but .* choose a reducer|slide or sum up"):
        CompressedCache(tiny.model(name), "full", reducer="visionzip")


def test_images_without_pixels_are_refused() -> None:
    """Nobody ran the tower."""
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [4, 0, 5], seed=1)
    cache = CompressedCache(model, "full", reducer="visionzip")
    del inputs["pixel_values"]
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModeError, match="image features came ready made; pass pixel_values"),
    ):
        model(**inputs, **tiny.with_cache(cache))


def test_features_of_other_images_are_refused() -> None:
    """There must be one for each image token, or for each of every copy of a row."""
    model = tiny.model("llava_36")
    cache = CompressedCache(model, "full", reducer=VisionZip())
    watch = watching.begin(VisionZip(), cache._adapter, model, {})
    watching.end()
    watch.seen.append(torch.zeros(2, SIDE**2 + 1, 3))
    with pytest.raises(UnsupportedModeError, match="made 72 features in this call, but this forward has 36 image"):
        watch.by_position(cache._adapter, model, torch.ones(1, SIDE**2, dtype=torch.bool))


def test_a_whole_model_keeps_as_many_tokens_as_it_says() -> None:
    """Every layer gets the share that stays, of which a share was merged."""
    model, inputs = tiny.model("llava_36"), tiny.prompt("llava_36", [4, 0, 5], seed=1)
    for contextual in (0.0, 0.25):
        cache = CompressedCache(model, "full", reducer={"name": "visionzip", "drop": 0.5, "contextual": contextual})
        with torch.no_grad():
            model(**inputs, **tiny.with_cache(cache))
        report = cache.report()
        assert report.layer_lengths == [[9 + 18]] * 3
        (into,) = report.went_into[0]
        assert (-1 in into) == (contextual == 0)
        targets = {to for column, to in enumerate(into) if to not in (column, -1)}
        assert len(targets) <= math.floor(18 * contextual + 0.5)
