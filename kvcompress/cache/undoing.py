"""Taking tokens back, and the evictions that wait for it."""

from __future__ import annotations

from kvcompress.cache import decoding, periods, prefill, scoring, tables
from kvcompress.cache.counts import Counts
from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Phase, Prefill
from kvcompress.errors import CacheStateError
from kvcompress.kernels import sent


def crop(state: CacheState, tokens_to_remove: int) -> None:
    """Takes the last tokens back, then lets the evictions that waited happen; see `CompressedCache.crop`."""
    if tokens_to_remove > 0:
        raise CacheStateError(
            f"crop: takes minus the number of tokens to remove, as transformers does; got {tokens_to_remove}"
        )
    state.check_ready()
    tables.catch_up_if_needed(state)
    sequence, positions = state.sequence, -tokens_to_remove
    if positions > sequence.seen:
        raise CacheStateError(f"crop: cannot remove {positions} tokens, only {sequence.seen} were seen")
    if positions and positions != sequence.seen and (why := refusal(state, positions)):
        raise CacheStateError(why)
    if positions and positions == sequence.seen:
        state.forget()
    elif positions or state.waiting is not None:
        recorded = _recorded_positions(state)
        with state.changing() as step:
            tables.tidy(state)
            state.own.crop(positions)
            if positions:
                if positions < recorded:
                    settle(state, step, positions)
                gone = sequence.tokens_after(sequence.seen - positions)
                for layer in state.layers:
                    layer.drop_from(sequence.row_seen - gone)
                sequence.crop(sequence.seen - positions, gone, whole_step=0 < recorded <= positions)
                if recorded and recorded <= positions:
                    _drop_unscored(state)
                state.calls.crop(sequence.seen)
            let_go(state, step)


def _recorded_positions(state: CacheState) -> int:
    """Positions of the last step, if it may be undone and has not scored yet."""
    unscored = state.layers[0].unscored
    return 0 if unscored is None or state.waiting is not Phase.PREFILL else unscored.query.shape[2]


def settle(state: CacheState, step: Prefill, gone: int) -> None:
    """Lets the last step score, if it has not, by all its positions but the last so many."""
    sequence = state.sequence
    of_rows = sequence.tokens_after(sequence.seen - gone)
    step.row_seen = sequence.row_seen - of_rows
    for layer in state.layers:
        scoring.settle(layer, step, of_rows)


def _drop_unscored(state: CacheState) -> None:
    for layer in state.layers:
        layer.unscored = None


def refusal(state: CacheState, positions: int) -> str | None:
    """Why the last positions cannot be taken back; None if they can."""
    if why := state.own.refusal(positions):
        return why
    if not _can_drop(state, positions):
        return (
            f"crop: some layer has already evicted one of the last {positions} tokens, so it cannot go back; call "
            "activate_past_recording() before a forward that may be undone, or take copy.deepcopy(cache) before it"
        )
    scorer, sequence, recorded = state.config.scorer, state.sequence, _recorded_positions(state)
    scores = any(layer.scores is not None or layer.statistics for layer in state.layers)
    independent = scorer is not None and scorer.independent and not state.config.allocator.needs
    if state.config.evictor is None or not scores or independent or positions < recorded:
        return None
    left = sequence.row_seen - sequence.tokens_after(sequence.seen - positions)
    if (left < sequence.scored_end(before_last_step=recorded > 0)).any():
        return (
            f"crop: the last {positions} tokens include some whose queries scored older tokens, which cannot be "
            "taken back; call activate_past_recording() before a forward that may be undone, or take "
            "copy.deepcopy(cache) before it"
        )
    return None


def _can_drop(state: CacheState, positions: int) -> bool:
    """Whether every layer still holds all the tokens of the last positions."""
    wanted = state.sequence.tokens_after(state.sequence.seen - positions)
    first = state.sequence.row_seen - wanted
    return all((holds_from(state, layer, first) == wanted).all() for layer in state.layers)


def holds_from(state: CacheState, layer: CompressedLayer, first: Counts) -> Counts:
    """Tokens per row, in the set that has fewest, from a token index on."""
    index = state.index_of(layer)
    held = (index >= sent(first, index.device)[:, None, None]).sum(-1)
    held = state.heads.gather(held) if layer.heads_part else held
    return held.amin(1).cpu().numpy()


def compress(state: CacheState, entered: bool = False) -> None:
    """Brings every layer down to its budget now, rather than at the next crop or forward.

    To be called in every process where several share the heads.

    Args:
        state: what the cache knows.
        entered: whether the decoder is running.
    """
    state.check_ready(entered)
    if state.waiting is not None:
        with state.changing() as step:
            tables.tidy(state)
            state.own.crop(0)
            let_go(state, step)


def stop_recording(state: CacheState, entered: bool = False) -> None:
    """Lets what waited for `crop` happen, which nobody calls any more; `entered` as for `compress`."""
    state.recording = False
    compress(state, entered)
    state.own.record(False)


def let_go(state: CacheState, step: Prefill) -> None:
    """Lets the eviction that waited happen, if any did, and makes the table for what is left; within a change."""
    waiting, evictor = state.waiting, state.config.evictor
    step.row_seen = state.sequence.row_seen
    settle(state, step, 0)
    if waiting is not None and evictor is None:
        for layer in state.layers:
            layer.close_ranks(room=0)
    elif waiting is Phase.PREFILL:
        prefill.compress_all(state, step)
    elif waiting is Phase.DECODE and periods.is_due(state):
        periods.cut(state, in_place=False)
    elif waiting is Phase.DECODE:
        decoding.evict_waiting(state)
    if waiting is not None:
        for layer in state.layers:
            layer.pack()
    step.problems.refuse()
    tables.make_table(state)
    state.waiting = None
