"""A reducer at work in one forward: which tokens go on from layer to layer, and with which positions."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.cache.sequence import Sequence
from kvcompress.cache.store import DenseStore
from kvcompress.errors import PolicyError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import LayerContext, LayerWeights, Reduced, ReductionContext
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout


class Reduction:
    """The tokens of a forward that have come as far as the layer that runs.

    Rows that lose different numbers of tokens are padded on the left.

    Attributes:
        offsets: numbers of the forward's columns that go on, `[batch, tokens]`; those of padding mean nothing.
        spans: per row, indices into `offsets` that are no padding; None if none is.
        points: numbers of layers after which the reducer acts.
    """

    def __init__(
        self,
        reducer: Reducer,
        points: tuple[int, ...],
        layout: ImageLayout,
        sequence: Sequence,
        first_column: int,
        spans: list[Tensor] | None,
    ) -> None:
        """Starts with all tokens of a forward, which `sequence` knows of already."""
        self.reducer = reducer
        self.points = points
        self.layout = layout
        self.sequence = sequence
        self.first_column = first_column
        self.queries = layout.grid.shape[1]
        batch = layout.grid.shape[0]
        self.offsets: Int[Tensor, "batch tokens"] = torch.arange(self.queries).expand(batch, -1).to(layout.grid.device)
        self.spans = spans
        self._all = self._rows()  # offsets of each row's own tokens, from before the first reduction
        self._took = self.offsets  # offsets whose positions the tokens have
        self._into = torch.arange(sequence.seen, device=layout.grid.device).repeat(batch, 1)
        self._guidance: list[Tensor | None] = [None] * batch

    @property
    def columns(self) -> Int[Tensor, "batch tokens"]:
        """Columns of the tokens that go on."""
        return self.offsets + self.first_column

    def observe(self, layer: int, store: DenseStore, query: Tensor, scale: float) -> None:
        """Asks the reducer for guidance at a layer after which it acts, while the layer has all of its tokens.

        Args:
            layer: index of the layer.
            store: its buffers, the new tokens stored.
            query: queries of this forward, `[batch, heads, tokens, head_dim]`.
            scale: factor on the logits.
        """
        if layer + 1 not in self.points or not self.reducer.reads_attention:
            return
        keys, values = store.slots()
        columns, counts = store.columns(), store.counts
        for row, own in enumerate(self._spans()):
            if self.layout.grids[row]:
                rows, count = slice(row, row + 1), counts[row]
                context = LayerContext(
                    layer=layer,
                    query=query[rows, :, own.to(query.device)],
                    keys=keys[rows, :, :count],
                    values=values[rows, :, :count],
                    lse=None,
                    scaling=scale,
                    index=self.sequence.index_of(columns[rows, :, :count], rows),
                    seen=self.sequence.row_seen[row],
                    is_image=self.sequence.images_at(columns[rows, :, :count], rows),
                    weights=LayerWeights(),
                    heads=store.heads,
                )
                with policy_errors(self.reducer, layer):
                    guidance = self.reducer.guidance(context)
                    self._guidance[row] = None if guidance is None else store.heads.mean(guidance)

    def reduce(self, layer: int, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch fewer hidden"]:
        """Lets the reducer act between two layers, row by row.

        Args:
            layer: index of the layer that comes next.
            hidden: hidden states of all tokens that came so far.

        Raises:
            PolicyError: if the reducer breaks its contract.
        """
        states, offsets = [], []
        for row, own in enumerate(self._spans()):
            own, mine = own.to(hidden.device), self.offsets[row, own.to(self.offsets.device)]
            state = hidden[row, own]
            if self.layout.grids[row]:
                reduced = self._reduce_row(row, layer, state, mine)
                stays = reduced.into == torch.arange(len(state), device=reduced.into.device)
                self._note(row, mine, reduced.into.to(mine.device))
                state, mine = reduced.hidden[stays.to(state.device)], mine[stays.to(mine.device)]
            states.append(state)
            offsets.append(mine)
        self.sequence.reduce(layer, self._into.clone())
        self._guidance = [None] * len(states)
        most = max(map(len, offsets))
        lengths = [len(mine) for mine in offsets]
        self.spans = None if min(lengths) == most else [torch.arange(most - length, most) for length in lengths]
        self.offsets = torch.stack([_padded(mine, most) for mine in offsets])
        contiguous = self.reducer.positions == "contiguous"
        took = [every[: len(mine)] if contiguous else mine for every, mine in zip(self._all, offsets, strict=True)]
        self._took = torch.stack([_padded(mine, most) for mine in took])
        return torch.stack([_padded(state, most) for state in states])

    def of_the_tokens(self, tensor: Tensor) -> Tensor:
        """What a tensor over all columns of the forward, `[batch or 1, columns, ...]`, says of the tokens that go on.

        For position ids and rotary embeddings: with contiguous positions, the first tokens' entries.
        """
        index = self._took.to(tensor.device)
        expanded = tensor.expand(len(index), *tensor.shape[1:])
        rows = torch.arange(len(index), device=tensor.device)[:, None]
        return expanded[rows, index]

    def spread(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch columns hidden"]:
        """Hidden states in the columns of their tokens; zero in the others."""
        full = hidden.new_zeros(hidden.shape[0], self.queries, hidden.shape[2])
        for row, own in enumerate(self._spans()):
            full[row, self.offsets[row, own.to(self.offsets.device)].to(full.device)] = hidden[row, own.to(full.device)]
        return full

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _spans(self) -> List[Tensor]:
        """Per row, indices into `offsets` that are no padding."""
        batch, tokens = self.offsets.shape
        return [torch.arange(tokens)] * batch if self.spans is None else self.spans

    def _rows(self) -> list[Tensor]:
        return [self.offsets[row, own.to(self.offsets.device)] for row, own in enumerate(self._spans())]

    def _reduce_row(self, row: int, layer: int, hidden: Tensor, offsets: Tensor) -> Reduced:
        """What the reducer does to a row's tokens; text is given back as it was."""
        device, sequence = hidden.device, self.sequence
        columns = (offsets + self.first_column)[None, None]
        rows = slice(row, row + 1)
        images = sequence.images_at(columns, rows)
        assert images is not None
        is_image, grid = images[0, 0].to(device), self.layout.grid[row, offsets].to(device)
        is_image[-1], grid[-1] = False, -1  # the last token stays: what comes next is read from its state
        every = (self._all[row] + self.first_column)[None, None]
        context = ReductionContext(
            stage=self.points.index(layer),
            layer=layer - 1,
            hidden=hidden,
            index=sequence.index_of(columns, rows)[0, 0].to(device),
            is_image=is_image,
            grids=self.layout.grids[row],
            grid=grid,
            cell=self.layout.cell[row, offsets].to(device),
            image_tokens=int(sequence.images_at(every, rows).sum()),  # type: ignore[union-attr]
            guidance=self._guidance[row],
        )
        with policy_errors(self.reducer, layer - 1):
            reduced = self.reducer.reduce(context)
            self._check(reduced, context)
        text = ~context.is_image.unsqueeze(-1)
        return Reduced(reduced.into, torch.where(text, hidden, reduced.hidden))

    def _check(self, reduced: Reduced, context: ReductionContext) -> None:
        label, given = f"reducer {self.reducer.name}: after layer {context.layer}", context.hidden
        came, into = reduced.hidden, reduced.into
        if came.shape != given.shape or came.dtype != given.dtype or into.shape != given.shape[:1]:
            raise PolicyError(
                f"{label}: must return hidden states as {given.dtype} {tuple(given.shape)} and a number for each of "
                f"the {len(given)} tokens; got {came.dtype} {tuple(came.shape)} and {tuple(into.shape)}"
            )
        own = torch.arange(len(into), device=into.device)
        stays = into == own
        if not bool((stays | context.is_image.to(into.device)).all()):
            raise PolicyError(f"{label}: must let all text go on; it removed a text token")
        outside = (into < -1) | (into >= len(into))
        if bool(outside.any()) or not bool((stays[into.clamp(min=0)] | (into == -1)).all()):
            raise PolicyError(f"{label}: a token can only become part of one that stays, or be dropped (-1)")

    def _note(self, row: int, offsets: Tensor, into: Tensor) -> None:
        """Follows each column of a row to the column it is part of now."""
        columns = offsets + self.first_column
        target = torch.where(into < 0, -1, columns[into.clamp(min=0)])
        moved = torch.arange(self._into.shape[1], device=columns.device).index_copy(0, columns, target)
        before = self._into[row]
        self._into[row] = torch.where(before < 0, -1, moved[before.clamp(min=0)])


def _padded(tensor: Tensor, length: int) -> Tensor:
    """The rows of a tensor, with zeros before them."""
    missing = length - len(tensor)
    return torch.cat([tensor.new_zeros(missing, *tensor.shape[1:]), tensor]) if missing else tensor
