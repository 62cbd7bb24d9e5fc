"""Presets named after a paper do what its authors' released code does, here as plain loops over dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress import CompressedCache, CompressionConfig
from tests import oracles, tiny
from tests.reference import Reference, held
from tests.test_allocators import largest_remainders, plain_entropy_and_variance


def run(name: str, inputs: dict[str, Any], preset: str, **fields: Any) -> tuple[CompressedCache, Reference]:
    """A cache of a preset and the reference, both after the prompt."""
    cache, dense = CompressedCache(tiny.model(name), preset, **fields), Reference(name)
    with torch.no_grad():
        tiny.model(name)(**inputs, **tiny.with_cache(cache))
    dense.run(inputs, [])
    return cache, dense


@pytest.mark.parametrize("fraction", [0.2, 0.4])
@pytest.mark.parametrize("recent", [1, 11])
@pytest.mark.parametrize("preset", ["prefixkv", "prefixkv+merge", "prefixkv+int4"])
def test_prefixkv_keeps_a_prefix_and_the_protected(preset: str, recent: int, fraction: float) -> None:
    """Every layer has the shortest prefix of its ranked tokens that holds the common share, and the protected more."""
    tokens, budget = 120, {"fraction": fraction, "sink": 1, "recent": recent}
    cache, dense = run("llama", tiny.inputs("llama", tokens, seed=3), preset, budget=budget)
    masses = [mass[0].mean(0).tolist() for mass in dense.attention_mass()]
    total, protected = int(fraction * tokens * 3), [0, *range(tokens - recent, tokens)]
    bounds = ([len(protected)] * 3, [tokens] * 3)
    wanted = oracles.prefix_budgets(masses, total, *bounds, "on_top")
    assert [lengths[0] for lengths in cache.report().layer_lengths] == wanted
    assert recent == 1 or wanted != oracles.prefix_budgets(masses, total, *bounds, "floor")
    for positions, mass in zip(held(cache), masses, strict=True):
        loose = sorted(set(range(tokens)) - set(protected), key=lambda position: -mass[position])
        assert sorted(positions[0][0]) == sorted(protected + loose[: len(positions[0][0]) - len(protected)])


@pytest.mark.parametrize("budget", [0.45, 0.7])
def test_cake_shares_out_what_the_windows_leave(budget: float) -> None:
    """The window of 32 and the four sinks in every layer, then shares in proportion to entropy times variance."""
    tokens = 120
    cache, dense = run("llama", tiny.inputs("llama", tokens, seed=4), "cake", budget=budget)
    preference = []
    for module in dense.layers:
        entropy, variance = plain_entropy_and_variance(module.weights[0])
        preference.append(entropy * variance)
    rest = int(budget * tokens * 3) - 3 * 36
    above = largest_remainders(preference, rest, [0] * 3, [tokens - 36] * 3)
    found = [lengths[0] for lengths in cache.report().layer_lengths]
    assert all(abs(size - 36 - more) <= 1 for size, more in zip(found, above, strict=True))  # float32 statistics
    assert sum(found) == rest + 3 * 36


def merged(old: Tensor, keys: Tensor, kept: list[int], evicted: list[int]) -> Tensor:
    """Rows of the kept tokens, each the mean of itself and its midpoints with the evicted ones most like it."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    taken: dict[int, list[Tensor]] = {token: [old[token]] for token in kept}
    for token in evicted:
        pivot = max(kept, key=lambda other: float(unit[token] @ unit[other]))
        taken[pivot].append((old[token] + old[pivot]) / 2)
    return torch.stack([torch.stack(taken[token]).mean(0) for token in kept])


@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_lookm_selects_and_merges_head_by_head(budget: float) -> None:
    """Text first, then the highest sums of attention, per head; evicted tokens go to the most similar of any kind."""
    inputs = tiny.inputs("llava_36", 30, seed=5)
    is_image = (inputs["input_ids"][0] == tiny.IMAGE_TOKEN).tolist()
    tokens = len(is_image)
    cache, dense = run("llava_36", inputs, "lookm", budget=budget)
    for layer, mass in enumerate(dense.attention_mass()):
        keys, values = dense.keys_and_values(layer)
        for head in range(dense.kv_heads):
            loose = range(1, tokens - 16)
            size = int(budget * tokens * 3) // 3 + (layer < int(budget * tokens * 3) % 3)
            ranked = sorted(loose, key=lambda position: (is_image[position], -float(mass[0, head, position])))
            kept = sorted([0, *ranked[: size - 17], *range(tokens - 16, tokens)])
            assert sorted(held(cache)[layer][0][head]) == kept
            evicted = [position for position in range(tokens) if position not in kept]
            own = keys[0, head].double()
            wanted = torch.cat([merged(t[0, head].double(), own, kept, evicted) for t in (keys, values)], -1)
            stored = torch.cat([cache.layers[layer].keys[0, head], cache.layers[layer].values[0, head]], -1).double()
            near = (wanted[:, None] - stored).abs().amax(-1) < 1e-4  # in any order
            assert near.any(1).all() and near.any(0).sum() == len(kept)


def test_pyramiddrop_numbers_the_survivors_of_every_layer() -> None:
    """In decoding too; what that means is written out in the tests of reducers."""
    assert CompressionConfig.preset("pyramiddrop").reducer.positions == "per_layer"
