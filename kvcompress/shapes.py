"""Names for the tensors that policies exchange, and the views of one layer that policies read.

Axes: `batch` rows, `layers` decoder layers, `kv_heads` key/value heads, `heads` query heads (a multiple of `kv_heads`),
`tokens` or `slots` stored tokens of a layer, `sets` 1 where all heads of a layer keep the same tokens, else `kv_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvcompress.kernels import attention_mass

Queries: TypeAlias = Float[Tensor, "batch heads queries head_dim"]
Keys: TypeAlias = Float[Tensor, "batch kv_heads tokens head_dim"]
Values: TypeAlias = Float[Tensor, "batch kv_heads tokens value_dim"]
Importance: TypeAlias = Float[Tensor, "batch kv_heads tokens"]  # higher = keep
LayerImportance: TypeAlias = Float[Tensor, "layers batch tokens"]  # higher = keep
TokenCounts: TypeAlias = Int[Tensor, "layers batch"]
Columns: TypeAlias = Int[Tensor, "batch sets slots"]  # -1 marks an empty slot


@dataclass(frozen=True)
class LayerContext:
    """What a scorer sees: one layer right after its attention, without padding.

    Rows that differ in length are shown one at a time, so every row here has the same tokens and none is padding.

    Attributes:
        layer: index of the decoder layer.
        query: queries of the tokens of this forward, after rotary embedding.
        keys: keys of all slots, those of this forward last and in order.
        values: values of all slots.
        lse: log-sum-exp of each query's scaled logits over `keys`; None if the scorer reads no attention.
        scaling: factor on the logits.
        index: number of tokens of the row that came before each slot's token.
        seen: number of tokens of the row, this forward included.
        is_image: which slots hold image tokens; None for a text-only sequence.
    """

    layer: int
    query: Queries
    keys: Keys
    values: Values
    lse: Float[Tensor, "batch heads queries"] | None
    scaling: float
    index: Int[Tensor, "batch sets tokens"]
    seen: int
    is_image: Bool[Tensor, "batch sets tokens"] | None = None

    def attention_mass(self, start: int = 0, step: int = 1) -> Importance:
        """Attention probability that each slot received in this forward, summed over queries, head mean per group.

        Args:
            start: first query of this forward that counts.
            step: count every `step`-th query from there on.

        Raises:
            RuntimeError: if the scorer did not declare `reads_attention`.
        """
        if self.lse is None:
            raise RuntimeError("attention_mass: the scorer must set reads_attention = True to read attention")
        return attention_mass(self.query, self.keys, self.lse, self.scaling, start, step)


@dataclass(frozen=True)
class AllocationContext:
    """What an allocator may read beyond importance, and where it notes what it found.

    Attributes:
        valid: which slots hold a token; slots beyond a row's tokens are False.
        is_image: which slots hold image tokens; None for text-only sequences.
        statistics: tensors by the names in the allocator's `needs`.
        notes: figures for the report, written by the allocator (for instance the searched threshold).
    """

    valid: Bool[Tensor, "layers batch tokens"] | None = None
    is_image: Bool[Tensor, "layers batch tokens"] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectionContext:
    """What an evictor sees when it selects the slots of one layer that stay.

    Attributes:
        budget: slots to keep per row, at least as many as are protected.
        valid: which slots hold a token.
        protected: which slots must stay (sinks, recents and what the scorer protects).
        columns: column of each slot's token.
        importance: score of each slot; None without a scorer.
    """

    budget: Int[Tensor, " batch"]
    valid: Bool[Tensor, "batch sets slots"]
    protected: Bool[Tensor, "batch sets slots"]
    columns: Columns
    importance: Float[Tensor, "batch kv_heads slots"] | None


@dataclass(frozen=True)
class DecodeContext:
    """What an evictor sees at a decode step when a layer is a slot over its budget.

    Attributes:
        columns: column of each slot's token, -1 where the slot is empty.
        protected: which slots must stay (sinks, recents and what the scorer protects).
        importance: score of each slot, NaN where it has none yet; None without a scorer.
    """

    columns: Columns
    protected: Bool[Tensor, "batch sets slots"]
    importance: Float[Tensor, "batch kv_heads slots"] | None
