"""Image tokens merged window by window, under the guidance of the prompt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kvcompress.errors import ConfigError
from kvcompress.kernels import attention_share
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext
from kvcompress.policies.images import ImageGrid
from kvcompress.policies.reducers.bipartite import Bipartite, merge_in_windows
from kvcompress.policies.reducers.staged import Depth
from kvcompress.policies.reducers.windows import windows_of
from kvcompress.policies.registry import REDUCERS

_WINDOWS = (4, 2, 1)
_WINDOWS_TILED = (6, 4, 2)  # for images of several grids (LLaVA-NeXT)


@REDUCERS.register("lightkv")
class LightKV(Bipartite):
    """Merges similar image tokens within windows of their grid, weighted by what the prompt has to do with them.

    Source: LightKV (arXiv 2605.00789). A grid of image tokens is split into windows; of each window's tokens, every
    second one is merged into the most similar of the others. The merged state is the mean weighted by the attention
    between image and text, each image token asking and the text answering, before causal masking (text follows the
    image).

    *Deviates:* a survivor keeps its cell, so windows stay spatial at later reductions; the released code lays what is
    left out as a square anew. It acts after the layers of *index* 12, 18 and 24, which are 13, 19 and 25 layers
    (`after=[13, 19, 25]`), where the paper and this reducer count 12, 18 and 24. Its softmax over queries is
    `softmax="queries"`, its renumbering `positions="contiguous"`. Of a video, every frame has windows of its own.

    Args:
        after: layers that have run at each reduction: numbers, or fractions of the depth. None for the paper's: 12, 18,
            24 of 32 layers, 15, 23, 31 of 40, the fractions 0.375, 0.5625, 0.75 of other depths.
        windows: windows along each side of a grid, for each reduction; a remainder widens the first rows and columns.
            None for 4, 2, 1, and 6, 4, 2 where images have several grids (LLaVA-NeXT). A grid with fewer than eight
            tokens per window is left alone.
        rho: share of a window's tokens that is merged into others each time, at most a half.
        vision_retention: instead of `after`, image tokens per layer / image tokens, mean over layers; the closest that
            three reductions come to it. `CacheReport.vision_retention` tells what was reached.
        softmax: what the attention adds up to 1 over: "keys"; or "queries", all tokens of the forward that came as far,
            text too, as in the released code.
        positions: "original", each token keeps its rotary position; "contiguous", those of a layer are numbered anew,
            without gaps, and decoding goes on from the length of the whole prompt; "per_layer", likewise, and decoding
            goes on from the number of tokens that the layer got.

    Example:
        >>> from kvcompress import REDUCERS
        >>> REDUCERS.create("lightkv").acts_after(layers=32)
        (12, 18, 24)
    """

    reads_attention: ClassVar[bool] = True

    after: tuple[Depth, ...] | None = None
    windows: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    rho: float = Field(default=0.5, ge=0.0, le=1.0)
    vision_retention: float | None = Field(default=None, gt=0.0, le=1.0)
    softmax: Literal["keys", "queries"] = "keys"

    def model_post_init(self, context: object) -> None:
        """Checks that layers and windows go together."""
        super().model_post_init(context)
        if self.after is not None and self.windows is not None and len(self.after) != len(self.windows):
            raise ConfigError(
                f"reducer {self.name}: after has {len(self.after)} entries and windows {len(self.windows)}; give as "
                "many"
            )

    def guidance(self, layer: LayerContext) -> Float[Tensor, "batch tokens"]:
        """Attention from each image token to all text, summed over heads; zero for text."""
        assert layer.is_image is not None
        (_, heads, queries, head_dim), text = layer.query.shape, ~layer.is_image
        is_image = layer.is_image[:, 0, -queries:]  # heads may differ in what came before
        if self.softmax == "queries":
            asked = None if layer.valid is None else layer.valid[:, 0, -queries:]
            share = attention_share(layer.query, layer.keys, text, layer.scaling, "queries", asked, layer.valid)
            return share.masked_fill(~is_image, 0.0)
        asking = layer.image_queries
        if asking is None:
            asking = (~is_image).to(torch.uint8).argsort(dim=1, stable=True)
        query = layer.query.gather(2, asking[:, None, :, None].expand(-1, heads, -1, head_dim))
        share = attention_share(query, layer.keys, text, layer.scaling, valid=layer.valid)
        return share.new_zeros(is_image.shape).scatter_(1, asking, share).masked_fill_(text[:, 0, -queries:], 0.0)

    def reduce(self, layer: ReductionContext) -> Reduced:
        """Merges within the windows of this reduction."""
        assert layer.guidance is not None
        across = [self._across(grids, layer.stage) for grids in layer.grids]
        return merge_in_windows(layer.hidden, windows_of(layer.on_host, across), layer.guidance, self.rho)

    def _across(self, grids: list[ImageGrid], stage: int) -> int:
        """Windows along each side of a row's grids."""
        tiled = len({grid.image for grid in grids if grid.frame is None}) < sum(grid.frame is None for grid in grids)
        windows = self.windows or (_WINDOWS_TILED if tiled else _WINDOWS)
        return windows[min(stage, len(windows) - 1)]
