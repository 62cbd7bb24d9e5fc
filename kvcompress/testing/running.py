"""Laws of whole caches, checked on a running model: what tests and the laws of each stage share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import assume, event
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.mask_function import padding_in
from kvcompress.config import CompressionConfig
from kvcompress.config.budget import Budget
from kvcompress.testing.importance import generator
from kvcompress.testing.laws import require, require_close
from kvcompress.testing.models import token_ids
from kvcompress.testing.reference import Held, Reference, Step, held, recorded

Images = Callable[[Tensor], dict[str, Tensor]]  # of a row's ids


def with_budget(config: CompressionConfig, budget: Any, **protected: int) -> CompressionConfig:
    """The configuration with a drawn budget, unless it evicts nothing."""
    if config.evictor is None:
        return config
    budget = Budget.parse(budget, default=config.budget)
    return config.model_copy(update={"budget": budget.model_copy(update=protected)})


# -- identity ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def continued(model: PreTrainedModel, cache: Any, inputs: dict[str, Any], tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Logits of the prompt, and of each of some greedy steps after it."""
    first: Tensor = model(**inputs, **cache_argument(cache)).logits
    steps, mask = [first[:, -1:]], inputs["attention_mask"]
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        ids = steps[-1].argmax(-1)
        steps.append(model(input_ids=ids, attention_mask=mask, **cache_argument(cache)).logits)
    return first, steps[1:]


def require_identity(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    """Raises unless a prompt's logits are equal bit for bit, and each decode step's within 1e-5."""
    require(torch.equal(found[0], wanted[0]), "logits of the prompt differ")
    for number, (one, other) in enumerate(zip(found[1], wanted[1], strict=True)):
        require_close(one, other, 1e-5, f"logits of decode step {number} differ")


# -- physical compression equals masking -------------------------------------------------------------------------------


def forwards(
    model: PreTrainedModel, cache: CompressedCache, prompt: dict[str, Any], schedule: Sequence[int], seed: int
) -> list[Step]:
    """Plain forwards: the prompt, then random tokens in numbers of the schedule."""
    mask = prompt["attention_mask"]
    with recorded(model, cache) as steps, torch.no_grad():
        model(**prompt, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **cache_argument(cache))
        for number, tokens in enumerate(schedule):
            ids = token_ids(mask.shape[0], tokens, seed + number)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], tokens)], dim=1)
            positions = (mask.cumsum(1) - 1)[:, -tokens:]
            model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
    return steps


def require_masked(
    reference: Reference, cache: CompressedCache, steps: Sequence[Step], tolerance: float = 2e-5
) -> None:
    """Raises unless every forward gave what it gives with all stored and hidden what the cache did not hold."""
    for number, step in enumerate(steps):
        wanted = reference.run(step.inputs, step.held)
        mask = padding_in(step.inputs.get("attention_mask"))
        end = reference.cache.get_seq_length()
        real = torch.ones_like(step.inputs["input_ids"]) if mask is None else mask[:, end - step.queries : end]
        for layer, (found, other) in enumerate(zip(step.attention, wanted.attention, strict=True)):
            says = f"forward {number}: attention of layer {layer} differs"
            require_close(found[real.bool()], other[real.bool()], tolerance, says)
        assert step.logits is not None and wanted.logits is not None
        require_close(step.logits[:, -1], wanted.logits[:, -1], tolerance, f"forward {number}: logits differ")
    reference.check_stored(cache)


# -- what may be held --------------------------------------------------------------------------------------------------


def left_padded(lengths: Sequence[int], seed: int) -> tuple[dict[str, Any], Tensor]:
    """A left-padded batch for plain forwards, and which positions are tokens."""
    longest = max(lengths)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    ids = token_ids(len(lengths), longest, seed)
    return {"input_ids": ids, "attention_mask": valid.long(), "position_ids": positions}, valid


@torch.no_grad()
def started(
    model: PreTrainedModel, config: CompressionConfig, lengths: Sequence[int], seed: int
) -> tuple[CompressedCache, Tensor]:
    """A cache after a prompt, and which positions are tokens."""
    cache = CompressedCache(model, config)
    inputs, valid = left_padded(lengths, seed)
    model(**inputs, **cache_argument(cache))
    return cache, valid


@torch.no_grad()
def stepped(model: PreTrainedModel, cache: CompressedCache, valid: Tensor, seed: int, tokens: int = 1) -> Tensor:
    """One more forward of random tokens; returns which positions are tokens, with the new ones."""
    batch = valid.shape[0]
    valid = torch.cat([valid, torch.ones(batch, tokens, dtype=torch.bool)], dim=1)
    positions = (valid.cumsum(1) - 1)[:, -tokens:]
    ids = token_ids(batch, tokens, seed)
    model(ids, attention_mask=valid.long(), position_ids=positions, **cache_argument(cache))
    return valid


def require_protected(cache: CompressedCache, valid: Tensor) -> None:
    """Raises unless every layer and head holds each row's first and last tokens, and tokens of the row alone."""
    budget, tokens = cache.config.budget, [row.nonzero().flatten().tolist() for row in valid]
    for number, layer in enumerate(held(cache)):
        for row, sets in enumerate(layer):
            protected = {*tokens[row][: budget.sink], *tokens[row][max(0, len(tokens[row]) - budget.recent) :]}
            for positions in sets:
                require(protected <= set(positions), f"layer {number}, row {row}: holds {positions}, must {protected}")
                require(set(positions) <= set(tokens[row]), f"layer {number}, row {row}: holds padding")


def require_within_budget(cache: CompressedCache, valid: Tensor, more: int = 0) -> None:
    """Raises unless the layers of each row together hold at most its budget, or the protected if they are more.

    Args:
        cache: the cache.
        valid: which positions are tokens.
        more: tokens that each layer may hold beyond that.
    """
    budget, report = cache.config.budget, cache.report()
    layers = len(report.layer_lengths)
    for row, seen in enumerate(valid.sum(1).tolist()):
        allowed = budget.tokens * layers if budget.tokens else int((budget.fraction or 0) * seen * layers + 1e-6)
        protected = min(seen, budget.sink + budget.recent)
        holds = sum(layer[row] for layer in report.layer_lengths)
        require(
            holds <= max(allowed, layers * protected) + layers * more, f"row {row}: holds {holds} tokens of {allowed}"
        )
        for layer, limits in zip(report.layer_lengths, report.layer_budgets or [], strict=True):
            require(layer[row] <= limits[row], f"row {row}: a layer holds {layer[row]} tokens of {limits[row]}")


# -- padded batches ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one row got: per forward, the indices of its tokens that every layer and head held after it, and logits."""

    held: list[list[list[list[int]]]] = field(default_factory=list)  # [forwards][layers][sets][tokens]
    logits: list[Tensor] = field(default_factory=list)  # at the row's last token
    tokens: list[int] = field(default_factory=list)

    def same_positions(self, other: Outcome) -> bool:
        """Whether the same tokens were held after every forward."""
        return self.held == other.held


def of_row(positions: Held, row: int, valid: list[bool]) -> list[list[list[int]]]:
    """Positions of one row, counted from its own start."""
    index = {position: number for number, position in enumerate(c for c, is_token in enumerate(valid) if is_token)}
    # Heads that hold the same are written once, however they are stored.
    layers = [[[index[position] for position in one] for one in layer[row]] for layer in positions]
    return [sets[:1] if all(one == sets[0] for one in sets) else sets for sets in layers]


def blurred(config: CompressionConfig, seed: int) -> CompressionConfig:
    """The configuration with noise of up to 1e-5 on every score."""
    source, original = generator(seed), type(config.scorer)

    class Blurred(original):  # type: ignore[misc, valid-type]
        def score(self, layer: Any) -> Tensor:
            score: Tensor = super().score(layer)
            noise = (torch.rand(score.shape, generator=source) - 0.5) * 2e-5
            return (score + noise).clamp(min=0.0) if self.mass else score + noise

    return config.model_copy(update={"scorer": Blurred(**dict(config.scorer or {}))})


def require_agreement(found: Outcome, alone: Outcome, again: Callable[[], list[Outcome]]) -> None:
    """Raises unless a row got what it got alone, but where noise of 1e-5 on its scores, or logits, sends it elsewhere.

    Args:
        found: what the row got in the batch.
        alone: what it got alone.
        again: what it got alone with noise on its scores; looked at only if something differs.
    """
    tokens = list(zip(found.tokens, alone.tokens, strict=True))
    if not found.same_positions(alone) or any(a != b for a, b in tokens):
        first = next((number for number, (a, b) in enumerate(tokens) if a != b), None)
        gap = 1.0
        if first is not None:
            best = alone.logits[first].topk(2).values
            gap = float(best[0] - best[1])
        near = gap < 1e-4 or any(not other.same_positions(alone) for other in again())
        event("near tie" if near else "no tie")
        assume(not near)
    require(found.held == alone.held, f"held {found.held} in the batch and {alone.held} alone")
    require(found.tokens == alone.tokens, f"generated {found.tokens} in the batch and {alone.tokens} alone")
    for one, other in zip(found.logits, alone.logits, strict=True):
        require_close(one, other, 2e-5, "logits differ from those of the row alone")


def talked(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: list[list[Tensor]],
    sides: list[list[bool]],
    images: Images | None = None,
) -> list[Outcome]:
    """Plain forwards of padded batches.

    Args:
        model: the model.
        config: the policies.
        ids: tokens per forward and row.
        sides: whether a row's padding comes first, likewise.
        images: what goes with the ids of a row that have images among them; None where there are none.
    """
    rows = range(len(ids[0]))
    cache, valid = CompressedCache(model, config), torch.zeros(len(ids[0]), 0, dtype=torch.bool)
    outcomes = [Outcome() for _ in rows]
    for tokens, lefts in zip(ids, sides, strict=True):
        longest = max(len(row) for row in tokens)
        new = torch.zeros(len(tokens), longest, dtype=torch.long)
        new_valid = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row in rows:
            start = longest - len(tokens[row]) if lefts[row] else 0
            new[row, start : start + len(tokens[row])] = tokens[row]
            new_valid[row, start : start + len(tokens[row])] = True
        valid = torch.cat([valid, new_valid], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -longest:]
        shown = [pictures for row in tokens if images is not None and (pictures := images(row))]
        seen = {"pixel_values": torch.cat([one["pixel_values"] for one in shown])} if shown else {}
        with torch.no_grad():
            logits = model(
                new, attention_mask=valid.long(), position_ids=positions, **cache_argument(cache), **seen
            ).logits
        for row in rows:
            last = int(new_valid[row].nonzero()[-1])
            outcomes[row].logits.append(logits[row, last])
            outcomes[row].held.append(of_row(held(cache), row, valid[row].tolist()))
    return outcomes


def require_rows_alone(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: list[list[Tensor]],
    sides: list[list[bool]],
    images: Images | None = None,
) -> None:
    """Raises unless each row of padded forwards gets what it gets alone; the arguments are those of `talked`."""
    for row, found in enumerate(talked(model, config, ids, sides, images)):
        own, no_padding = [[forward[row]] for forward in ids], [[False]] * len(ids)
        (alone,) = talked(model, config, own, no_padding, images)

        def again(own: list[list[Tensor]] = own, no_padding: list[list[bool]] = no_padding) -> list[Outcome]:
            if config.scorer is None:
                return []
            return [talked(model, blurred(config, number), own, no_padding, images)[0] for number in range(4)]

        require_agreement(found, alone, again)
