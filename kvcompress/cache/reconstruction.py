"""Scores by reconstruction: a prompt is read, the model is asked to repeat it, and what that looked at is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import tables, undoing
from kvcompress.cache.scoring import score_part
from kvcompress.cache.state import CacheState
from kvcompress.cache.step import Phase
from kvcompress.errors import CacheStateError, ConfigError, UnsupportedModeError, shown
from kvcompress.kernels import sent

_ASK = "\n\nRepeat the previous context exactly."
_ASK_PART = "\n\nRepeat the part of the previous context exactly, starting with "
_LEAD = 8  # last tokens of the part before, which the next part follows
_OF_TOKENS = ("input_ids", "attention_mask")
_MARK = "kvcompress"  # stands for what a user says


def reconstruct(
    state: CacheState,
    model: PreTrainedModel,
    forward: Callable[..., Any],
    tokenizer: Any,
    inputs: Mapping[str, Any],
    chunk: int,
) -> None:
    """Reads a prompt, scores it by its repetition, and compresses; see `CompressedCache.score_by_reconstruction`."""
    read = dict(inputs)
    ids: Tensor = read["input_ids"]
    given = read.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given.to(ids.device)
    accepted = inspect.signature(type(model).forward).parameters
    # Nobody reads logits, so those of some position will do; the last of a row may be padding.
    more = (
        {"logits_to_keep": torch.zeros(1, dtype=torch.long, device=ids.device)} if "logits_to_keep" in accepted else {}
    )
    seen = {name: value for name, value in read.items() if name not in _OF_TOKENS}
    state.recording = True
    state.own.record(True)
    forward(**{**read, "attention_mask": mask, "position_ids": _positions(mask, ids.shape[1]), **more})
    _forget_step(state)
    for layer in state.layers:
        layer.close_ranks(room=0)
    if _has_images(seen):
        chunk = ids.shape[1]  # an image is repeated as a whole, with its pixels
    found: list[list[Tensor]] = []
    for fed, fed_mask, part in _parts(tokenizer, ids, mask, chunk):
        every = torch.cat([mask, fed_mask], 1)
        positions = _positions(every, fed.shape[1])
        with state.undone():
            state.part = part
            forward(**{**seen, "input_ids": fed, "attention_mask": every, "position_ids": positions, **more})
            found.append(_scores(state, part))
    for layer, scores in zip(state.layers, zip(*found, strict=True), strict=True):
        layer.scores = torch.cat(scores, -1)
    state.recording, state.waiting = False, Phase.PREFILL
    undoing.compress(state)
    state.own.record(False)
    state.repeated = True


def check_reconstruction(state: CacheState, tokenizer: object, inputs: object, chunk: object) -> None:
    """Refuses what cannot be reconstructed before anything is read."""
    scorer, allocator = state.config.scorer, state.config.allocator
    if scorer is None or not scorer.reconstructs:
        came = "scorer: none" if scorer is None else f"scorer {scorer.name}"
        raise ConfigError(f"{came}: score_by_reconstruction wants a scorer made for it; choose scorer='kvzip'")
    if allocator.needs:
        raise ConfigError(
            f"allocator {allocator.name}: reads statistics of the prompt's own attention, which "
            "score_by_reconstruction does not take; choose another, such as 'prefix'"
        )
    state.check_ready()
    if not state.own.goes_back:
        raise UnsupportedModeError(
            "score_by_reconstruction: takes the repetition back, and some layers keep a state of all that was seen "
            "(linear attention), out of which no token can be taken again; choose a scorer that needs none of it"
        )
    if state.sequence.seen:
        raise CacheStateError(
            f"score_by_reconstruction: reads the prompt itself, into an empty cache; this one has seen "
            f"{state.sequence.seen} tokens. Make a new cache, or call reset() first"
        )
    if not callable(tokenizer):
        raise ConfigError(
            "tokenizer: must be the model's, which makes tokens of the request to repeat the prompt, as "
            f"AutoTokenizer.from_pretrained gives it; got {shown(tokenizer)}"
        )
    if isinstance(chunk, bool) or not isinstance(chunk, Integral) or chunk < 1:
        raise ConfigError(f"chunk: tokens that are repeated at a time (int), at least 1; got {shown(chunk)}")
    _check_inputs(state, inputs)


def _check_inputs(state: CacheState, inputs: object) -> None:
    """Refuses a prompt that is none, or could not be repeated."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(inputs, Mapping) or not _are_ids(ids):
        raise ConfigError(
            "inputs: must hold input_ids, integers [batch, tokens], to be repeated, as a tokenizer or processor gives "
            f"them with return_tensors='pt'; got {_described(ids)}"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ConfigError(
            f"attention_mask: must be [batch, tokens] as input_ids are, {tuple(ids.shape)}, with 1 for tokens and 0 "
            f"for padding; got {_described(mask)}"
        )
    if mask is not None and not mask.any():
        raise ConfigError("attention_mask: all rows are padding alone, so there is nothing to repeat; give a prompt")
    if inputs.get("token_type_ids") is not None:
        raise UnsupportedModeError(
            "token_type_ids: tokens of an image, or of a prompt, that attend to those after them cannot be repeated as "
            "they were read; choose another scorer than 'kvzip', or leave them out where there is no image"
        )
    if state.own and mask is not None and len(set(mask.sum(1).tolist())) > 1:
        raise UnsupportedModeError(
            "attention_mask: rows of different lengths are repeated with padding between, which counts in layers that "
            "keep a window of their own; repeat them one by one, or choose another scorer than 'kvzip'"
        )
    if state.config.reducer is not None and _has_images(inputs):
        raise UnsupportedModeError(
            f"reducer {state.config.reducer.name}: an image that is repeated is read twice, and cannot be reduced "
            "meanwhile; choose reducer=None, or another scorer than 'kvzip'"
        )


def _are_ids(ids: object) -> TypeGuard[Tensor]:
    return isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() > 0 and ids.dtype in (torch.int32, torch.int64)


def _described(given: object) -> str:
    """What came, a tensor by its dtype and shape."""
    return f"{given.dtype} of {tuple(given.shape)}" if isinstance(given, Tensor) else shown(given)


def _has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether the model is given numbers that are no words of tokens."""
    numbers = (value for name, value in inputs.items() if name not in _OF_TOKENS)
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in numbers)


def _positions(mask: Tensor, last: int) -> Tensor:
    """Positions of the last positions, padding left out."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -last:]


def _parts(tokenizer: Any, ids: Tensor, mask: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """What is fed to have each part repeated: the request, and the part; with a mask, padding first; the part."""

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    whole, some, answer = encoded(_ASK), encoded(_ASK_PART), encoded(_answer(tokenizer))
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    for start in range(0, max(map(len, rows)), chunk):
        fed = []
        for row in rows:
            part, request = row[start : start + chunk], some + row[max(0, start - _LEAD) : start] if start else whole
            fed.append([*request, *answer, *part] if part else [])
        longest = max(map(len, fed))
        padded = sent([[0] * (longest - len(row)) + row for row in fed], ids.device, ids.dtype)
        marks = [[0] * (longest - len(row)) + [1] * len(row) for row in fed]
        yield padded, sent(marks, mask.device, mask.dtype), slice(start, start + chunk)


def _answer(tokenizer: Any) -> str:
    """What the tokenizer's chat template puts between what a user says and the answer; a line end without one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n"
    turn = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    return text.rpartition(_MARK)[2]


def _scores(state: CacheState, part: slice) -> list[Tensor]:
    """Scores of a part's slots in every layer by the step just run."""
    with state.changing() as step:
        tables.tidy(state)
        step.row_seen = state.sequence.row_seen
        found = [score_part(layer, step, part) for layer in state.layers]
        step.problems.refuse()
    return found


def _forget_step(state: CacheState) -> None:
    """Leaves nothing waiting of a step whose queries have had their say, or are not to have one."""
    state.waiting = None
    for layer in state.layers:
        layer.unscored = None
