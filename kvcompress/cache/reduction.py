"""A reducer at work in one forward: which tokens go on from layer to layer, and with which rotary positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.cache.followed import Followed, Numbers, taken, through_rows
from kvcompress.errors import PolicyError
from kvcompress.kernels import sent, sent_together
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext, TowerView
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout, TokenFacts


class Reduction:
    """The tokens of a forward that have come as far as the layer that runs.

    All rows are reduced at once. Rows that lose different numbers of tokens are padded on the left, so that every row
    ends with its last token. Which token becomes part of which is read once for each reduction; what follows from it is
    found on the host, whose arithmetic costs less than asking a device for as many small operations, and sent in one
    copy.

    Attributes:
        points: numbers of layers after which the reducer acts, 0 before the first.
        index: number of tokens of the row that came before each token that goes on, `[batch, tokens]`; -1 for padding.
        valid: which of them are no padding; None if none is.
        last_seen: number of the last of these tokens that each of them sees; None if it is its own.
        row_tokens: how many tokens of each row go on; None before the first reduction.
        queries: positions of the forward.
        into: for each reduction so far, by the number of layers before it: for each of the forward's positions the one
            that its token is part of from there on, -1 if it was dropped; padding is its own.
    """

    def __init__(
        self,
        reducer: Reducer,
        points: tuple[int, ...],
        layout: ImageLayout,
        *,
        index: Int[Tensor, "#batch queries"],
        valid: Bool[Tensor, "batch queries"] | None,
        is_image: Bool[Tensor, "batch queries"],
        order: Int[Tensor, "batch queries"] | None = None,
        last_seen: Int[Tensor, "batch queries"] | None = None,
        tower: TowerView | None = None,
    ) -> None:
        """Starts with all tokens of a forward, the padding of each row in its first positions.

        Args:
            reducer: what decides.
            points: numbers of layers after which it acts, ascending.
            layout: where the images are, in the same positions.
            index: number of tokens of the row that came before each token, -1 for padding; one row where all agree.
            valid: which positions hold a token; None if all do.
            is_image: which positions hold image tokens.
            order: for each position, the one that the model has its token in, where its padding is not first.
            last_seen: number of the last position that each sees; None if it is its own.
            tower: what the vision tower says of the image tokens, in the same positions; None if nobody asked.
        """
        self.reducer = reducer
        self.points = points
        self.index: Int[Tensor, "batch tokens"] = index.long().expand_as(is_image)
        self.valid: Bool[Tensor, "batch tokens"] | None = valid
        self.last_seen: Int[Tensor, "batch tokens"] | None = last_seen
        self.row_tokens: list[int] | None = None
        self.queries = is_image.shape[1]
        self.into: dict[int, Int[Tensor, "batch queries"]] = {}
        self._layout, self._tower, self._order = layout, tower, order
        self._aligned = order is None  # whether hidden states come in these positions
        self._spread = False  # whether hidden states of the tokens that go on come in all positions of the model
        self._guidance: Float[Tensor, "batch tokens"] | None = None
        self._answers: list[tuple[Tensor, Tensor]] = []  # what `of_the_tokens` was given since, and what it said
        more = [one.to(is_image.device).long() for one in (order, last_seen) if one is not None]
        stacked = torch.stack([self.index, is_image, layout.grid, *more], -1)
        read = torch.cat([stacked[..., :3], layout.cell, layout.size, stacked[..., 3:]], -1).cpu().numpy()
        home, seen = (None if given is None else read[..., at] for given, at in ((order, 7), (last_seen, -1)))
        self._followed = Followed(read[..., :7], home, seen)
        self._sent, self._images = sent_together(
            [self._followed.facts.numbers, self._followed.images()], is_image.device
        )
        self._takes = self.index  # positions of the model whose rotary positions the tokens have, once one acted

    def observes(self, layer: int) -> bool:
        """Whether `observe` has to be called when this layer has attended."""
        return self.reducer.reads_attention and layer + 1 in self.points

    def observe(self, context: LayerContext) -> None:
        """Asks the reducer for guidance at a layer after which it acts, while the layer has all of its tokens.

        Args:
            context: the layer right after its attention, all rows at once.

        Raises:
            PolicyError: if the answer is no number for each token.
        """
        if not self.observes(context.layer):
            return
        with policy_errors(self.reducer, context.layer):
            guidance = self.reducer.guidance(replace(context, image_queries=self._images.to(context.query.device)))
        if guidance is not None and guidance.shape != self.index.shape:
            raise PolicyError(
                f"reducer {self.reducer.name}: guidance at layer {context.layer} must be a number for each token, "
                f"{tuple(self.index.shape)}; got {tuple(guidance.shape)}"
            )
        self._guidance = None if guidance is None else context.heads.mean(guidance)

    def reduce(self, layer: int, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch fewer hidden"]:
        """Lets the reducer act between two layers; waits for the device once.

        Args:
            layer: index of the layer that comes next.
            hidden: hidden states of all tokens that came so far.

        Raises:
            PolicyError: if the reducer breaks its contract.
        """
        if not self._aligned:
            assert self._order is not None
            hidden, self._aligned = _of_rows(hidden, self._order.to(hidden.device).long()), True
        context = self._shown(layer, hidden)
        with policy_errors(self.reducer, layer - 1 if layer else None):
            reduced = self.reducer.reduce(context)
        self._check_form(reduced, context)
        into = reduced.into.cpu().numpy()
        places = self._go_on(layer, into, self._staying(into, context), hidden.device)
        if reduced.hidden is not hidden:  # text is given back as it was
            hidden = torch.where(context.is_image.unsqueeze(-1), reduced.hidden, hidden)
        return _at(hidden, places)

    def of_the_tokens(self, tensor: Tensor) -> Tensor:
        """What a tensor over all positions of the model, `[batch or 1, positions, ...]`, says of the tokens that go on.

        For position ids and rotary embeddings: with contiguous rotary positions, the first tokens' entries. All layers
        up to the next reduction are given the same ones, which are taken once.
        """
        for given, found in self._answers:
            if given is tensor:
                return found
        takes = self._takes.to(tensor.device)
        if tensor.shape[0] == 1:
            taken = tensor[0].index_select(0, takes.flatten()).view(*takes.shape, *tensor.shape[2:])
        else:
            taken = _of_rows(tensor, takes)
        self._answers.append((tensor, taken))
        return taken

    def spread(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch positions hidden"]:
        """Hidden states in the model's positions of their tokens; zero in the others."""
        batch, queries = hidden.shape[0], self.queries
        places = through_rows(self._followed.in_model(), queries)
        places = np.where(self._followed.valid, places, batch * queries)  # a place that is cut off
        full = hidden.new_zeros(batch * queries + 1, hidden.shape[2])
        full = full.index_copy(0, sent(places.ravel(), hidden.device), hidden.flatten(0, 1))
        return full[:-1].view(batch, queries, -1)

    def spread_between(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch positions hidden"]:
        """`spread`, of what `taken_again` is about to get."""
        self._spread = True
        return self.spread(hidden)

    def taken_again(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch fewer hidden"]:
        """Hidden states of the tokens that go on, from what `spread_between` gave; others as they are."""
        if not self._spread:
            return hidden
        self._spread = False
        return _at(hidden, sent(through_rows(self._followed.in_model(), self.queries), hidden.device))

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _shown(self, layer: int, hidden: Tensor) -> ReductionContext:
        """What the reducer sees, all where the hidden states are."""
        there = TokenFacts(self._sent.to(hidden.device))
        index, is_image, grid, cell, size = said = (there.index, there.is_image, there.grid, there.cell, there.size)
        return ReductionContext(
            stage=self.points.index(layer),
            layer=layer - 1,
            hidden=hidden,
            index=index,
            is_image=is_image,
            grids=self._layout.grids,
            grid=grid,
            cell=cell,
            size=size,
            image_tokens=self._layout.image_tokens,
            guidance=None if self._guidance is None else self._guidance.to(hidden.device),
            tower=self._tower if layer == 0 else None,
            known=(self._followed.facts, said),
        )

    def _check_form(self, reduced: Reduced, context: ReductionContext) -> None:
        given, came, into = context.hidden, reduced.hidden, reduced.into
        whole = not into.dtype.is_floating_point and into.dtype != torch.bool
        if came.shape != given.shape or came.dtype != given.dtype or into.shape != given.shape[:2] or not whole:
            raise PolicyError(
                f"{self._label(context)}: must return hidden states as {given.dtype} {tuple(given.shape)} and a whole "
                f"number for each token, {tuple(given.shape[:2])}; got {came.dtype} {tuple(came.shape)} and "
                f"{into.dtype} {tuple(into.shape)}"
            )

    def _staying(self, into: Numbers, context: ReductionContext) -> Bool[np.ndarray, "batch tokens"]:
        """Which tokens go on, once it is sure that what the reducer says makes sense."""
        valid, own, inside = self._followed.valid, self._followed.own(), into.clip(0, into.shape[1] - 1)
        stays: np.ndarray = valid & (into == own)
        if (valid & ~stays & ~self._followed.facts.is_image).any():
            raise PolicyError(f"{self._label(context)}: must let all text go on; it removed a text token")
        if (valid & (into != -1) & ~(taken(stays, inside) & (into == inside))).any():
            raise PolicyError(
                f"{self._label(context)}: a token can only become part of one that stays, or be dropped (-1)"
            )
        return stays

    def _go_on(
        self, layer: int, into: Numbers, stays: Bool[np.ndarray, "batch tokens"], device: torch.device
    ) -> Int[Tensor, "batch fewer"]:
        """Leaves the tokens that stay, and sends what is known of them; returns their places among those before."""
        followed, self._guidance, self._answers = self._followed, None, []
        last = followed.go_on(into, stays)
        takes = followed.in_model() if self.reducer.positions == "original" else followed.first_in_model()
        known = [through_rows(last, stays.shape[1]), takes, followed.facts.numbers, followed.images(), followed.into]
        places, self._takes, self._sent, self._images, self.into[layer], *more = sent_together(
            known if followed.last_seen is None else [*known, followed.last_seen], device
        )
        self.index = self._sent[..., 0]
        self.row_tokens = followed.valid.sum(1).tolist()
        self.valid = None if followed.valid.all() else self.index >= 0
        self.last_seen = more[0] if more else None
        return places

    def _label(self, context: ReductionContext) -> str:
        where = f"after layer {context.layer}" if context.layer >= 0 else "before the first layer"
        return f"reducer {self.reducer.name}: {where}"


def _at(tensor: Tensor, places: Int[Tensor, "batch fewer"]) -> Tensor:
    """What a tensor `[batch, positions, ...]` has in some places, counted through all rows."""
    return tensor.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, *tensor.shape[2:])


def _of_rows(tensor: Tensor, positions: Int[Tensor, "batch fewer"]) -> Tensor:
    """Some positions of each row of a tensor `[batch, positions, ...]`."""
    if len(positions) > 1:
        rows = torch.arange(0, len(positions) * tensor.shape[1], tensor.shape[1], device=positions.device)
        positions = positions + rows.unsqueeze(1)
    return _at(tensor, positions)
