"""A cache through any sequence of calls, against plain lists for what it holds and DynamicCache for what is in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvcompress import SCORERS, Budget, CompressedCache, CompressionConfig
from kvcompress.errors import CacheStateError
from kvcompress.policies.base import Allocator, Evictor
from tests import oracles, strategies, tiny
from tests.reference import Reference, decoder_layers, held, recorded
from tests.strategies import Scripted

LAYERS, HEADS = 3, 2


@st.composite
def configurations(draw: st.DrawFn) -> CompressionConfig:
    """Budgets that are exact in binary, every decode rule, both granularities; scores that plain lists can know."""
    amount = draw(
        st.one_of(
            st.builds(dict, fraction=st.sampled_from([0.25, 0.5, 0.75, 1.0])),
            st.builds(dict, tokens=st.integers(1, 12)),
        )
    )
    budget = Budget(**amount, sink=draw(st.integers(0, 2)), recent=draw(st.integers(0, 2)))
    scorer = Scripted(seed=draw(strategies.seeds))
    evictor: Any = {
        "name": "topk",
        "granularity": draw(st.sampled_from(["layer", "head"])),
        "decode": draw(st.sampled_from(["fixed_point", "oldest", "lowest_score", "none"])),
        "distance": draw(st.integers(2, 6)),
    }
    # How the prefix allocator compares heads that hold different tokens is not the matter here.
    allocator = "uniform" if evictor["granularity"] == "head" else draw(st.sampled_from(["uniform", "prefix"]))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        evictor = "streaming"
    elif kind == 1:
        evictor = {"name": "every", "granularity": evictor["granularity"], "period": draw(st.integers(1, 4))}
    return CompressionConfig(budget=budget, scorer=scorer, allocator=allocator, evictor=evictor)


@dataclass
class World:
    """A cache, what plain lists say it holds, and a DynamicCache that holds everything."""

    cache: CompressedCache
    rows: list[oracles.PlainRow]
    reference: Reference
    recording: bool = False
    cropped: bool = False  # since the last forward: a budget may then be below what is held

    @property
    def seen(self) -> int:
        return self.cache.get_seq_length()

    @property
    def valid(self) -> Tensor:
        return torch.tensor([row.valid for row in self.rows], dtype=torch.bool)

    def copy(self) -> World:
        rows = [row.copy() for row in self.rows]
        return World(copy.deepcopy(self.cache), rows, self.reference.copy(), self.recording, self.cropped)


@dataclass
class Prompt:
    """A first forward."""

    lengths: list[int]
    left: bool
    recording: bool
    seed: int


prompts = st.builds(
    Prompt,
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    left=st.booleans(),
    recording=st.integers(0, 4).map(lambda number: number == 0),
    seed=strategies.seeds,
)


class CacheMachine(RuleBasedStateMachine):
    """Forwards and every change of rows and length that transformers asks of a cache, in any order."""

    @initialize(config=configurations(), prompt=prompts)
    def start(self, config: CompressionConfig, prompt: Prompt) -> None:
        """One cache after its first prompt."""
        self.config = config
        self.now = World(CompressedCache(tiny.model("llama"), config), [], Reference("llama"))
        self.worlds = [self.now]
        self.begin(prompt)

    def begin(self, prompt: Prompt) -> None:
        """The first forward of an empty cache, padded on one side."""
        if prompt.recording:
            self.record()
        self.now.rows = [oracles.PlainRow(self.config, LAYERS, HEADS, self.config.scorer.at) for _ in prompt.lengths]
        position, count = torch.arange(max(prompt.lengths)), torch.tensor(prompt.lengths)[:, None]
        self.forward(position >= max(prompt.lengths) - count if prompt.left else position < count, prompt.seed)

    # -- forwards ------------------------------------------------------------------------------------------------------

    def forward(self, new_valid: Tensor, seed: int) -> None:
        """Random tokens through the cache, the lists and the reference; attention and logits must agree."""
        now, (batch, tokens) = self.now, new_valid.shape
        if any(row.waiting for row in now.rows):  # nobody cropped after the last forward: recording is over
            now.recording = False
            for row in now.rows:
                row.settle()
        valid = torch.cat([now.valid, new_valid], dim=1) if now.rows else new_valid
        inputs = {
            "input_ids": tiny.token_ids(batch, tokens, seed),
            "attention_mask": valid.long(),
            "position_ids": (valid.cumsum(1) - 1).clamp(min=0)[:, -tokens:],
        }
        before = [[row.layers[layer].held for row in now.rows] for layer in range(LAYERS)]
        with recorded(tiny.model("llama")) as steps, torch.no_grad():
            tiny.model("llama")(**inputs, **tiny.with_cache(now.cache))
        wanted = now.reference.run(inputs, before)
        for found_layer, wanted_layer in zip(steps[0].attention, wanted.attention, strict=True):
            torch.testing.assert_close(found_layer[new_valid], wanted_layer[new_valid], rtol=0, atol=2e-5)
        for row, row_valid in zip(now.rows, new_valid.tolist(), strict=True):
            row.forward(row_valid, now.recording)
        now.cropped = False

    @rule(tokens=st.integers(2, 5), padded=st.integers(0, 7), left=st.booleans(), seed=strategies.seeds)
    def turn(self, tokens: int, padded: int, left: bool, seed: int) -> None:
        """Several tokens at once, some rows padded by one."""
        new_valid = torch.ones(len(self.now.rows), tokens, dtype=torch.bool)
        for row in range(len(self.now.rows)):
            if padded >> row & 1:
                new_valid[row, 0 if left else -1] = False
        if padded and not new_valid[:, -1].any():
            new_valid[:, -1] = True  # a forward whose last position is nobody's token is refused
        self.forward(new_valid, seed)

    @rule(steps=st.integers(1, 5), seed=strategies.seeds)
    def decode(self, steps: int, seed: int) -> None:
        """One token, a few times."""
        for number in range(steps):
            self.forward(torch.ones(len(self.now.rows), 1, dtype=torch.bool), seed + number)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Beam search: rows change places, some twice."""
        batch = len(self.now.rows)
        index = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        self.now.cache.reorder_cache(torch.tensor(index))
        self.now.reference.cache.reorder_cache(torch.tensor(index))
        self.now.rows = [self.now.rows[row].copy() for row in index]

    @precondition(lambda self: len(self.now.rows) < 3)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        """Every row several times."""
        self.now.cache.batch_repeat_interleave(repeats)
        self.now.reference.cache.batch_repeat_interleave(repeats)
        self.now.rows = [row.copy() for row in self.now.rows for _ in range(repeats)]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Some rows are dropped."""
        rows = range(len(self.now.rows))
        index = sorted(data.draw(st.sets(st.sampled_from(rows), min_size=1)))
        self.now.cache.batch_select_indices(torch.tensor(index))
        self.now.reference.cache.batch_select_indices(torch.tensor(index))
        self.now.rows = [self.now.rows[row] for row in index]

    # -- length --------------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """The last positions go, or nothing changes and the error says why."""
        length = self.now.seen - data.draw(st.integers(0, min(6, self.now.seen - 1)))
        removed = self.now.seen - length
        if not all(row.can_crop(removed) for row in self.now.rows):
            with pytest.raises(CacheStateError, match="evicted"):
                self.now.cache.crop(-removed)
        elif all(any(row.valid[:length]) for row in self.now.rows):  # no row is left without a token
            self.now.cache.crop(-removed)
            self.now.reference.cache.crop(-removed)
            for row in self.now.rows:
                row.crop(removed)
            self.now.cropped |= removed > 0
        for wrong in (-self.now.seen - 1, 1):
            with pytest.raises(CacheStateError, match="crop"):
                self.now.cache.crop(wrong)

    @rule()
    def record(self) -> None:
        """From now on, eviction waits for a crop."""
        self.now.cache.activate_past_recording()
        self.now.recording = True

    @rule()
    def compress(self) -> None:
        """What waited happens now."""
        self.now.cache.compress()
        for row in self.now.rows:
            row.settle()

    @precondition(lambda self: self.now.seen > 15)
    @rule(prompt=prompts, layer=st.none() | st.integers(0, LAYERS - 1))
    def reset(self, prompt: Prompt, layer: int | None) -> None:
        """Everything is forgotten, also after a forward that failed half-way."""
        if layer is not None:
            self.fail(layer)
        self.now.cache.reset()
        report = self.now.cache.report()
        assert report.tokens_seen == report.kv_bytes == report.index_bytes == 0
        assert report.retention == 1.0
        self.now.rows, self.now.recording, self.now.reference = [], False, Reference("llama")
        self.begin(prompt)

    def fail(self, layer: int) -> None:
        """A forward that fails half-way leaves a cache that refuses to go on until it is reset."""

        def stop(*args: Any) -> None:
            raise InterruptedError

        model, batch = tiny.model("llama"), len(self.now.rows)
        inputs = {"input_ids": tiny.token_ids(batch, 1, 0), **tiny.with_cache(self.now.cache)}
        inputs["attention_mask"] = torch.cat([self.now.valid.long(), torch.ones(batch, 1, dtype=torch.long)], dim=1)
        hook = decoder_layers(model)[layer].mlp.register_forward_pre_hook(stop)
        try:
            with torch.no_grad(), pytest.raises(InterruptedError):
                model(**inputs)
        finally:
            hook.remove()
        if layer < LAYERS - 1:  # after the last layer's attention, the cache has all it needs
            for call in (self.now.cache.compress, lambda: self.now.cache.crop(0), lambda: model(**inputs)):
                with torch.no_grad(), pytest.raises(CacheStateError, match="reset"):
                    call()

    # -- copies --------------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 5))
    def fork_or_switch(self, number: int) -> None:
        """Go on with another copy, or with a new deep copy; all go on independently, with one model."""
        if number < len(self.worlds):
            self.now = self.worlds[number]
            return
        self.now = self.now.copy()
        self.worlds = [*self.worlds, self.now][-3:]

    @rule()
    def save_and_load(self) -> None:
        """What is read from disk goes on in place of what was saved, unless a forward may still be undone."""
        cache = self.now.cache
        waits = any(row.waiting for row in self.now.rows)
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setitem(SCORERS._policies, "scripted", Scripted)
            if waits:
                with pytest.raises(CacheStateError, match="may still be undone"):
                    cache.save(folder)
                return
            cache.save(folder)
            self.now.cache = CompressedCache.load(tiny.model("llama"), folder)

    # -- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def every_copy_holds_what_it_should(self) -> None:
        """Positions as in the lists, keys and values as in DynamicCache, counts and bytes as reported."""
        for world in self.worlds:
            report = world.cache.report()
            assert report.tokens_seen == world.seen == world.reference.cache.get_seq_length()
            assert report.row_tokens_seen == [row.seen for row in world.rows]
            expected = [[row.layers[layer].held for row in world.rows] for layer in range(LAYERS)]
            assert same_positions(held(world.cache), expected)
            assert report.layer_lengths == [[len(sets[0]) for sets in layer] for layer in expected]
            world.reference.check_stored(world.cache)
            assert report.kv_bytes == sum(
                tensor.untyped_storage().nbytes()
                for layer in world.cache.layers
                for tensor in (layer.keys, layer.values)
            )
            assert report.full_kv_bytes == sum(
                tensor.nbytes for layer in world.reference.cache.layers for tensor in (layer.keys, layer.values)
            )
            if not world.recording and not world.cropped and getattr(self.config.evictor, "decode", None) != "none":
                for layer, limits in zip(report.layer_lengths, report.layer_budgets, strict=True):
                    assert all(count <= limit for count, limit in zip(layer, limits, strict=True))

    @invariant()
    def tells_whether_the_last_token_can_go(self) -> None:
        """`is_croppable` is what `crop(-1)` would do."""
        if not self.now.recording and self.now.seen > 1:
            assert self.now.cache.is_croppable == all(row.can_crop(1) for row in self.now.rows)


def same_positions(found: list[Any], expected: list[Any]) -> bool:
    """Whether positions are the same, where one set may stand for all heads."""
    for found_sets, expected_sets in zip(chain(*found), chain(*expected), strict=True):
        heads = max(len(found_sets), len(expected_sets))
        if found_sets * (heads // len(found_sets)) != expected_sets * (heads // len(expected_sets)):
            return False
    return True


TestCache = CacheMachine.TestCase
TestCache.settings = settings(strategies.examples(60), stateful_step_count=30)


# -- single laws -------------------------------------------------------------------------------------------------------


def plain_forward(cache: CompressedCache, ids: Tensor, valid: Tensor) -> None:
    """A forward of the tiny LLaMA; the mask covers all positions."""
    positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        tiny.model("llama")(ids, attention_mask=valid.long(), position_ids=positions, **tiny.with_cache(cache))


def grown(valid: Tensor, tokens: int = 1) -> Tensor:
    return torch.cat([valid, torch.ones(valid.shape[0], tokens, dtype=torch.bool)], dim=1)


# A period that is longer than a row's whole share leaves nothing to share.
_SHARING = [evictor for evictor in strategies.bounded_evictors() if (evictor.cuts_every or 0) < 100]


@pytest.mark.parametrize("evictor", _SHARING, ids=strategies.label)
def test_rows_that_are_repeated_share_a_budget_in_bytes(evictor: Evictor) -> None:
    """From the next forward on, layers hold no more than a row's smaller share, sinks and recents among it."""
    config = strategies.config_with(evictor, budget=Budget(bytes="16KiB", sink=2, recent=2), allocator="uniform")
    cache, valid = CompressedCache(tiny.model("llama"), config), torch.ones(1, 100, dtype=torch.bool)
    plain_forward(cache, tiny.token_ids(1, 100, seed=0), valid)
    cache.batch_repeat_interleave(4)
    valid = valid.repeat(4, 1)
    for number in range(3):
        valid = grown(valid)
        plain_forward(cache, tiny.token_ids(4, 1, seed=number), valid)
        report = cache.report()
        assert report.kv_bytes <= 16 * 1024
        for layer in range(LAYERS):
            for row in range(4):
                for head in range(HEADS):
                    assert {0, 1, 99 + number, 100 + number} <= set(report.positions(layer, row, head))


@pytest.mark.parametrize("allocator", strategies.allocators(), ids=strategies.label)
@strategies.examples(12)
@given(
    kib=st.integers(2, 10),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    steps=st.integers(0, 20),
    seed=strategies.seeds,
)
def test_bytes_held_stay_within_a_budget_in_bytes(
    allocator: Allocator, kib: int, lengths: list[int], steps: int, seed: int
) -> None:
    """Bytes held after any forward are at most the budget, or what the protected need.

    Where rows differ in layer sizes, the padding of the shorter rows comes on top, as `Budget` says.
    """

    def held() -> int:
        report = cache.report()
        return report.kv_bytes if allocator.name == "uniform" else sum(map(sum, report.layer_lengths)) * 128

    budget = Budget(bytes=f"{kib}KiB", sink=1, recent=1)
    config = strategies.config_with(allocator, budget=budget, scorer=Scripted(seed=seed))
    cache, batch = CompressedCache(tiny.model("llama"), config), len(lengths)
    protected = batch * LAYERS * (2 + 1) * 128  # and a slot for the token that comes
    valid = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    plain_forward(cache, tiny.token_ids(batch, max(lengths), seed), valid)
    assert held() <= max(kib * 1024, protected)
    for number in range(steps):
        valid = grown(valid)
        plain_forward(cache, tiny.token_ids(batch, 1, seed + number), valid)
        assert held() <= max(kib * 1024, protected)


def storages(thing: Any, found: dict[int, int], visited: set[int]) -> dict[int, int]:
    """Bytes of every tensor storage that an object leads to, by address; models are held by weak reference only."""
    if id(thing) in visited:
        return found
    visited.add(id(thing))
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            storages(value, found, visited)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            storages(value, found, visited)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        storages(vars(thing), found, visited)
    return found


@pytest.mark.parametrize("config", list(strategies.configs()))
def test_the_report_counts_every_byte(config: CompressionConfig) -> None:
    """No tensor that a cache leads to is missing from the report, but for a few bytes per position and layer."""
    tokens, steps = 600, 5
    cache, valid = CompressedCache(tiny.model("llama"), config), torch.ones(2, tokens, dtype=torch.bool)
    valid[0, :9] = False
    plain_forward(cache, tiny.token_ids(2, tokens, seed=0), valid)
    for number in range(steps):
        valid = grown(valid)
        plain_forward(cache, tiny.token_ids(2, 1, seed=number), valid)
        report = cache.report()
        found = sum(storages(cache, {}, set()).values())
        assert report.kv_bytes + report.index_bytes <= found
        assert found <= report.kv_bytes + report.index_bytes + 2 * valid.numel() + 256 * LAYERS
    lengths = sum(map(sum, report.layer_lengths))
    if config.quantizer is None:
        assert report.kv_bytes >= lengths * 128
        assert report.kv_bytes <= 1.1 * max(map(max, report.layer_lengths)) * 2 * LAYERS * 128
    assert report.full_kv_bytes == 2 * LAYERS * (tokens + steps) * 128


def test_a_cropped_away_cache_starts_anew() -> None:
    """Taking every token back leaves an empty cache that serves any batch."""
    cache = CompressedCache(tiny.model("llama"), "full")
    plain_forward(cache, tiny.token_ids(2, 9, seed=0), torch.ones(2, 9, dtype=torch.bool))
    cache.crop(-9)
    assert cache.get_seq_length() == cache.report().kv_bytes == 0
    plain_forward(cache, tiny.token_ids(3, 5, seed=1), torch.ones(3, 5, dtype=torch.bool))
    assert cache.report().layer_lengths == [[5] * 3] * LAYERS


def test_an_empty_cache_takes_every_call() -> None:
    """Before the first forward, changes of rows and length change nothing."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    cache.reset()
    cache.crop(0)
    cache.compress()
    cache.batch_repeat_interleave(3)
    cache = copy.deepcopy(cache)
    assert (cache.get_seq_length(), cache.is_initialized, cache.report().retention) == (0, False, 1.0)
    plain_forward(cache, tiny.token_ids(2, 8, seed=0), torch.ones(2, 8, dtype=torch.bool))
    assert cache.report().retention == 0.5


def test_a_deep_copy_shares_the_model_and_no_tensor() -> None:
    """Copies are for many questions on one document: nothing of the model is copied, everything of the cache is."""
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.5)
    valid = torch.ones(1, 40, dtype=torch.bool)
    plain_forward(cache, tiny.token_ids(1, 40, seed=0), valid)
    other = copy.deepcopy(cache)
    before, mine, theirs = cache.report(), storages(cache, {}, set()), storages(other, {}, set())
    assert not set(mine) & set(theirs)
    assert sum(theirs.values()) <= sum(mine.values())
    plain_forward(other, tiny.token_ids(1, 3, seed=1), grown(valid, 3))
    assert cache.report() == before
    assert other.get_seq_length() == 43
