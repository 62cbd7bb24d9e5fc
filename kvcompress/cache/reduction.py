"""A reducer at work in one forward: which tokens go on from layer to layer, and with which rotary positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.errors import PolicyError
from kvcompress.policies.base import Reducer
from kvcompress.policies.context import LayerContext, Reduced, ReductionContext, TowerView
from kvcompress.policies.faults import policy_errors
from kvcompress.policies.images import ImageLayout


class Reduction:
    """The tokens of a forward that have come as far as the layer that runs.

    All rows are reduced at once. Rows that lose different numbers of tokens are padded on the left, so that every row
    ends with its last token. The host waits for the device once for each reduction.

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
        self.into: dict[int, Int[Tensor, "batch queries"]] = {}
        self._layout, self._tower = layout, tower
        self._most_images = max(layout.image_tokens)
        batch, self.queries = is_image.shape
        positions = torch.arange(self.queries, device=is_image.device).repeat(batch, 1)
        self._every = positions
        self._positions: Int[Tensor, "batch tokens"] = positions  # of the tokens that go on
        self._into = positions
        self._order = None if order is None else order.long()
        self._aligned = order is None  # whether hidden states come in these positions
        self._spread = False  # whether hidden states of the tokens that go on come in all positions of the model
        self._takes = self._in_model(positions)  # positions of the model whose rotary positions the tokens have
        self._first = 0 if valid is None else (~valid).sum(1, keepdim=True)  # position of each row's first token
        images = is_image.clone()
        images[:, -1] = False  # the last token stays: what comes next is read from its state
        grid = layout.grid.masked_fill(~images, -1)
        facts = torch.cat([torch.stack([self.index, images, grid], -1), layout.cell, layout.size], -1)
        self._facts: Int[Tensor, "batch tokens facts"] = _blank(facts, valid)
        self._guidance: Float[Tensor, "batch tokens"] | None = None
        self._known: list[tuple[Tensor, Tensor]] = []  # what `of_the_tokens` was given since, and what it said

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
            guidance = self.reducer.guidance(replace(context, most_images=self._most_images))
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
        self._move(hidden.device)
        if not self._aligned:
            assert self._order is not None
            hidden, self._aligned = _taken(hidden, self._order), True
        facts = self._facts
        context = ReductionContext(
            stage=self.points.index(layer),
            layer=layer - 1,
            hidden=hidden,
            index=self.index,
            is_image=facts[..., 1] == 1,
            grids=self._layout.grids,
            grid=facts[..., 2],
            cell=facts[..., 3:5],
            size=facts[..., 5:],
            image_tokens=self._layout.image_tokens,
            guidance=self._guidance,
            tower=self._tower if layer == 0 else None,
        )
        with policy_errors(self.reducer, layer - 1 if layer else None):
            reduced = self.reducer.reduce(context)
        self._check_form(reduced, context)
        stays, into = self._go_on(reduced, context)
        if reduced.hidden is not hidden:  # text is given back as it was
            hidden = torch.where(context.is_image.unsqueeze(-1), reduced.hidden, hidden)
        self._note(layer, into)
        assert self.row_tokens is not None
        most = max(self.row_tokens)
        last = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, stays.shape[1] - most :]
        self.valid = None if min(self.row_tokens) == most else stays.gather(1, last)
        if self.last_seen is not None:
            until = stays.cumsum(1)
            seen = most - until[:, -1:] + until.gather(1, self.last_seen) - 1
            self.last_seen = seen.gather(1, last).maximum(torch.arange(most, device=seen.device))
        self._positions = self._positions.gather(1, last)
        places = _places(last, stays.shape[1])
        self._facts = _blank(_at(facts, places), self.valid)
        self.index = self._facts[..., 0]
        self._guidance = None
        self._takes = self._positions
        if self.reducer.positions != "original":  # those of the row's first tokens
            number = torch.arange(most, device=hidden.device) - (most - stays.sum(1, keepdim=True))
            self._takes = (self._first + number).clamp(min=0)
        self._takes, self._known = self._in_model(self._takes), []
        return _at(hidden, places)

    def of_the_tokens(self, tensor: Tensor) -> Tensor:
        """What a tensor over all positions of the model, `[batch or 1, positions, ...]`, says of the tokens that go on.

        For position ids and rotary embeddings: with contiguous rotary positions, the first tokens' entries. All layers
        up to the next reduction are given the same ones, which are taken once.
        """
        for given, found in self._known:
            if given is tensor:
                return found
        takes = self._takes.to(tensor.device)
        if tensor.shape[0] == 1:
            taken = tensor[0].index_select(0, takes.flatten()).view(*takes.shape, *tensor.shape[2:])
        else:
            taken = _taken(tensor, takes)
        self._known.append((tensor, taken))
        return taken

    def spread(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch positions hidden"]:
        """Hidden states in the model's positions of their tokens; zero in the others."""
        self._move(hidden.device)
        batch, queries = hidden.shape[0], self.queries
        places = _places(self._in_model(self._positions), queries)
        if self.valid is not None:
            places = places.masked_fill(~self.valid, batch * queries)  # a place that is cut off
        full = hidden.new_zeros(batch * queries + 1, hidden.shape[2])
        full = full.index_copy(0, places.flatten(), hidden.flatten(0, 1))
        return full[:-1].view(batch, queries, -1)

    def spread_between(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch positions hidden"]:
        """`spread`, of what `taken_again` is about to get."""
        self._spread = True
        return self.spread(hidden)

    def taken_again(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch fewer hidden"]:
        """Hidden states of the tokens that go on, from what `spread_between` gave; others as they are."""
        if not self._spread:
            return hidden
        self._move(hidden.device)
        self._spread = False
        return _taken(hidden, self._in_model(self._positions))

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _move(self, device: torch.device) -> None:
        """Puts what is known of the tokens where they are, in a model whose layers are on several devices."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))

    def _in_model(self, positions: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """Where the model has what is in these positions."""
        return positions if self._order is None else self._order.gather(1, positions)

    def _check_form(self, reduced: Reduced, context: ReductionContext) -> None:
        given, came, into = context.hidden, reduced.hidden, reduced.into
        if came.shape != given.shape or came.dtype != given.dtype or into.shape != given.shape[:2]:
            raise PolicyError(
                f"{self._label(context)}: must return hidden states as {given.dtype} {tuple(given.shape)} and a number "
                f"for each token, {tuple(given.shape[:2])}; got {came.dtype} {tuple(came.shape)} and "
                f"{tuple(into.shape)}"
            )

    def _go_on(
        self, reduced: Reduced, context: ReductionContext
    ) -> tuple[Bool[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Which tokens go on, and what each becomes part of; counts and checks them in one go."""
        into = reduced.into.to(context.hidden.device)
        stays = into == self._every[:, : into.shape[1]]
        inside = into.clamp(min=0, max=into.shape[1] - 1)
        if self.valid is not None:
            stays = stays & self.valid
        lost = ~(stays | context.is_image)
        astray = (into != -1) & ~(stays.gather(1, inside) & (into == inside))
        if self.valid is not None:
            lost, astray = lost & self.valid, astray & self.valid
        counts = torch.stack([stays, stays & context.is_image, lost, astray]).sum(2)
        self.row_tokens, images, texts, wrong = counts.tolist()
        if any(texts):
            raise PolicyError(f"{self._label(context)}: must let all text go on; it removed a text token")
        if any(wrong):
            raise PolicyError(
                f"{self._label(context)}: a token can only become part of one that stays, or be dropped (-1)"
            )
        self._most_images = max(images) + 1  # one that is the last token counts as text above
        return stays, into

    def _note(self, layer: int, into: Int[Tensor, "batch tokens"]) -> None:
        """Follows each position to the position that it is part of now."""
        inside = into.clamp(min=0, max=into.shape[1] - 1)  # of padding it may be anything
        target = torch.where(into < 0, -1, self._positions.gather(1, inside))
        if self.valid is not None:
            target = torch.where(self.valid, target, self._positions)
        moved = self._every.scatter(1, self._positions, target)
        self._into = torch.where(self._into < 0, -1, moved.gather(1, self._into.clamp(min=0)))
        self.into[layer] = self._into

    def _label(self, context: ReductionContext) -> str:
        where = f"after layer {context.layer}" if context.layer >= 0 else "before the first layer"
        return f"reducer {self.reducer.name}: {where}"


def _taken(tensor: Tensor, positions: Int[Tensor, "batch fewer"]) -> Tensor:
    """Some positions of each row of a tensor `[batch, positions, ...]`."""
    return _at(tensor, _places(positions, tensor.shape[1]))


def _places(positions: Int[Tensor, "batch fewer"], width: int) -> Int[Tensor, "batch fewer"]:
    """Where positions of rows of some width are once rows follow each other."""
    if len(positions) == 1:
        return positions
    return positions + torch.arange(0, len(positions) * width, width, device=positions.device).unsqueeze(1)


def _at(tensor: Tensor, places: Int[Tensor, "batch fewer"]) -> Tensor:
    """What a tensor `[batch, positions, ...]` has in some places, as `_places` numbers them."""
    return tensor.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, *tensor.shape[2:])


def _blank(facts: Int[Tensor, "batch tokens facts"], valid: Bool[Tensor, "batch tokens"] | None) -> Tensor:
    """Facts on tokens, -1 for padding."""
    return facts if valid is None else facts.masked_fill(~valid.unsqueeze(-1), -1)
