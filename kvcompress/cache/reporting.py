"""What a cache holds, looked up in its parts."""

from __future__ import annotations

from kvcompress.cache.engine import Engine
from kvcompress.cache.report import CacheReport
from kvcompress.cache.store import DenseStore


def report_on(engine: Engine) -> CacheReport:
    """A snapshot of what a cache holds now; waits for the device once."""
    stores, sequence, allocation = engine.stores, engine.sequence, engine.allocation
    layers = range(len(stores))
    budgets = engine.limits()
    if budgets is not None:
        budgets = [layer * sequence.batch if len(layer) == 1 else layer for layer in budgets]
    threshold = None if allocation is None else allocation.notes.get("threshold")
    return CacheReport(
        tokens_seen=sequence.seen,
        row_tokens_seen=list(sequence.row_seen),
        layer_tokens=[sequence.given(layer) for layer in layers],
        image_tokens=[sequence.images_given(layer) for layer in layers],
        layer_lengths=[list(store.counts) for store in stores],
        layer_budgets=budgets,
        held_columns=[_held(store) for store in stores],
        kv_bytes=sum(store.nbytes for store in stores),
        index_bytes=sum(store.index_nbytes for store in stores),
        full_kv_bytes=sum(store.slot_nbytes for store in stores) * sequence.seen * sequence.batch,
        went_into={layers: into.tolist() for layers, into in sequence.went_into.items()},
        threshold=None if threshold is None else threshold.tolist(),
        notes=_notes(engine),
    )


def _notes(engine: Engine) -> list[str]:
    evictor, notes = engine.config.evictor, []
    if evictor is not None and evictor.frees == "nothing":
        notes.append("decode rule 'none': layers grow by every generated token, past their budget")
    if engine.recording:
        notes.append("past recording: eviction waits for crop")
    return notes


def _held(store: DenseStore) -> list[list[list[int]]]:
    """Columns of the tokens that a layer holds, ascending, per row and set."""
    if store.keys is None:
        return []
    return [[sorted(c for c in columns if c >= 0) for columns in row] for row in store.columns().tolist()]
