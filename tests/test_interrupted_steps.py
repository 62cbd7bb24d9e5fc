"""An interrupt anywhere leaves a cache that is whole, or one that is refused until it is reset."""

from __future__ import annotations

import pytest
import torch

from kvcompress import CompressedCache
from kvcompress.errors import CacheStateError
from tests import tiny
from tests.interrupts import Lines, Outcomes, Scenario, scenarios, step

SAMPLES = 2  # interrupts of every sixth scenario; more: python -m tests.interrupts --every 7


def test_an_interrupt_leaves_a_cache_that_is_whole_or_broken() -> None:
    faults = []
    for number, scenario in list(enumerate(scenarios()))[::6]:
        outcomes = Outcomes.of(scenario)
        places = [(number * 0.618 + sample / SAMPLES) % 1 for sample in range(SAMPLES)]
        faults += [outcomes.fault(int(place * outcomes.lines)) for place in places]
    assert not [fault for fault in faults if fault]


def test_a_step_interrupted_as_it_begins_is_marked_as_failed() -> None:
    """No line may have tokens counted that are not stored: the first third of a decode step, more densely."""
    scenario = next(one for one in scenarios() if one.name == "prefix: decode")
    outcomes = Outcomes.of(scenario)
    faults = [outcomes.fault(at) for at in range(outcomes.lines // 6, outcomes.lines // 2, 13)]
    assert not [fault for fault in faults if fault]


def test_the_sweep_sees_a_cache_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law is sharp: an operation that swallows the interrupt half-way is found out."""

    def swallows(cache: CompressedCache) -> None:
        try:
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([0]))
        except KeyboardInterrupt:
            pass

    scenario = Scenario("two in one", {"config": "streaming", "budget": 8}, (step(12, 1),), swallows, batch=1)
    outcomes = Outcomes.of(scenario)
    with Lines() as lines:
        cache = scenario.start()
        lines.count = 0
        cache.reorder_cache(torch.tensor([1, 0]))
        between = lines.count
    assert outcomes.fault(between + 1)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_step_that_fails_in_any_layer_breaks_the_cache(tokens: int) -> None:
    model = tiny.model("llama")
    for layer in range(3):
        cache = CompressedCache(model, "prefixkv", budget=0.5)
        model(tiny.token_ids(1, 20, seed=1), **tiny.with_cache(cache))

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(tiny.token_ids(1, tokens, seed=2), **tiny.with_cache(cache))
        finally:
            handle.remove()
        if layer < 2:
            with pytest.raises(CacheStateError, match=r"call reset\(\)"):
                model(tiny.token_ids(1, tokens, seed=2), **tiny.with_cache(cache))
        else:  # every layer has stored and attended: the cache is whole
            assert cache.get_seq_length() == 20 + tokens
            model(tiny.token_ids(1, tokens, seed=2), **tiny.with_cache(cache))
