"""Policies that each break one law, by the name of the law: what the kit must catch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from kvcompress import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS
from kvcompress.policies.base import Allocator, Policy
from kvcompress.policies.context import Codes, Merged, Reduced

Wrong = tuple[str, str, Callable[[], Policy]]  # stage, the law that it breaks, what makes it
WRONG: list[Wrong] = []
_CALLS = itertools.count()  # by which some answer otherwise every other time
_CLASSES = {r.stage: r for r in (SCORERS, ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS)}


def wrong(stage: str, law: str, parent: str, method: str, bad: Callable[..., Any], **attributes: Any) -> None:
    """Adds a policy like a registered one but for a method, which gets the policy, the right method and arguments."""
    kind = _CLASSES[stage].get(parent)

    def overridden(self: Any, *args: Any) -> Any:
        return bad(self, lambda *given: getattr(kind, method)(self, *given), *args)

    fields: dict[str, Any] = {method: overridden, "__doc__": kind.__doc__, "__module__": __name__, "name": ""}

    def make() -> Policy:
        return type(kind)(f"Wrong_{law}", (kind,), {**fields, **attributes})()

    WRONG.append((stage, law, make))


def overwritten(of: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
    """What does its work and then writes to its first argument."""

    def bad(self: Any, right: Any, first: Any, *more: Any) -> Any:
        answer = right(first, *more)
        of(first).add_(1)
        return answer

    return bad


def noisy(self: Any, right: Any, *args: Any) -> Any:
    answer = right(*args)
    return answer + torch.rand(answer.shape) * 1e-2


# -- allocators --------------------------------------------------------------------------------------------------------


class Share(Allocator):
    """Each layer gets its part of the total, rounded down: the remainder is dropped."""

    reads_importance: ClassVar[bool] = False

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = (total // len(floor)).expand_as(floor)
        return torch.minimum(torch.maximum(budget, floor), capacity)


WRONG.append(("allocator", "meets_the_total_exactly", Share))


def _moved(self: Any, right: Any, importance: Any, total: Any, floor: Any, capacity: Any, context: Any) -> Any:
    budget = right(importance, total, floor, capacity, context)
    budget[0], budget[-1] = budget[0] - 1, budget[-1] + 1  # the total stays right
    return budget


def _of_all_rows(self: Any, right: Any, importance: Any, total: Any, floor: Any, capacity: Any, context: Any) -> Any:
    budget = right(importance, total, floor, capacity, context)
    if total.shape[0] > 1:  # the other rows see the first
        take = ((budget[0] > floor[0]) & (budget[-1] < capacity[-1])).long()
        budget[0], budget[-1] = budget[0] - take, budget[-1] + take
    return budget


class ByChance(Allocator):
    """A slot goes from the first layer to the last every other time."""

    reads_importance: ClassVar[bool] = False

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = ALLOCATORS.create("uniform").allocate(importance, total, floor, capacity, context)
        can = (budget[0] > floor[0]) & (budget[-1] < capacity[-1]) & (len(floor) > 1)
        take = can.long() * (next(_CALLS) % 2)
        return torch.cat([budget[:1] - take, budget[1:-1], budget[-1:] + take]) if len(floor) > 1 else budget


def _by_size(self: Any, right: Any, importance: Any, total: Any, floor: Any, capacity: Any, context: Any) -> Any:
    if importance.dtype != torch.float32:
        return floor.long()
    return right(importance, total, floor, capacity, context)


def _sees_all(self: Any, right: Any, importance: Any, total: Any, floor: Any, capacity: Any, context: Any) -> Any:
    weights = torch.nan_to_num(importance, neginf=-9.0).sum(-1).clamp(min=0) + 1e-3
    from kvcompress.policies.allocators.apportionment import apportion

    return apportion(weights, total, floor, capacity)


class OneSlotMore(Allocator):
    """Right but where there is nothing."""

    def allocate(self, importance, total, floor, capacity, context=None):
        budget = ALLOCATORS.create("uniform").allocate(importance, total, floor, capacity, context)
        return budget if importance.shape[2] else budget.int()


wrong("allocator", "answers_int64", "uniform", "allocate", lambda self, right, *args: right(*args).int())
wrong("allocator", "stays_within_bounds", "uniform", "allocate", _moved)
wrong("allocator", "takes_any_float", "uniform", "allocate", _by_size, reads_importance=True)
wrong("allocator", "treats_rows_by_themselves", "uniform", "allocate", _of_all_rows)
wrong("allocator", "leaves_its_input_alone", "uniform", "allocate", overwritten(lambda importance: importance))
WRONG.append(("allocator", "answers_alike", ByChance))
wrong("allocator", "reads_no_empty_slots", "uniform", "allocate", _sees_all, reads_importance=True)
wrong("allocator", "reads_importance_only_where_it_says_so", "uniform", "allocate", _sees_all)
WRONG.append(("allocator", "gives_nothing_where_there_is_nothing", OneSlotMore))

# -- scorers -----------------------------------------------------------------------------------------------------------

wrong("scorer", "scores_every_head_and_slot", "key_norm", "score", lambda self, right, layer: right(layer).sum(1))
wrong("scorer", "gives_mass_where_it_says_so", "key_norm", "score", lambda self, right, layer: right(layer), mass=True)
wrong("scorer", "leaves_its_layer_alone", "key_norm", "score", overwritten(lambda layer: layer.keys))
wrong("scorer", "scores_alike", "key_norm", "score", noisy)
wrong("scorer", "scores_rows_by_themselves", "key_norm", "score", lambda self, right, x: right(x) - right(x).mean())
wrong(
    "scorer",
    "scores_heads_that_hold_different_tokens",
    "key_norm",
    "score",
    lambda self, right, layer: right(layer)[:, :1] if layer.index.shape[1] > 1 else right(layer),
)
wrong(
    "scorer",
    "scores_half_precision_alike",
    "key_norm",
    "score",
    lambda self, right, layer: right(layer) * (1 if layer.keys.dtype == torch.float32 else 2),
)
wrong(
    "scorer",
    "reads_attention_only_where_it_says_so",
    "key_norm",
    "score",
    lambda self, right, x: right(x),
    reads_attention=True,
)

# -- evictors ----------------------------------------------------------------------------------------------------------


def _in_place_of(mask: Any, layer: Any, drop: Any, take: Any) -> Any:
    """A mask with one slot of each set for another, where there are both."""
    drop, take = mask & drop, ~mask & take
    can = drop.any(-1, keepdim=True) & take.any(-1, keepdim=True)
    first = [
        torch.zeros_like(mask).scatter_(-1, one.int().argmax(-1, keepdim=True), True) & one for one in (drop, take)
    ]
    return (mask & ~(first[0] & can)) | (first[1] & can)


def _pins(self: Any, right: Any, kept: Any, sinks: Any, recents: Any) -> Any:
    return right(kept, sinks, recents).amax().expand_as(kept)


def _frees_protected(self: Any, right: Any, layer: Any) -> Any:
    held = layer.protected & (layer.index >= 0)
    worst = right(layer)
    return torch.where(held.any(-1), held.int().argmax(-1), worst[:, : held.shape[1]]).expand_as(worst)


def _reads_other_rows(self: Any, right: Any, layer: Any) -> Any:
    mask = right(layer)
    return mask if len(layer.budget) == 1 else _in_place_of(mask, layer, ~layer.protected, layer.valid)


def _by_chance(self: Any, right: Any, layer: Any) -> Any:
    mask = right(layer)
    return mask if next(_CALLS) % 2 else _in_place_of(mask, layer, ~layer.protected, layer.valid)


_S = "streaming"
wrong("evictor", "selects_a_mask", _S, "select", lambda self, right, layer: right(layer).long())
wrong(
    "evictor",
    "keeps_no_empty_slot",
    _S,
    "select",
    lambda s, right, x: _in_place_of(right(x), x, ~x.protected, ~x.valid),
)
wrong(
    "evictor",
    "keeps_the_protected",
    _S,
    "select",
    lambda s, right, x: _in_place_of(right(x), x, x.protected, x.valid & ~x.protected),
)
wrong("evictor", "keeps_the_budget_exactly", _S, "select", lambda self, right, layer: layer.valid.clone())
wrong("evictor", "selects_rows_by_themselves", _S, "select", _reads_other_rows)
wrong("evictor", "leaves_its_slots_alone", _S, "select", overwritten(lambda layer: layer.budget))
wrong("evictor", "selects_alike", _S, "select", _by_chance)
wrong("evictor", "pins_rows_by_themselves", _S, "pinned", _pins)
wrong("evictor", "frees_a_token_that_may_go", "topk", "victim", _frees_protected, frees=property(lambda self: "chosen"))

# -- mergers -----------------------------------------------------------------------------------------------------------


def _merged(change: Callable[..., Any]) -> Callable[..., Any]:
    def bad(self: Any, right: Any, layer: Any) -> Merged:
        found = right(layer)
        return Merged(change(found.keys, layer), found.values, found.state)

    return bad


_M = "nearest"
wrong("merger", "gives_back_what_it_got", _M, "merge", _merged(lambda keys, layer: keys.double()))
wrong("merger", "changes_nothing_without_evicted_slots", _M, "merge", _merged(lambda keys, layer: keys * 1.001))
wrong("merger", "leaves_the_layer_alone", _M, "merge", overwritten(lambda layer: layer.keys))
wrong("merger", "merges_alike", _M, "merge", _merged(lambda keys, layer: keys + torch.rand(()) * layer.evicted.any()))
wrong(
    "merger",
    "ignores_the_order_of_rows_and_slots",
    _M,
    "merge",
    _merged(lambda keys, layer: keys + torch.arange(keys.shape[2])[:, None] * layer.evicted.any()),
)
wrong(
    "merger",
    "ignores_empty_slots",
    _M,
    "merge",
    _merged(lambda keys, layer: keys + (~(layer.kept | layer.evicted)).sum(-1)[..., None, None] * layer.evicted.any()),
)
wrong(
    "merger",
    "merges_heads_and_rows_by_themselves",
    _M,
    "merge",
    _merged(lambda keys, layer: keys + layer.evicted.sum() * 0.01),
)
wrong(
    "merger",
    "rounds_half_precision_once",
    _M,
    "merge",
    _merged(lambda keys, layer: (keys + 0.25) - 0.25 if keys.dtype != torch.float32 else keys),
)

# -- quantizers --------------------------------------------------------------------------------------------------------


def _codes(change: Callable[[Codes], Codes]) -> Callable[..., Any]:
    return lambda self, right, tensor: change(right(tensor))


def _scaled(codes: Codes, by: Any) -> Codes:
    return Codes(codes.data, codes.scale * by, None if codes.shift is None else codes.shift * by, codes.dim)


_Q = "quanto"
wrong("quantizer", "decodes_to_what_it_encoded", _Q, "decode", lambda self, right, codes: right(codes).double())
wrong(
    "quantizer",
    "writes_rows_of_codes",
    _Q,
    "encode_values",
    _codes(lambda c: Codes(c.data, c.scale, c.shift, c.dim + 1)),
)
wrong(
    "quantizer",
    "quantizes_groups_by_themselves",
    _Q,
    "encode_keys",
    _codes(lambda c: _scaled(c, c.scale.shape[2] ** 0.1)),
)
wrong("quantizer", "decodes_groups_by_themselves", _Q, "decode", lambda s, right, c: right(c) * c.data.shape[2] ** 0.01)
wrong("quantizer", "quantizes_rows_by_themselves", _Q, "encode_keys", _codes(lambda c: _scaled(c, len(c.scale) ** 0.1)))
wrong(
    "quantizer",
    "quantizes_heads_by_themselves",
    _Q,
    "encode_keys",
    _codes(lambda c: _scaled(c, c.scale.shape[1] ** 0.1)),
)
wrong("quantizer", "is_off_by_less_than_the_largest", _Q, "encode_keys", _codes(lambda c: _scaled(c, 4.0)))
wrong("quantizer", "leaves_its_numbers_alone", _Q, "encode_keys", overwritten(lambda tensor: tensor))
wrong("quantizer", "quantizes_alike", _Q, "encode_keys", _codes(lambda c: _scaled(c, 1 + torch.rand(()) * 0.01)))
wrong(
    "quantizer",
    "decodes_half_precision_as_single",
    _Q,
    "decode",
    lambda self, right, codes: right(codes) * (1 if codes.scale.dtype == torch.float32 else 1.5),
)

# -- reducers ----------------------------------------------------------------------------------------------------------


def _reduced(change: Callable[[Reduced, Any], Any]) -> Callable[..., Any]:
    return lambda self, right, layer: change(right(layer), layer)


def _dropped(found: Reduced, which: Any) -> Reduced:
    return Reduced(torch.where(which, -1, found.into), found.hidden)


_R = "uniform_grid"
wrong("reducer", "acts_at_ascending_layers", _R, "acts_after", lambda self, right, layers: (*right(layers), layers))
wrong(
    "reducer",
    "gives_every_token_a_place",
    _R,
    "reduce",
    _reduced(lambda f, x: Reduced(torch.where(f.into < 0, 10**6, f.into), f.hidden)),
)
wrong("reducer", "lets_text_go_on", _R, "reduce", _reduced(lambda f, x: _dropped(f, ~x.is_image)))
wrong(
    "reducer",
    "reduces_rows_by_themselves",
    _R,
    "reduce",
    _reduced(lambda f, x: _dropped(f, x.is_image) if len(x.index) > 1 else f),
)
wrong("reducer", "leaves_the_tokens_alone", _R, "reduce", overwritten(lambda layer: layer.hidden))
wrong(
    "reducer", "reduces_alike", _R, "reduce", _reduced(lambda f, x: _dropped(f, x.is_image & (next(_CALLS) % 2 == 0)))
)

# -- in a running cache ------------------------------------------------------------------------------------------------


class Forgetful(ALLOCATORS.get("uniform")):  # type: ignore[misc]
    """Comes back from JSON with a list for a tuple."""

    name: ClassVar[str] = ""
    weights: Any = (1, 2)


def _wrote_keys(self: Any, right: Any, layer: Any) -> Any:
    score = right(layer)
    layer.keys.mul_(1.01)
    return score


def _by_batch(self: Any, right: Any, layer: Any) -> Any:
    return right(layer) * (1 if len(layer.keys) == 1 else -1)


WRONG.append(("allocator", "survives_a_file", Forgetful))
WRONG.append(("allocator", "holds_no_more_than_the_budget", Share))
wrong("scorer", "keeps_everything_at_the_full_budget", "key_norm", "score", _wrote_keys)
wrong("scorer", "compresses_as_if_it_masked", "key_norm", "score", _wrote_keys)
wrong("scorer", "runs_rows_as_alone", "key_norm", "score", _by_batch)
wrong("quantizer", "generates_with_its_neighbours", _Q, "decode", lambda self, right, codes: right(codes) * torch.nan)
