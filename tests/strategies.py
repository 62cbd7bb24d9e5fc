"""What Hypothesis draws: shapes and seeds, from which a torch.Generator makes tensors; and every registered policy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress import ALLOCATORS, EVICTORS, MERGERS, QUANTIZERS, REDUCERS, SCORERS, CompressionConfig
from kvcompress.config.composition import EXAMPLES
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError
from kvcompress.policies.base import Allocator, Evictor, Merger, Policy, Quantizer, Reducer, Scorer
from kvcompress.policies.context import AllocationContext, Importance, LayerContext, MergeContext, SelectionContext
from kvcompress.policies.registry import Registry
from kvcompress.policies.statistics import STATISTICS

seeds = st.integers(0, 2**31 - 1)
THOROUGH = settings.default.max_examples > 25  # pytest --hypothesis-profile=thorough


def examples(number: int) -> settings:
    """So many examples in the quick profile, and as many times more in another as it runs more of all."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 25))


def generator(seed: int) -> torch.Generator:
    """The source of every random tensor of a test."""
    return torch.Generator().manual_seed(seed)


# -- policies ----------------------------------------------------------------------------------------------------------

# Fields of policies that cannot be made from their name alone: (stage, name) -> fields.
FIELDS = EXAMPLES
# Further variants of policies, beyond the combinations of their choices.
VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("scorer", "attention"): [
        {"queries": "window:4"},
        {"queries": "stride:3"},
        {"queries": "post_vision", "reduce": "mean", "image_weight": 0.5},
    ],
    ("scorer", "defensive"): [{"window": 3, "kernel": 3}, {"window": 1, "projected": False}],
    ("scorer", "expected_attention"): [{"future": 3, "epsilon": 0.02}, {"sink": 0}],
    ("scorer", "lagkv"): [{"lag": 4, "sink": 2}],
    ("scorer", "leverage"): [{"chunk": 4, "blend": 1.5}],
    ("scorer", "mixkv"): [{"window": 3, "kernel": 1}],
    ("scorer", "rkv"): [{"window": 3, "kernel": 1, "share": 0.6, "threshold": 0.2}],
    ("scorer", "snapkv"): [{"window": 3, "kernel": 3, "pool": "max"}, {"window": 1}],
    ("scorer", "value_aware"): [
        {"queries": "window:4", "reduce": "mean", "norm": "projected_l1", "epsilon": 1e-4},
        {"queries": "window:4", "norm": "largest_l1"},
    ],
    ("allocator", "modality"): [{"image": "uniform", "text": "entropy", "image_share": 0.7}],
    ("allocator", "profile"): [{"retention": None, "retentions": [[0.6, 0.2, 0.7], [0.3, 0, 0.3]]}],
    ("allocator", "adakv"): [{"safeguard": 0.0, "layers": "prefix"}, {"safeguard": 0.7, "layers": "entropy"}],
    ("evictor", "chunk"): [{"length": 3}],
    ("evictor", "critical"): [{"first": 0.25, "epsilon": 0.1}],
    ("merger", "cam"): [{"reach": 3, "seed": 1}],
    ("merger", "lookm"): [{"rule": rule, "within_modality": False} for rule in ("average", "pivotal", "weighted")],
    ("merger", "threshold"): [{"beta": 0.25, "decoding": False}],
}


def policy(registry: Registry[Any], name: str, **fields: Any) -> Any:
    """A registered policy, with example values for the fields that it demands."""
    return registry.create(name, **{**FIELDS.get((registry.stage, name), {}), **fields})


@functools.cache
def variants(registry: Registry[Any]) -> tuple[Any, ...]:
    """Every registered policy of a stage with every combination of its choices (fields of Literal type), and more."""
    found = []
    for name in registry.names():
        fields = registry.get(name).model_fields
        choices = {key: get_args(f.annotation) for key, f in fields.items() if get_origin(f.annotation) is Literal}
        for values in itertools.product(*choices.values()):
            found.append(policy(registry, name, **dict(zip(choices, values, strict=True))))
        found += [policy(registry, name, **more) for more in VARIANTS.get((registry.stage, name), [])]
    return tuple(found)


def label(given: Any) -> str:
    """A readable test id of a policy."""
    return "none" if given is None else f"{given.name}-{'-'.join(str(v) for _, v in given)}".rstrip("-")


def allocators() -> tuple[Allocator, ...]:
    """Every registered allocator, for the three layers of the tiny models."""
    return variants(ALLOCATORS)


def for_layers(allocator: Allocator, layers: int) -> Allocator:
    """The same allocator for a model of so many layers: what it holds per layer is repeated or cut."""
    changed: dict[str, Any] = {}
    for name, value in allocator:
        if isinstance(value, Allocator):
            changed[name] = for_layers(value, layers)
        elif name in ("retention", "gates") and value:
            changed[name] = list(itertools.islice(itertools.cycle(value), layers))
        elif name == "retentions" and value:
            changed[name] = [list(itertools.islice(itertools.cycle(one), layers)) for one in value]
    return type(allocator)(**{**dict(allocator), **changed})


def evictors() -> tuple[Evictor, ...]:
    """Every registered evictor, in every granularity and with every decode rule."""
    return variants(EVICTORS)


def bounded_evictors() -> list[Evictor]:
    """Those that keep layers within their budget while decoding."""
    return [evictor for evictor in evictors() if getattr(evictor, "decode", None) != "none"]


def scorers() -> tuple[Scorer, ...]:
    """Every registered scorer with every choice it offers."""
    return variants(SCORERS)


def mergers() -> tuple[Merger, ...]:
    """Every registered merger with every choice it offers."""
    return variants(MERGERS)


def quantizers() -> tuple[Quantizer, ...]:
    """Every registered quantizer with every choice it offers."""
    return variants(QUANTIZERS)


def reducers() -> tuple[Reducer, ...]:
    """Every registered reducer with every choice it offers."""
    return variants(REDUCERS)


def _compatible(**fields: Any) -> CompressionConfig | None:
    try:
        return CompressionConfig(**fields)
    except ConfigError:
        return None


def config_with(given: Policy, **fields: Any) -> CompressionConfig:
    """A valid configuration around one policy: the first neighbours that go with it."""
    mine = {given.stage: given}
    for scorer, allocator, evictor in itertools.product(
        [*scorers(), None], [policy(ALLOCATORS, "uniform"), *allocators()], [policy(EVICTORS, "topk"), *evictors()]
    ):
        around = {"scorer": scorer, "allocator": allocator, "evictor": evictor, **mine, **fields}
        config = _compatible(**around)
        if config is not None:
            return config
    raise AssertionError(f"no configuration goes with {given!r}")


@functools.cache
def configs() -> tuple[Any, ...]:
    """Presets, and one configuration around every other policy; each with a test id."""
    return tuple(_configs())


def _configs() -> Iterator[Any]:
    for name in PRESETS:
        yield pytest.param(CompressionConfig.preset(name), id=f"preset-{name}")
    positions = itertools.cycle(("original", "contiguous", "per_layer"))
    fewer = [policy(REDUCERS, name, positions=next(positions)) for name in REDUCERS.names()]  # each runs an image model
    for given in (*scorers(), *allocators(), *evictors(), *mergers(), *quantizers(), *fewer):
        yield pytest.param(config_with(given), id=f"{given.stage}-{label(given)}")


# -- allocation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllocationInput:
    """What an allocator is given."""

    importance: Tensor  # [layers, batch, tokens]
    total: Tensor  # [batch]
    floor: Tensor  # [layers, batch]
    capacity: Tensor  # [layers, batch]
    statistics: dict[str, Tensor] = field(default_factory=dict)  # [layers, batch]
    is_image: Tensor | None = None  # [layers, batch, tokens]

    def context(self) -> AllocationContext:
        """A context without notes."""
        return AllocationContext(statistics=self.statistics, is_image=self.is_image)

    def by(self, allocator: Allocator, **changed: Tensor) -> Tensor:
        """What an allocator, made for as many layers, gives for this, or for this with some of it changed."""
        given = replace(self, **changed)
        if allocator.by_head:
            return given._by_heads(allocator)
        allocator = for_layers(allocator, given.floor.shape[0])
        return allocator.allocate(given.importance, given.total, given.floor, given.capacity, given.context())

    def _by_heads(self, allocator: Allocator) -> Tensor:
        """The same of an allocator of heads, with some neighbouring layers as heads of one."""
        heads = next((count for count in (2, 3, 5, 7) if self.floor.shape[0] % count == 0), 1)
        importance, floor, capacity, is_image = (
            None if given is None else given.unflatten(0, (-1, heads)).movedim(1, 2)
            for given in (self.importance, self.floor, self.capacity, self.is_image)
        )
        statistics = {name: known[::heads] for name, known in self.statistics.items()}
        context = AllocationContext(statistics=statistics, is_image=is_image)
        allocator = for_layers(allocator, floor.shape[0])
        return allocator.allocate(importance, self.total, floor, capacity, context).movedim(2, 1).flatten(0, 1)

    def rows(self, rows: slice) -> AllocationInput:
        """Some rows alone."""
        return AllocationInput(
            self.importance[:, rows],
            self.total[rows],
            self.floor[:, rows],
            self.capacity[:, rows],
            {name: known[:, rows] for name, known in self.statistics.items()},
            None if self.is_image is None else self.is_image[:, rows],
        )


def _random(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.empty(shape).exponential_(generator=g)


def _ties(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(0, 3, shape, generator=g).float()


def _equal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.full(shape, 0.37)


def _zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _some_layers_empty(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g) * torch.randint(0, 2, (shape[0], 1, 1), generator=g)


def _identical_layers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random((1, *shape[1:]), g).expand(shape).contiguous()


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    picked = torch.randint(0, shape[2], (*shape[:2], 1), generator=g)
    return torch.zeros(shape).scatter_(2, picked, 1.0)


def _powers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.exp2(-torch.randint(0, 60, shape, generator=g).float())


def _huge(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g).clamp(max=3.0) * 1e38


def _denormal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _random(shape, g) * 1e-43


def _mixed_scales(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.pow(10.0, torch.randint(-44, 38, shape, generator=g).float())


MASSES = {
    f.__name__.strip("_"): f
    for f in (
        *(_random, _ties, _equal, _zeros, _some_layers_empty, _identical_layers),
        *(_one_hot, _powers, _huge, _denormal, _mixed_scales),
    )
}


any_mass = st.sampled_from(sorted(MASSES))


def dyadic_masses(shape: tuple[int, ...], g: torch.Generator, bits: int = 10, empty: bool = True) -> Tensor:
    """Integers that add up to 2**bits over the tokens of a layer, so that shares are exact; some layers hold none."""
    layers, batch, tokens = shape
    picked = torch.randint(0, tokens, (layers, batch, 2**bits), generator=g)
    # Some layers concentrate: a token is picked again and again with the probability of a drawn power.
    sharp = torch.randint(1, 4, (layers, batch, 1), generator=g)
    picked = (tokens * (picked / tokens) ** sharp).long()
    mass = torch.zeros(shape).scatter_add_(2, picked, torch.ones(picked.shape))
    if empty:
        mass *= torch.randint(0, 4, (layers, batch, 1), generator=g) > 0
    return mass


@st.composite
def allocation_inputs(
    draw: st.DrawFn,
    kinds: st.SearchStrategy[str] = any_mass,
    max_layers: int = 6,
    max_batch: int = 3,
    max_tokens: int = 40,
    min_tokens: int = 1,
) -> AllocationInput:
    """Importance of a drawn kind with totals, floors and capacities, also totals that no allocation can meet."""
    layers, batch = draw(st.integers(1, max_layers)), draw(st.integers(1, max_batch))
    tokens, seed, kind = draw(st.integers(min_tokens, max_tokens)), draw(seeds), draw(kinds)
    g = generator(seed)
    importance = (
        dyadic_masses((layers, batch, tokens), g) if kind == "dyadic" else MASSES[kind]((layers, batch, tokens), g)
    )
    floor, capacity = draw(bounds(layers, batch, tokens, g))
    most = layers * tokens
    totals = st.integers(0, most) | st.integers(-3, most + 3) | st.sampled_from([0, 1, most, 2**40])
    total = torch.tensor([draw(totals) for _ in range(batch)])
    is_image = None
    if draw(st.booleans()):
        is_image = torch.rand(importance.shape, generator=g) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return AllocationInput(importance, total, floor, capacity, draw(statistics(layers, batch, g)), is_image)


@st.composite
def statistics(draw: st.DrawFn, layers: int, batch: int, g: torch.Generator) -> dict[str, Tensor]:
    """A value of every known statistic, from 0 to 1: random, equal, or none."""
    kinds = {
        "random": torch.rand(layers, batch, generator=g),
        "equal": torch.full((layers, batch), 0.3),
        "zeros": torch.zeros(layers, batch),
    }
    return {name: kinds[draw(st.sampled_from(sorted(kinds)))] for name in STATISTICS}


@st.composite
def bounds(draw: st.DrawFn, layers: int, batch: int, tokens: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Floors and capacities: none, the same everywhere, or random."""
    capacity = torch.full((layers, batch), tokens)
    if draw(st.booleans()):
        capacity = torch.randint(0, tokens + 1, (layers, batch), generator=g)
    floor = torch.zeros(layers, batch, dtype=torch.long)
    kind = draw(st.sampled_from(["none", "same", "random"]))
    if kind == "same":
        floor = torch.minimum(floor + draw(st.integers(0, tokens)), capacity)
    elif kind == "random":
        floor = (torch.rand(layers, batch, generator=g) * (capacity + 1)).long().clamp(max=capacity)
    return floor, capacity


# -- selection ---------------------------------------------------------------------------------------------------------


class Scripted(Scorer):
    """Scores that follow from layer, head and the number of tokens before alone, so that plain lists can know them."""

    name: ClassVar[str] = "scripted"
    mass: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    seed: int = 0
    highest: int = 2**20  # sums of a few are exact in float32, and equal shares of two layers unlikely

    def table(self, layer: int, heads: int, tokens: int) -> Tensor:
        """Scores `[heads, tokens]`."""
        rows = [
            torch.randint(1, self.highest, (512,), generator=generator(self.seed + 64 * layer + head))
            for head in range(heads)
        ]
        return torch.stack(rows)[:, :tokens].float()

    def at(self, layer: int, head: int, index: int) -> int:
        """Score of one token."""
        return _scripted_row(self.seed, self.highest, layer, head)[index]

    def score(self, layer: LayerContext) -> Importance:
        """Looks the scores up."""
        batch, heads, tokens = layer.keys.shape[:3]
        index = layer.index.long().clamp(min=0).expand(batch, heads, tokens)
        return self.table(layer.layer, heads, 512).expand(batch, -1, -1).gather(-1, index)


@functools.cache
def _scripted_row(seed: int, highest: int, layer: int, head: int) -> list[int]:
    return Scripted(seed=seed, highest=highest).table(layer, head + 1, 512)[head].int().tolist()


@st.composite
def selection_contexts(draw: st.DrawFn, modality: bool | None = None) -> SelectionContext:
    """A layer with empty slots, protected slots, ties, and a budget that covers the protected.

    Args:
        draw: Hypothesis's.
        modality: whether images have a budget of their own; drawn if None.
    """
    batch, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    sets = draw(st.sampled_from([1, heads]))
    g = generator(draw(seeds))
    count = torch.tensor([draw(st.integers(1, slots)) for _ in range(batch)])[:, None, None]
    sinks, recents = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    # Any order of tokens: decode steps overwrite freed slots.
    position = torch.rand(batch, sets, slots, generator=g).argsort(-1)
    valid = position < count
    gaps = torch.randint(1, 4, (batch, sets, slots), generator=g).cumsum(-1)
    index = gaps.gather(-1, position).masked_fill(~valid, -1).int()
    protected = valid & ((position < sinks) | (position >= count - recents))
    least = protected.sum(-1).amax(-1)
    budget = [draw(st.integers(low, high)) for low, high in zip(least.tolist(), count.flatten().tolist(), strict=True)]
    score = MASSES[draw(st.sampled_from(["random", "ties", "equal", "zeros"]))]((batch, heads, slots), g)
    norms = torch.rand(batch, heads, slots, generator=g) + 0.1
    context = SelectionContext(torch.tensor(budget), valid, protected, index, score, value_norms=norms)
    if not (draw(st.booleans()) if modality is None else modality):
        return context
    # The same tokens are images in every set, wherever they are stored.
    is_image = (torch.rand(batch, 1, slots, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))).expand(
        batch, sets, slots
    )
    is_image = is_image.gather(-1, position) & valid
    images, texts = is_image[:, 0].sum(-1), (valid & ~is_image)[:, 0].sum(-1)
    pinned_images = (protected & is_image)[:, 0].sum(-1)
    pinned_texts = (protected & ~is_image)[:, 0].sum(-1)
    low = torch.maximum(pinned_images, context.budget - texts).tolist()
    high = torch.minimum(images, context.budget - pinned_texts).tolist()
    image_budget = torch.tensor([draw(st.integers(*bounds)) for bounds in zip(low, high, strict=True)])
    return replace(context, is_image=is_image, image_budget=image_budget)


# -- merging -----------------------------------------------------------------------------------------------------------


@st.composite
def merge_contexts(draw: st.DrawFn, decoding: bool | None = None, dtype: torch.dtype = torch.float32) -> MergeContext:
    """A layer after selection: empty slots, heads that keep different tokens, ties, images, tokens without a score."""
    batch, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    by_head, g = draw(st.booleans()), generator(draw(seeds))
    decoding = draw(st.booleans()) if decoding is None else decoding
    count = torch.tensor([draw(st.integers(0 if batch > 1 else 1, slots)) for _ in range(batch)])[:, None, None]
    most, more = draw(st.sampled_from([(1, 0), (2, 1), (slots, 2)]))  # a slot a row is what a decode step frees
    going = torch.tensor([draw(st.integers(0, most)) for _ in count]).view(-1, 1, 1).minimum(count)
    position = torch.rand(batch, heads if by_head else 1, slots, generator=g).argsort(-1).expand(batch, heads, slots)
    held = position < count
    index = torch.randint(1, 4, (batch, 1, slots), generator=g).cumsum(-1).expand_as(position).gather(-1, position)
    chance = torch.rand(batch, heads if by_head else 1, slots, generator=g).expand_as(position)
    evicted = chance.masked_fill(~held, 2.0).argsort(-1).argsort(-1) < going
    kept = held & ~evicted
    importance = MASSES[draw(st.sampled_from(["random", "ties", "equal", "zeros"]))]((batch, heads, slots), g)
    if decoding:
        unscored = torch.rand(batch, 1, 1, generator=g) * 60
        importance = importance.masked_fill(index > unscored, torch.nan)
    images = torch.rand(batch, 60, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    shape = (batch, heads, slots, 4)
    if draw(st.booleans()):
        keys = torch.randint(-1, 2, shape, generator=g).float()
    else:
        keys = torch.randn(shape, generator=g)
    state = torch.rand(batch, heads, generator=g).masked_fill(torch.rand(batch, heads, generator=g) < 0.2, torch.nan)
    return MergeContext(
        layer=draw(st.integers(0, 3)),
        keys=keys.to(dtype),
        values=torch.randn(shape, generator=g).to(dtype),
        kept=kept,
        evicted=evicted,
        index=index.masked_fill(~held, -1),
        importance=importance.masked_fill(~held, 0.0),
        is_image=draw(st.sampled_from([None, images.unsqueeze(1).expand(-1, heads, -1).gather(-1, index) & held])),
        most_kept=min(slots, int(kept.sum(-1).max()) + more),
        most_evicted=min(slots, int(evicted.sum(-1).max()) + more),
        decoding=decoding,
        state=draw(st.sampled_from([None, state])),
    )
