"""A look into one prompt: how important its tokens are to each layer, and which of them each layer keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation.image_grid import PatchGrid, image_positions, patch_grids
from kvcompress.evaluation.inequality import gini
from kvcompress.evaluation.models import LoadedModel
from kvcompress.policies.base import Scorer


@dataclass(frozen=True)
class Inspection:
    """What a compressed cache did with one prompt.

    Attributes:
        tokens: of the prompt.
        importance: of every token to each layer before anything was evicted, mean over heads, `[layers][tokens]`.
        gini: of each layer's importance, 0 (all tokens alike) to 1.
        scored_by: the scorer whose importance this is.
        report: what the cache holds after the prompt.
        image: positions of the image tokens.
        grid: where they lie on the (first) image, of LLaVA-NeXT on its base; None without an image.
        picture: the image as the model saw it, cut and scaled, `[height][width][3]`, 0 to 1; None without one.
    """

    tokens: int
    importance: list[list[float]] = field(repr=False)
    gini: list[float]
    scored_by: str
    report: CacheReport
    image: list[int] = field(repr=False)
    grid: PatchGrid | None = field(repr=False)
    picture: Tensor | None = field(repr=False)

    @property
    def given(self) -> list[int]:
        """Tokens that each layer got: those of the prompt, or what a reducer left of them."""
        return [rows[0] for rows in self.report.layer_tokens]

    @property
    def kept(self) -> list[int]:
        """Tokens that each layer holds; where heads differ, each of them holds so many."""
        return [rows[0] for rows in self.report.layer_lengths]

    @property
    def retention(self) -> list[float]:
        """Kept / seen of each layer."""
        return [kept / self.tokens for kept in self.kept]

    @property
    def image_kept(self) -> list[float]:
        """Image tokens that each layer holds, mean over heads where they differ."""
        image, found = set(self.image), []
        for layer in self.report.held_positions:
            sets = layer[0]
            found.append(sum(len(image.intersection(held)) for held in sets) / len(sets))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The figures with the names they have as JSON; importance of single tokens and positions are left out."""
        return {
            "prompt_tokens": self.tokens,
            "image_tokens": len(self.image),
            "scored_by": self.scored_by,
            "gini_per_layer": self.gini,
            "given_per_layer": self.given,
            "kept_per_layer": self.kept,
            "retention_per_layer": self.retention,
            "image_kept_per_layer": self.image_kept if self.image else None,
            "retention": self.report.retention,
            "threshold": None if self.report.threshold is None else self.report.threshold[0],
            "kv_bytes": self.report.kv_bytes,
            "index_bytes": self.report.index_bytes,
            "full_kv_bytes": self.report.full_kv_bytes,
            "notes": self.report.notes,
        }


@torch.inference_mode()
def inspect(loaded: LoadedModel, inputs: dict[str, Tensor], config: CompressionConfig) -> Inspection:
    """Reads one prompt twice: with a cache that scores and keeps everything, and with the one to be looked at.

    Importance is that of the configuration's scorer. Where there is none, or its scores do not add up to a mass that
    could be shared out, it is PrefixKV's: attention summed over all queries. It is read without a reducer.

    Args:
        loaded: the model.
        inputs: what `encode_prompt` gave; one row.
        config: how the cache is compressed.

    Raises:
        ConfigError: if there is more than one row.

    Example:
        >>> from kvcompress import CompressionConfig
        >>> from kvcompress.evaluation import encode_prompt, inspect, load_model
        >>> loaded = load_model("shapes")
        >>> found = inspect(loaded, encode_prompt(loaded, "how many circles?"), CompressionConfig.preset("prefixkv"))
        >>> len(found.gini), found.scored_by
        (8, 'attention')
    """
    rows = inputs["input_ids"].shape[0]
    if rows != 1:
        raise ConfigError(f"inputs: one prompt at a time is looked at; got {rows} rows")
    scorer = config.scorer if config.scorer is not None and config.scorer.mass else "attention"
    scoring = CompressionConfig.preset("full", scorer=scorer)
    importance = _importance(loaded, inputs, scoring)
    cache = CompressedCache(loaded.model, config)
    loaded.model(**inputs, **cache_argument(cache), logits_to_keep=1)
    image = image_positions(loaded, inputs["input_ids"])
    assert isinstance(scoring.scorer, Scorer)
    return Inspection(
        tokens=inputs["input_ids"].shape[1],
        importance=importance.tolist(),
        gini=[gini(layer[None]) for layer in importance],
        scored_by=scoring.scorer.name,
        report=cache.report(),
        image=image,
        grid=next(iter(patch_grids(loaded, inputs)), None),
        picture=_picture(loaded, inputs),
    )


def _importance(loaded: LoadedModel, inputs: dict[str, Tensor], scoring: CompressionConfig) -> Tensor:
    """Head-mean importance, `[layers, tokens]`, float64 on the CPU."""
    cache = CompressedCache(loaded.model, scoring)
    loaded.model(**inputs, **cache_argument(cache), logits_to_keep=1)
    found = []
    for _, importance in cache.ranked():
        assert importance is not None
        found.append(importance[0].double().mean(0).cpu())
    return torch.stack(found)


def _picture(loaded: LoadedModel, inputs: dict[str, Tensor]) -> Tensor | None:
    """Turns pixel values back into the picture; of an image in tiles, the first, which shows all of it."""
    reader, pixels = getattr(loaded.processor, "image_processor", None), inputs.get("pixel_values")
    if reader is None or pixels is None:
        return None
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].float().cpu()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (reader.image_mean, reader.image_std))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).contiguous()
