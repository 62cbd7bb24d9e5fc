"""Names for the tensors that policies exchange, and the views of one layer that policies read.

Axes: `batch` rows, `layers` decoder layers, `kv_heads` key/value heads, `heads` query heads (a multiple of `kv_heads`),
`tokens` or `slots` stored tokens of a layer, `sets` 1 where all heads of a layer keep the same tokens, else `kv_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvcompress.kernels import attention_mass, attention_probabilities, visible_keys
from kvcompress.parallel import ALONE, HeadGroup
from kvcompress.policies.images import ImageGrid, TokenFacts
from kvcompress.policies.problems import Problems

Queries: TypeAlias = Float[Tensor, "batch heads queries head_dim"]
Keys: TypeAlias = Float[Tensor, "batch kv_heads tokens head_dim"]
Values: TypeAlias = Float[Tensor, "batch kv_heads tokens value_dim"]
Importance: TypeAlias = Float[Tensor, "batch kv_heads tokens"]  # higher = keep
LayerImportance: TypeAlias = Float[Tensor, "layers batch *heads tokens"]  # higher = keep; heads where heads are sized
TokenCounts: TypeAlias = Int[Tensor, "layers batch *heads"]
HeadImportance: TypeAlias = Float[Tensor, "layers batch kv_heads tokens"]  # higher = keep
HeadCounts: TypeAlias = Int[Tensor, "layers batch kv_heads"]
TokenTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # index, kind, grid, cell and size of tokens


@dataclass(frozen=True)
class LayerWeights:
    """What scorers may read of a layer's weights.

    Attributes:
        output: weight of the output projection, `[hidden, heads * value_dim]`; None if the model has none. The columns
            of this process's heads, where several share them. What the layer really does: the sum of the base weight
            and of what a LoRA that is in use adds to it.
        inverse_frequencies: angles per position of the rotary embedding, for the pairs of dimensions
            (i, i + head_dim / 2); None if the model turns none.
        output_unknown: why `output` does not tell what the layer does, for the message of a scorer that reads it; empty
            where it does.
    """

    output: Float[Tensor, "hidden heads_value_dim"] | None = None
    inverse_frequencies: Float[Tensor, " half_dim"] | None = None
    output_unknown: str = ""


@dataclass(frozen=True)
class LayerContext:
    """What a scorer sees: one layer right after its attention, all rows of the batch at once.

    The tokens of this forward are the last slots, in order. A row with fewer of them than others has its padding first
    among them, so that every row ends with its last token. Which slots hold a token says `valid`; what a policy returns
    for the others means nothing, but must be finite. Queries of padding likewise mean nothing: their `lse` is minus
    infinity.

    Attributes:
        layer: index of the decoder layer.
        query: queries of the tokens of this forward, after rotary embedding.
        keys: keys of all slots, those of this forward last and in order.
        values: values of all slots.
        lse: log-sum-exp of each query's scaled logits over the keys that it sees; None if the scorer reads no
            attention.
        scaling: factor on the logits.
        index: number of tokens of the row that came before each slot's token; -1 where there is none.
        seen: number of tokens of each row, this forward included.
        valid: which slots hold a token, in all heads or, where heads hold different numbers of tokens, in each; None if
            all do.
        is_image: which slots hold image tokens; None for a text-only sequence.
        image_queries: numbers of the queries of each row's image tokens, among those of this forward, which the host
            knows for reducers; the last of them again in rows that have fewer. None if nobody counted.
        weights: the layer's own weights, as far as scorers read them.
        heads: which of the layer's heads these are, where several processes share them; a score that depends on a
            head's number or on other heads must ask it.
        softcap: what the model keeps its logits below; None if it lets them be. What a model adds to the logits that
            the softmax runs over (attention sinks) is in `lse` alone.
        heads_part: whether heads of the layer, of any process, hold different tokens, so that a slot is not one token.
        last_seen: number of the last of this forward's tokens that each query sees, where the model lets some see more
            than what came before them, such as the image that they are part of; None if it lets none.
    """

    layer: int
    query: Queries
    keys: Keys
    values: Values
    lse: Float[Tensor, "batch heads queries"] | None
    scaling: float
    index: Int[Tensor, "batch sets tokens"]
    seen: Int[Tensor, " batch"]
    valid: Bool[Tensor, "batch counts tokens"] | None = None
    is_image: Bool[Tensor, "batch sets tokens"] | None = None
    image_queries: Int[Tensor, "batch images"] | None = None
    weights: LayerWeights = LayerWeights()
    heads: HeadGroup = ALONE
    softcap: float | None = None
    heads_part: bool = False
    last_seen: Int[Tensor, "batch queries"] | None = None

    @property
    def row_queries(self) -> Int[Tensor, " batch"]:
        """Tokens of each row in this forward."""
        queries, batch = self.query.shape[2], self.query.shape[0]
        if self.valid is None:
            return torch.full((batch,), queries, dtype=torch.int64, device=self.query.device)
        return self.valid[:, 0, -queries:].sum(-1)

    @property
    def held(self) -> Int[Tensor, "batch sets one"]:
        """Slots that hold a token, those of this forward included; for all heads or, where they differ, for each."""
        batch, tokens = self.keys.shape[0], self.keys.shape[2]
        if self.valid is None:
            return torch.full((batch, 1, 1), tokens, dtype=torch.int64, device=self.keys.device)
        return self.valid.sum(-1, keepdim=True)

    def attention_mass(self, first: Int[Tensor, " batch"] | int = 0, step: int = 1) -> Importance:
        """Attention probability that each slot received in this forward, summed over queries, head mean per group.

        Args:
            first: first query of this forward that counts, one for all rows or one for each.
            step: count every `step`-th query from there on.

        Raises:
            RuntimeError: if the scorer did not declare `reads_attention`.
        """
        rows, start = (first, 0) if isinstance(first, Tensor) else (None, first)
        valid, group = self._valid_tokens, self.query.shape[1] // self.keys.shape[1]
        mass = attention_mass(
            self.query,
            self.keys,
            self._lse(),
            self.scaling,
            valid=valid,
            first=rows,
            stride=step,
            start=start,
            softcap=self.softcap,
            last_seen=self.last_seen,
        )
        return mass if group == 1 else mass.div_(group)

    def attention_probabilities(self, last: int) -> Float[Tensor, "batch heads queries tokens"]:
        """Attention probabilities of the last queries of this forward, float32; for small windows.

        Zero for queries of padding and for slots without a token.

        Args:
            last: number of queries; all of them where the forward has fewer.

        Raises:
            RuntimeError: if the scorer did not declare `reads_attention`.
        """
        return attention_probabilities(
            self.query, self.keys, self._lse(), self.scaling, last, self._valid_tokens, self.softcap, self.last_seen
        )

    def visible(self, last: int) -> Bool[Tensor, "rows queries tokens"]:
        """Which slots the last queries of this forward see, padding aside; one row where all agree.

        Args:
            last: number of queries; all of them where the forward has fewer.
        """
        queries = min(last, self.query.shape[2])
        return visible_keys(queries, self.keys.shape[2], self.last_seen, self.query.device)

    def in_order(self) -> Int[Tensor, "batch sets tokens"] | None:
        """Slots in the order of their tokens, those without a token first; None where they lie so already."""
        if self.query.shape[2] == self.keys.shape[2]:
            return None
        return self.index.argsort(dim=-1, stable=True)

    def at_tokens(
        self, score: Float[Tensor, "batch kv_heads tokens"], otherwise: float = 0.0
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """What is given for slots that hold a token, and something else for all others."""
        return score if self.valid is None else torch.where(self.valid, score, otherwise)

    @property
    def _valid_tokens(self) -> Bool[Tensor, "batch *sets tokens"] | None:
        return self.valid if self.valid is None or self.valid.shape[1] > 1 else self.valid[:, 0]

    def _lse(self) -> Tensor:
        if self.lse is None:
            raise RuntimeError("attention: the scorer must set reads_attention = True to read attention")
        return self.lse


@dataclass(frozen=True)
class AllocationContext:
    """What an allocator may read beyond importance, and where it notes what it found.

    For an allocator of heads, what is said of slots is said of each head's own, `[layers, batch, kv_heads, tokens]`.

    Attributes:
        valid: which slots hold a token; slots beyond a row's tokens are False.
        statistics: tensors by the names in the allocator's `needs`.
        protected: which slots must stay (sinks, recents and what the scorer protects); None if nobody says, the floors
            tell how many.
        notes: figures for the report, written by the allocator (for instance the searched threshold).
        problems: where checks of what is on the device go, to be read together by whoever gives it; None for a call
            that reads its own.
    """

    valid: Bool[Tensor, "layers batch *heads tokens"] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    protected: Bool[Tensor, "layers batch *heads tokens"] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    problems: Problems | None = None


@dataclass(frozen=True)
class SelectionContext:
    """What an evictor sees when it selects the slots that stay, in one layer or in several at once.

    Of several layers, `batch` counts the rows of all, those of one layer after those of the other. Where heads have
    budgets of their own, each head is a row with one set of one head. So an evictor treats every row by itself.

    Attributes:
        budget: slots to keep per row, at least as many as are protected.
        valid: which slots hold a token.
        protected: which slots must stay (sinks, recents and what the scorer protects).
        index: number of tokens of the row that came before each slot's token; -1 where there is none.
        importance: importance of each slot; None without a scorer.
        problems: where the evictor puts checks of what is on the device, which are read for all layers together.
        value_norms: L1 norm of each slot's value after the output projection, mean over each group of heads; None
            unless the evictor declares `reads_value_norms`.
    """

    budget: Int[Tensor, " batch"]
    valid: Bool[Tensor, "batch sets slots"]
    protected: Bool[Tensor, "batch sets slots"]
    index: Int[Tensor, "batch sets slots"]
    importance: Float[Tensor, "batch kv_heads slots"] | None
    problems: Problems = field(default_factory=Problems)
    value_norms: Float[Tensor, "batch kv_heads slots"] | None = None


@dataclass(frozen=True)
class MergeContext:
    """What a merger sees of a layer after selection, before the evicted slots are given back.

    Layers that keep as many slots are shown together, short ones: `batch` then counts the rows of all, those of one
    layer after those of the other. So a merger treats every row by itself.

    Attributes:
        layers: index of the decoder layer, or of each of them.
        keys: keys of all slots.
        values: values of all slots.
        kept: slots that stay.
        evicted: slots that go; a slot that is neither kept nor evicted is empty.
        index: number of tokens of the row that came before each slot's token, -1 where the slot is empty; padding
            does not count, so that a row merges as it would alone.
        importance: importance of each slot, NaN where it has no score; None without a scorer.
        is_image: which slots hold image tokens; None for text-only sequences.
        most_kept: at least the number of slots that stay in any row and head, known without asking the device.
        most_evicted: at least the number of slots that go, likewise.
        decoding: whether this is what decode steps free (a slot a row, more after a draft was checked), not what a
            scoring forward dropped.
        state: what the merger returned as its state for these rows last time; None at first. Its first axis is batch.
        first_head: number of the first of these heads in the layer; not 0 where several processes share its heads.
    """

    layers: tuple[int, ...]
    keys: Float[Tensor, "batch kv_heads slots head_dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    kept: Bool[Tensor, "batch kv_heads slots"]
    evicted: Bool[Tensor, "batch kv_heads slots"]
    index: Int[Tensor, "batch kv_heads slots"]
    importance: Float[Tensor, "batch kv_heads slots"] | None
    is_image: Bool[Tensor, "batch kv_heads slots"] | None
    most_kept: int
    most_evicted: int
    decoding: bool = False
    state: Tensor | None = None
    first_head: int = 0


@dataclass(frozen=True)
class Merged:
    """What a merger returns.

    Attributes:
        keys: keys of all slots, like `MergeContext.keys`; those of slots that are not kept mean nothing.
        values: values of all slots, likewise.
        state: what the merger wants to see of each row next time, its first axis batch; None if nothing.
    """

    keys: Float[Tensor, "batch kv_heads slots head_dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    state: Tensor | None = None


@dataclass(frozen=True)
class Codes:
    """Quantized keys or values: `code * scale - shift` gives them back, as they were or as a quantizer turned them.

    Attributes:
        data: codes of every slot, packed into bytes or in a narrow dtype; its last axis holds a slot's dimensions.
        scale: step between neighbouring codes, a row per slot or per group of slots, whose last axis divides the slot's
            dimensions evenly.
        shift: what is subtracted; None if zero is code 0. Shaped like `scale`.
        dim: dimensions of a slot.
    """

    data: Shaped[Tensor, "batch kv_heads slots width"]
    scale: Float[Tensor, "batch kv_heads scale_rows parts"]
    shift: Float[Tensor, "batch kv_heads scale_rows parts"] | None
    dim: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.data, self.scale, self.shift) if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same change to every tensor."""
        return replace(
            self,
            data=change(self.data),
            scale=change(self.scale),
            shift=None if self.shift is None else change(self.shift),
        )


@dataclass(frozen=True)
class DecodeContext:
    """What an evictor sees at a decode step when layers may be a slot over their budget.

    All layers are shown at once: `batch` counts the rows of every layer, those of one after those of the other. Where
    heads have budgets of their own, each head is a row with one set of one head. So an evictor treats every row by
    itself.

    Attributes:
        index: number of tokens of the row that came before each slot's token, -1 where the slot is empty.
        protected: which slots must stay (sinks, recents and what the scorer protects).
        importance: importance of each slot, NaN where it has none yet; None without a scorer.
    """

    index: Int[Tensor, "batch sets slots"]
    protected: Bool[Tensor, "batch sets slots"]
    importance: Float[Tensor, "batch kv_heads slots"] | None


@dataclass(frozen=True)
class TowerView:
    """What the vision tower's own attention says of image tokens; zero for all others.

    Attributes:
        attention: attention that each one's feature receives, mean over heads: from the class token, or where the tower
            has none, on average from all features of its image or tile. Zero for tokens that no feature stands for (the
            ends of LLaVA-NeXT's lines).
        keys: mean over heads of the keys of their features, likewise.
    """

    attention: Float[Tensor, "batch tokens"]
    keys: Float[Tensor, "batch tokens key_dim"]

    def aligned(self, positions: Int[Tensor, "batch positions"]) -> TowerView:
        """The same of positions in another order; for each new one, the one whose token it gets."""
        positions = positions.to(self.attention.device).long()
        pairs = positions.unsqueeze(-1).expand(-1, -1, self.keys.shape[2])
        return TowerView(self.attention.gather(1, positions), self.keys.gather(1, pairs))


@dataclass(frozen=True)
class ReductionContext:
    """What a reducer sees between two decoder layers: the tokens of this forward that have come so far, row by row.

    All rows are shown at once. Rows that have fewer tokens than others have their padding first.

    Attributes:
        stage: number of the reduction, from 0.
        layer: index of the decoder layer that has just run; -1 before the first.
        hidden: hidden states that this layer gave, or that go into the first.
        index: number of tokens of the row that came before each token; -1 for padding.
        is_image: which of them are image tokens; never the last, from whose state the next token is read.
        grids: grids of each row's images.
        grid: number of each token's grid in its row; -1 for text, padding, and image tokens of no grid.
        cell: row and column that each token has had in its grid from the start; meaningless where there is no grid.
        size: height and width of that grid; meaningless where there is no grid.
        image_tokens: image tokens of each row in this forward before the first reduction; known on the host.
        guidance: what the reducer's `guidance` gave for them at this layer; None without one, and before the first.
        tower: what the vision tower says of them, before the first layer; None unless the reducer reads it.
        known: what the host knows of them already, and the tensors that say the same here; None if it has to ask.
    """

    stage: int
    layer: int
    hidden: Float[Tensor, "batch tokens hidden"]
    index: Int[Tensor, "batch tokens"]
    is_image: Bool[Tensor, "batch tokens"]
    grids: list[list[ImageGrid]]
    grid: Int[Tensor, "batch tokens"]
    cell: Int[Tensor, "batch tokens two"]
    size: Int[Tensor, "batch tokens two"]
    image_tokens: list[int]
    guidance: Float[Tensor, "batch tokens"] | None = None
    tower: TowerView | None = None
    known: tuple[TokenFacts[np.ndarray], TokenTensors] | None = None

    @property
    def on_host(self) -> TokenFacts[np.ndarray]:
        """Index, kind, grid, cell and size of the tokens as numpy arrays: what follows from them alone is found there.

        A short prompt costs a GPU what the host asks it for, operation by operation, and index work is many small ones.
        """
        said = (self.index, self.is_image, self.grid, self.cell, self.size)
        if self.known is not None and all(one is other for one, other in zip(said, self.known[1], strict=True)):
            return self.known[0]
        facts = torch.stack([self.index, self.is_image, self.grid], -1)  # or other ones than the cache gave
        return TokenFacts(torch.cat([facts, self.cell, self.size], -1).cpu().numpy())


@dataclass(frozen=True)
class Reduced:
    """What a reducer returns for the tokens it saw.

    Attributes:
        into: number of the token of the same row that each one is part of from now on: its own where it stays, -1 where
            it is dropped. Of padding it means nothing.
        hidden: hidden states like `ReductionContext.hidden`; those of tokens that do not stay mean nothing.
    """

    into: Int[Tensor, "batch tokens"]
    hidden: Float[Tensor, "batch tokens hidden"]
