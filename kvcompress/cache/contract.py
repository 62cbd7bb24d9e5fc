"""What transformers asks of one layer of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.cache.held import HeldTokens
from kvcompress.errors import CacheStateError


class LayerContract(HeldTokens, CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer as transformers sees it: it can be looked at and moved, but not changed without the other layers."""

    is_sliding = False
    supports_early_init = False

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds anything."""
        return self.index is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the slots in use, `[batch, kv_heads, slots, head_dim]`."""
        return self.every_slot()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots in use."""
        return self.every_slot()[1] if self.is_initialized else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values in full precision; None before the first token."""
        return None if self.store.keys is None else self.store.keys.dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring their buffers along."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a layer's tokens come through its cache, which knows of the step.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(f"layer {self.number}: call update() of the CompressedCache, not of one of its layers")

    def reset(self) -> None:
        """Refused: see `CompressedCache.reset`."""
        raise _one_layer("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: see `CompressedCache.reorder_cache`."""
        raise _one_layer("reorder_cache")

    def crop(self, max_length: int) -> None:
        """Refused: see `CompressedCache.crop`."""
        raise _one_layer("crop")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: see `CompressedCache.batch_repeat_interleave`."""
        raise _one_layer("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: see `CompressedCache.batch_select_indices`."""
        raise _one_layer("batch_select_indices")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover every position seen, whatever is kept."""
        return self.sequence.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen, so that rotary positions go on after eviction."""
        return self.sequence.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        """Moves the layer's buffers to CPU memory."""
        self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Brings the layer's buffers back to their device."""
        if self.device is not None:
            self.store.to(self.device)


def _one_layer(operation: str) -> CacheStateError:
    return CacheStateError(
        f"{operation}: one layer cannot be changed alone, since all layers share what the cache has seen; call "
        f"{operation}() of the cache"
    )
