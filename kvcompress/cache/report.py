"""What a cache holds, in tokens and bytes."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kvcompress.cache import tables
from kvcompress.cache.counts import Counts, stacked
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.sizes import explained
from kvcompress.cache.state import CacheState
from kvcompress.integrations.shape import ranges
from kvcompress.markup import bars, size, table


@dataclass(frozen=True, repr=False)
class CacheReport:
    """A snapshot of what a cache holds; plain numbers and lists, so it can be kept, compared and written as JSON.

    Where several processes share the heads, it is that of one of them: bytes are those of its heads, and so are the
    positions once heads hold different tokens, and lengths once they hold different numbers. Everything else is the
    same in all.

    Attributes:
        tokens_seen: positions that the model saw, padding included.
        row_tokens_seen: tokens of each row, padding left out.
        layer_tokens: tokens that each layer was given per row, `[layers][batch]`; fewer than `row_tokens_seen` where a
            reducer acted before it.
        image_tokens: how many of them are image tokens, likewise.
        layer_lengths: tokens that each layer holds per row, `[layers][batch]`; where heads hold different numbers,
            their mean, rounded.
        head_lengths: tokens that each key/value head holds, `[layers][batch][kv_heads]`; None where all heads of a
            layer hold as many.
        layer_budgets: tokens that each layer may hold per row at this point, likewise; None where nothing limits it.
        held_positions: positions of the held tokens, `[layers][batch][sets][tokens]`; `sets` is 1 unless heads keep
            different tokens.
        went_into: what a reducer did: for each number of layers after which it acted, the position that each one of a
            row is part of from there on, its own if it stays and -1 if it was dropped; `[batch][positions]`.
        kv_bytes: bytes allocated for keys and values.
        index_bytes: bytes allocated for positions and scores, and for queries where an evictor remembers some.
        full_kv_bytes: bytes that the keys and values of every position would take.
        threshold: the global threshold that the prefix allocator found per row; None for others.
        layers: number in the model of each layer that is compressed, which is what `layer` counts everywhere else; all
            of them unless the model has layers that slide or sum up.
        own_kv_bytes: bytes that layers hold which stay transformers' own, whatever the budget; a part of `kv_bytes` and
            of `full_kv_bytes`.
        decoding: how the last decode step ran: "eager", "captured" or "compiled"; None before the first.
        preset: what `auto` chose; None where nothing was left to it, and before the first prompt.
        notes: what a reader should know, in words: what `auto` chose and why, what a policy is named after and was not
            done (no prompt was repeated, no image seen), what lets layers grow past their budget, and what takes bytes
            beyond it (protected tokens, the token to come, buffers that grow in blocks, a quantizer's residual, a
            merger's memory).
    """

    tokens_seen: int
    row_tokens_seen: list[int]
    layer_tokens: list[list[int]]
    image_tokens: list[list[int]]
    layer_lengths: list[list[int]]
    layer_budgets: list[list[int]] | None
    held_positions: list[list[list[list[int]]]] = field(repr=False)
    kv_bytes: int
    index_bytes: int
    full_kv_bytes: int
    went_into: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)
    threshold: list[float] | None = None
    layers: list[int] = field(default_factory=list, repr=False)
    own_kv_bytes: int = 0
    decoding: str | None = None
    preset: str | None = None
    notes: list[str] = field(default_factory=list)
    head_lengths: list[list[list[int]]] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return (
            f"CacheReport({len(self.row_tokens_seen)} x {self.tokens_seen:,} tokens seen, {len(self.layer_lengths)} "
            f"layers, retention {self.retention:.1%}, {size(self.kv_bytes)} of {size(self.full_kv_bytes)})"
        )

    def _repr_html_(self) -> str:
        """What notebooks show: figures, and a bar for what each layer keeps of the tokens seen."""
        figures = {
            "tokens seen": f"{self.tokens_seen:,}" if len(set(self.row_tokens_seen)) < 2 else str(self.row_tokens_seen),
            "retention": f"{self.retention:.1%}",
            "key/value cache": f"{size(self.kv_bytes)} of {size(self.full_kv_bytes)}",
            "index": size(self.index_bytes),
        }
        if self.preset is not None:
            figures["preset"] = self.preset
        if self.threshold is not None:
            figures["threshold p"] = ", ".join(f"{one:.4f}" for one in self.threshold)
        if self.vision_retention is not None:
            figures["image tokens given"] = f"{self.vision_retention:.1%}"
        notes = {f"note {number}": note for number, note in enumerate(self.notes, 1)}
        seen = max(1, sum(self.row_tokens_seen))
        kept = [sum(rows) for rows in self.layer_lengths]
        texts = [f"{sum(rows) / max(1, len(rows)):,.0f} tokens" for rows in self.layer_lengths]
        return table("CacheReport", figures | notes) + bars(
            "kept of the tokens seen, by layer", [rows / seen for rows in kept], texts
        )

    @property
    def retention(self) -> float:
        """Tokens kept / tokens seen, over all layers and rows; 1.0 before anything was seen."""
        seen = sum(self.row_tokens_seen) * len(self.layer_lengths)
        if self.head_lengths is not None and seen:
            of_heads = [sum(heads) / len(heads) for rows in self.head_lengths for heads in rows]
            return sum(of_heads) / seen
        return sum(map(sum, self.layer_lengths)) / seen if seen else 1.0

    @property
    def vision_retention(self) -> float | None:
        """Image tokens that layers were given / image tokens seen, mean over layers; None without images."""
        seen = sum(self.image_tokens[0]) if self.image_tokens else 0
        for row in self.went_into.get(0, []):  # what the first layer never got
            seen += sum(into != position for position, into in enumerate(row))
        return sum(map(sum, self.image_tokens)) / (seen * len(self.image_tokens)) if seen else None

    def positions(self, layer: int, row: int, head: int | None = None) -> list[int]:
        """Positions of the tokens that a layer holds for a row, padding counted, ascending.

        Args:
            layer: index of the decoder layer.
            row: row of the batch.
            head: key/value head; None for the positions that any head holds.
        """
        sets = self.held_positions[layer][row]
        if head is not None:
            return list(sets[0 if len(sets) == 1 else head])
        return sorted(set().union(*sets))

    def columns(self, layer: int, row: int, head: int | None = None) -> list[int]:
        """Deprecated alias of `positions`."""
        warnings.warn("CacheReport.columns is now called positions", DeprecationWarning, stacklevel=2)
        return self.positions(layer, row, head)

    def to_dict(self) -> dict[str, Any]:
        """Everything but positions, with `retention`, ready for JSON."""
        fields = asdict(self)
        del fields["held_positions"], fields["went_into"]
        return {**fields, "retention": self.retention, "vision_retention": self.vision_retention}


def report_on(state: CacheState) -> CacheReport:
    """What the cache holds now, in tokens and bytes; waits for the device."""
    tables.catch_up_if_needed(state)
    sequence, table, numbers = state.sequence, state.table, range(len(state.layers))
    held = stacked([layer.held for layer in state.layers])
    if table is not None and table.steps:
        held = table.extent - table.hole + stacked([layer.packed_rows for layer in state.layers])
    limits = state.limits()
    threshold = None if state.allocation is None else state.allocation.notes.get("threshold")
    slot_nbytes = sum(layer.store.slot_nbytes for layer in state.layers)
    return CacheReport(
        tokens_seen=sequence.seen,
        row_tokens_seen=sequence.row_seen.tolist(),
        layer_tokens=[sequence.given(number).tolist() for number in numbers],
        image_tokens=[sequence.images_given(number).tolist() for number in numbers],
        layer_lengths=_of_layers(held),
        layer_budgets=None if limits is None else _of_layers(limits),
        held_positions=[_held_positions(state, layer) for layer in state.layers],
        kv_bytes=sum(layer.store.nbytes for layer in state.layers) + state.own.nbytes,
        index_bytes=_index_nbytes(state),
        full_kv_bytes=slot_nbytes * sequence.seen * sequence.batch + state.own.nbytes,
        went_into={layers: into.tolist() for layers, into in sequence.went_into.items()},
        threshold=None if threshold is None else threshold.tolist(),
        layers=list(state.numbers),
        own_kv_bytes=state.own.nbytes,
        decoding=state.ran,
        preset=None if state.chosen is None else state.chosen.preset,
        notes=[*_notes(state), *explained(state, held)],
        head_lengths=None if held.shape[2] == 1 else held.tolist(),
    )


def _of_layers(counts: Counts) -> list[list[int]]:
    """Numbers of `[layers, batch, sets]` for layers and rows: the mean over heads."""
    means: list[list[int]] = np.rint(counts.mean(2)).astype(np.int64).tolist()
    return means


def _index_nbytes(state: CacheState) -> int:
    """Bytes allocated for what belongs to slots beside keys and values, those that layers share once."""
    tensors = [tensor for layer in state.layers for tensor in layer.index_tensors()]
    tensors += [] if state.table is None else state.table.tensors()
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held_positions(state: CacheState, layer: CompressedLayer) -> list[list[list[int]]]:
    """Positions of the tokens that a layer holds, ascending, per row and set."""
    if layer.index is None:
        return []
    positions = state.sequence.positions_of(state.index_of(layer)).tolist()
    return [[sorted(position for position in held if position >= 0) for held in row] for row in positions]


def _notes(state: CacheState) -> list[str]:
    evictor, notes = state.config.evictor, [] if state.chosen is None else [str(state.chosen)]
    if evictor is not None and evictor.cuts_every is not None:
        remembered = sum(tensor.nbytes for layer in state.layers if layer.recent for tensor in layer.recent.tensors())
        notes.append(
            f"evictor {evictor.name}: layers grow by up to {evictor.cuts_every} generated tokens past their budget and "
            f"are cut to it then; the queries that score for that take {size(remembered)}, counted with the index"
        )
    elif evictor is not None and evictor.frees == "nothing":
        notes.append("decode rule 'none': layers grow by every generated token, past their budget")
    notes += _not_done(state) if state.sequence.seen else []
    if state.own:
        notes.append(
            f"layers {ranges(sorted(state.own.layers))} keep transformers' own cache; the budget is a share of the "
            f"tokens in the other {len(state.layers)}"
        )
    if state.recording:
        notes.append("past recording: eviction waits for crop")
    return notes


def _not_done(state: CacheState) -> list[str]:
    """What a policy is named after, and what was seen gave no occasion for."""
    scorer, reducer, sequence, notes = state.config.scorer, state.config.reducer, state.sequence, []
    if scorer is not None and scorer.reconstructs and state.config.evictor is not None and not state.repeated:
        notes.append(
            f"scorer {scorer.name}: nothing was repeated, so tokens are ranked by the attention that the prompt itself "
            "gives them; cache.score_by_reconstruction(tokenizer, inputs) reads and repeats a prompt, and so do "
            "Document and Chat"
        )
    if reducer is not None and not sequence.went_into and not sequence.images_given(0).any():
        notes.append(f"reducer {reducer.name}: no image was seen, so every layer was given every token")
    return notes
