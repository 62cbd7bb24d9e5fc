"""What transformers asks of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import SupportsIndex

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache import decoding, mask_function, periods, rows, tables, undoing
from kvcompress.cache.owner import OfModel
from kvcompress.cache.room import prepare_step


class CacheContract(OfModel, Cache):
    """A compressed cache as transformers sees it."""

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Positions seen; a tensor once decoding is compiled, when the host no longer counts along."""
        table = self._state.table
        if table is not None and (decoding.host_is_left_out(self._state) or not table.exact):
            return table.positions_seen
        return self._state.sequence.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks cover every position seen, whatever is kept; the offset marks them as a compressed cache's.

        `generate` asks before every step, compiled or not, which makes this the place for what the host has to do
        between compiled steps: to let buffers grow, to quantize what has become old enough, to cut layers in periods.
        """
        sequence = self._state.sequence
        if (own := self._state.own.layers.get(layer_idx)) is not None and hasattr(own, "get_mask_sizes"):
            sizes: tuple[int, int] = own.get_mask_sizes(query_length)
            return sizes
        if decoding.host_is_left_out(self._state):
            return query_length, mask_function.COMPRESSED  # no mask is made, and graphs depend on no number
        if query_length == 1:
            prepare_step(self._state)
            periods.cut_if_due(self._state)
        unread = not sequence.seen or not sequence.row_seen.all()  # a prompt in chunks, of which some row had none yet
        return sequence.seen + query_length, mask_function.COMPRESSED_UNREAD if unread else mask_function.COMPRESSED

    @property
    def is_compileable(self) -> bool:
        """Whether decode steps can be compiled: not while the past is recorded or freed slots are merged."""
        return decoding.compiles(self._state)

    @property
    def batch_size(self) -> int:
        """Rows that the cache holds; -1 before the first forward."""
        return self._state.sequence.batch or -1

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Keys and values of each layer's slots in use, `[batch, kv_heads, slots, head_dim]`; None before any token.

        Slots are in no promised order, and what lies in those beyond a row's own means nothing; `report()` says which
        tokens are held.
        """
        tables.catch_up_if_needed(self._state)
        return ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in full precision; the model's before the first token."""
        return self._state.dtype if self.is_initialized else self.decoder().dtype

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys and values are; the model's before the first token."""
        keys = self._state.layers[0].store.keys
        return self.decoder().device if keys is None else keys.device

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return all(layer.is_initialized for layer in self._state.layers)

    @property
    def is_croppable(self) -> bool:
        """Whether the last token can be taken back in every layer.

        To be asked in every process where several share the heads.
        """
        if self._state.recording:
            return self._state.own.goes_back
        return undoing.refusal(self._state, 1) is None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search.

        Args:
            beam_idx: row that each row becomes, integers `[rows]`.

        Raises:
            CacheStateError: if there is no such row; nothing has changed then.
        """
        rows.select(self._state, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: SupportsIndex) -> None:
        """Repeats every row so many times, at least once.

        Raises:
            CacheStateError: if that is no whole number, or no row would be left; nothing has changed then.
        """
        times, numbers = rows.whole("batch_repeat_interleave", repeats), torch.arange(self._state.sequence.batch)
        rows.select(self._state, "batch_repeat_interleave", numbers.repeat_interleave(max(0, times)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows.

        Args:
            indices: the rows, integers `[rows]` or bool `[batch]`.

        Raises:
            CacheStateError: if there is no such row, or none would be left; nothing has changed then.
        """
        if getattr(indices, "dtype", None) == torch.bool and indices.shape == (self._state.sequence.batch,):
            indices = indices.nonzero().flatten()
        rows.select(self._state, "batch_select_indices", indices)

    def crop(self, tokens_to_remove: SupportsIndex) -> None:
        """Takes the last tokens back, then lets the evictions that waited happen.

        Args:
            tokens_to_remove: zero or minus the number of tokens, as in transformers.

        Raises:
            CacheStateError: if that is no whole number, or one of them was evicted already (see `is_croppable`);
                nothing has changed then.
        """
        undoing.crop(self._state, rows.whole("crop", tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Lets eviction wait for `crop` after each forward, as assisted decoding needs it."""
        self._state.recording = True
        self._state.own.record(True)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether eviction waits for `crop`."""
        return self._state.recording
