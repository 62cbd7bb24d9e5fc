"""Where the tokens of every layer lie while a model decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvcompress.cache.allocation import Allocation, Rule
from kvcompress.cache.counts import Counts
from kvcompress.cache.slot_counts import SlotCounts
from kvcompress.kernels import sent

_LATEST = 2**31 - 1  # as a token index: never the oldest
_DERIVED = ("_allocation", "_rule", "_cut", "_age", "_none")  # from what else is known of the cache


class SlotTable(SlotCounts):
    """Which slot each layer, row and head set writes next, how many are in use, and which leaves next.

    Slots `[0, length)` are in use. A layer over its limit after a step has one slot to `free`: its token is attended in
    that step, and the next step's token takes its place. So no slot in use is ever empty while a step attends. The
    first `pinned` slots never leave by age.

    All of this is tensors on the device, which the table advances once a step for all layers; no decode step reads
    them back. The host counts along (`SlotCounts`). Once a table is made, its tensors keep their addresses until a
    buffer grows or rows change in number.

    Attributes:
        length: slots in use, `[layers, batch, sets]`.
        free: the slot that the last step freed; -1 if none.
        write: the slot that this step's token goes to.
        index: number of tokens of the row before each slot's token; -1 where a slot was never used.
        ranks: importance of the slots' tokens, `[layers, batch, kv_heads, slots]`, for an evictor that chooses by it;
            NaN where there is none.
        seen: tokens of each row.
        positions_seen: padding included.
        scored_end: tokens of each row that have a score, `[batch, 1, 1]`.
    """

    def __init__(
        self,
        index: list[Tensor],
        lengths: np.ndarray,
        pinned: np.ndarray,
        capacities: list[int],
        row_seen: Counts,
        positions: int,
        allocation: Allocation | None,
        rule: Rule,
        by_age: bool,
        packed: np.ndarray | None,
        scored_end: Counts,
        sets: int,
        ranks: list[Tensor] | None,
        cut: tuple[Allocation, int] | None,
    ) -> None:
        """Starts after a prefill step, whose tokens lie in order in the first slots.

        Args:
            index: token index of each layer's slots, `[batch, sets, slots]`, -1 beyond its tokens.
            lengths: slots in use per layer, row and set of heads, one set where all heads hold as many.
            pinned: slots that never leave by age, likewise.
            capacities: slots that each layer has.
            row_seen: tokens of each row.
            positions: how many were seen.
            allocation: the budgets of this process's heads; None if nothing is ever evicted.
            rule: how budgets grow with the tokens seen.
            by_age: whether a layer over its limit loses its oldest loose token.
            packed: tokens per layer, row and set, `[layers, batch, sets]`, held elsewhere; None if there are none.
            scored_end: tokens of each row that have a score.
            sets: at least so many sets of heads, which may hold different tokens from now on.
            ranks: importance of each layer's slots, `[batch, kv_heads, slots]`; None unless an evictor chooses by it.
            cut: the budgets of this process's heads, and the steps after which the host cuts layers to them; None if
                it never does.
        """
        super().__init__(lengths, pinned, packed, row_seen, positions, allocation, rule, by_age, cut)
        device, sets = index[0].device, max(sets, lengths.shape[2], *(held.shape[1] for held in index))
        shape = (*lengths.shape[:2], sets)
        self.index = _side_by_side(index, sets, max(capacities), torch.int32, -1)
        self.ranks: Tensor | None = None
        if ranks is not None:
            self.ranks = _side_by_side(ranks, ranks[0].shape[1], max(capacities), torch.float32, torch.nan)
        self.length = sent(lengths, device).expand(shape).clone()
        self.free = torch.full_like(self.length, -1)
        self.write = torch.zeros_like(self.length)
        self.seen = sent(row_seen, device, torch.int32).clone()
        self.scored_end = sent(scored_end, device, torch.int32)[:, None, None]
        self.positions_seen = sent(positions, device, torch.int64)
        self._none = torch.full((), -1, dtype=torch.int64, device=device)
        self._pinned = sent(pinned, device).expand(shape).clone()
        self._packed = None if packed is None else sent(packed, device)
        self._age: Tensor | None = None
        if allocation is not None:
            budgets, spent = allocation.budgets, allocation.spent[:, None]
            if rule.fraction is None:
                self._share = sent(allocation.limits(rule, row_seen * 0), device)
            else:  # a row that was given nothing gets an even share of what comes
                self._share = sent(np.where(spent > 0, budgets, 1), device)
                self._spent = sent(np.where(spent > 0, spent, rule.layers * allocation.sets), device)
        self._derive()

    def _derive(self) -> None:
        """Makes what follows from the index, and fixes addresses."""
        slots = torch.arange(self.index.shape[-1], device=self.index.device)
        if self._by_age and self._allocation is not None:
            loose = (self.index >= 0) & (slots >= self._pinned.unsqueeze(-1))
            self._age = self.index.masked_fill(~loose, _LATEST)
        if not torch.is_inference_mode_enabled():
            for tensor in vars(self).values():
                if isinstance(tensor, Tensor):
                    torch._dynamo.mark_static_address(tensor)

    def saved(self) -> dict[str, Any]:
        """What has to be kept to go on elsewhere, beside the allocation and the rule."""
        return {name: value for name, value in vars(self).items() if name not in _DERIVED}

    @classmethod
    def from_saved(
        cls, saved: Any, allocation: Allocation | None, rule: Rule, cut: tuple[Allocation, int] | None = None
    ) -> SlotTable:
        """The table that `saved` gave."""
        table = cls.__new__(cls)
        table.__dict__.update(saved, _allocation=allocation, _rule=rule, _cut=cut, _age=None)
        table._none = torch.full((), -1, dtype=torch.int64, device=table.index.device)
        table._derive()
        return table

    @property
    def capacity(self) -> int:
        """Slots that the index has room for."""
        return self.index.shape[-1]

    @property
    def sets(self) -> int:
        """1 where all heads of a layer hold the same tokens, else one for each key/value head."""
        return self.index.shape[2]

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]

    # -- a step, on the device -----------------------------------------------------------------------------------------

    def advance(self, evicts: bool) -> None:
        """Finds the slot for each layer's new token, and by age the slot that leaves after this step.

        Args:
            evicts: whether layers over their limit free a slot; not while the past is recorded.
        """
        hole = self.free >= 0
        torch.where(hole, self.free, self.length, out=self.write)
        self.length.add_(hole.logical_not())
        at, token = self.write.unsqueeze(-1), self.seen[None, :, None, None].expand(*self.write.shape, 1)
        self.index.scatter_(-1, at, token)
        if self._age is not None:
            pinned = at < self._pinned.unsqueeze(-1)
            self._age.scatter_(-1, at, torch.where(pinned, _LATEST, token))
        self.seen.add_(1)
        self.positions_seen.add_(1)
        if evicts and self._age is not None:
            self.free_oldest()
        else:
            self.free.fill_(-1)  # until the evictor has chosen, if it does

    def over(self) -> Tensor:
        """Which layers, rows and head sets hold more than their limit, bool `[layers, batch, sets]`."""
        least = self.seen.clamp(max=self._rule.sinks + self._rule.recents)[:, None]
        share = self._share
        if self._rule.fraction is not None:
            assert self._allocation is not None
            total = self.seen.to(torch.float64).mul(self._rule.fraction * self._rule.layers).add(1e-6).long()
            total = total.clamp(min=self._rule.whole * self._rule.layers) if self._rule.whole else total
            total = total if self._allocation.sets == 1 else total * self._allocation.sets
            share = (share * total[:, None]).div(self._spent, rounding_mode="floor")
        held = self.length if self._packed is None else self.length + self._packed
        return held > torch.maximum(share, least)

    def protected(self) -> Tensor:
        """Which slots hold one of a row's first or last protected tokens, bool `[layers, batch, sets, slots]`."""
        index, first = self.index, self.seen[:, None, None] - self._rule.recents
        return (index >= 0) & ((index < self._rule.sinks) | (index >= first))

    def importance(self) -> Tensor | None:
        """`ranks`, NaN in slots whose tokens came after the last step that scored."""
        return None if self.ranks is None else torch.where(self.index < self.scored_end, self.ranks, torch.nan)

    def free_oldest(self) -> None:
        """Frees the oldest loose slot of every layer over its limit; nothing where slots do not leave by age."""
        if self._age is not None:
            over = self.over() & (self.length > self._pinned)
            torch.where(over, self._age.argmin(-1), self._none, out=self.free)

    def learn_holes(self) -> None:
        """Reads which layers and rows have a free slot; waits for the device."""
        hole = self.free >= 0
        self.hole = (hole if self.extent.shape[2] > 1 else hole.any(-1, keepdim=True)).cpu().numpy()

    def choose(self, victims: Int[Tensor, "layers batch sets"]) -> None:
        """Frees the slots that an evictor names, in layers and rows that are over their limit."""
        torch.where(self.over(), victims, self._none, out=self.free)

    def newest(self, places: int) -> Tensor:
        """Where in a ring of so many places the last position seen belongs, int64 `[1]`."""
        return (self.positions_seen - 1).remainder(places).unsqueeze(0)

    # -- between steps -------------------------------------------------------------------------------------------------

    def settle(self) -> int:
        """Reads how far the device has come where the host did not run its steps; returns the positions seen."""
        seen, self.exact = int(self.positions_seen), True
        self.steps = seen - self._first_seen
        sets = self.extent.shape[2]
        self.extent, self.hole = (
            self.length[..., :sets].cpu().numpy().copy(),
            (self.free[..., :sets] >= 0).cpu().numpy(),
        )
        return seen

    def become(self, table: SlotTable) -> None:
        """Says what another table says, in its own tensors where they have the same shapes."""
        for name, value in vars(table).items():
            own = getattr(self, name, None)
            if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
                own.copy_(value)
            else:
                setattr(self, name, value)

    def grow(self, capacity: int) -> None:
        """Makes room for more slots in the index."""
        more = capacity - self.capacity
        if more > 0:
            self.index = torch.nn.functional.pad(self.index, (0, more), value=-1)
            if self.ranks is not None:
                self.ranks = torch.nn.functional.pad(self.ranks, (0, more), value=torch.nan)
            self._derive()

    def select_rows(self, index: Tensor, rows: Counts, allocation: Allocation | None) -> None:
        """Reorders, repeats or drops rows; in place where their number stays.

        Args:
            index: rows to take, in order.
            rows: the same on the host.
            allocation: the budgets of these rows.
        """
        self.select_counts(rows, allocation)
        index, alike = index.to(self.index.device), len(rows) == self.seen.shape[0]
        for name, axis in (
            ("seen", 0),
            ("scored_end", 0),
            ("index", 1),
            ("ranks", 1),
            ("length", 1),
            ("free", 1),
            ("write", 1),
            ("_pinned", 1),
            ("_share", 1),
            ("_spent", 0),
            ("_age", 1),
            ("_packed", 1),
        ):
            tensor = getattr(self, name, None)
            if tensor is not None:
                picked = tensor.index_select(axis, index)
                if alike:
                    tensor.copy_(picked)
                else:
                    setattr(self, name, picked)
        if not alike:
            self._derive()


def _side_by_side(of_layers: list[Tensor], sets: int, width: int, dtype: torch.dtype, fill: float) -> Tensor:
    """Each layer's first slots, `[batch, sets or 1, slots]`, in one `[layers, batch, sets, width]`, filled up."""
    device, batch, layers = of_layers[0].device, len(of_layers[0]), range(len(of_layers))
    alike = [one if one.shape[1] == sets else one.expand(-1, sets, -1) for one in of_layers]
    slots = [one.shape[2] for one in alike]
    places = sent(np.stack([np.repeat(layers, slots), np.concatenate([*map(np.arange, slots)])]), device)
    found = torch.full((len(layers), batch, sets, width), fill, dtype=dtype, device=device)
    found.permute(1, 2, 0, 3)[:, :, places[0], places[1]] = torch.cat([one.to(device, dtype) for one in alike], 2)
    return found
