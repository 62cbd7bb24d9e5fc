"""The contracts of the six kinds of policy, in the order in which data meets them.

A policy is a frozen pydantic model: its fields are its hyperparameters, its method does the work, and whatever changes
while a model runs lives in the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kvcompress.policies.checks import checked_allocation
from kvcompress.policies.configured import Configured
from kvcompress.policies.context import (
    AllocationContext,
    Codes,
    DecodeContext,
    Importance,
    Keys,
    LayerContext,
    LayerImportance,
    MergeContext,
    Merged,
    Reduced,
    ReductionContext,
    SelectionContext,
    TokenCounts,
    Values,
)

OverForwards = Literal["last", "sum", "highest"]


class Policy(Configured, ABC):
    """What all policies share: a name once registered, and hyperparameters as fields."""

    stage: ClassVar[str]
    name: ClassVar[str] = ""

    @property
    def reads_modality(self) -> bool:
        """Whether it treats image tokens otherwise than text, so that the ids of a prompt must be known."""
        return False


class Scorer(Policy):
    """Gives every slot of a layer an importance, higher = keep.

    Class attributes:
        mass: whether scores are non-negative and add up over tokens, so that a share of their sum means something.
        reads_attention: whether `LayerContext.attention_mass` is called; costs nothing where it is False.
        reconstructs: whether it is made for `CompressedCache.score_by_reconstruction`.
        one_axis: whether it takes a token's rotary position to be the number of tokens before it, so that models with
            several positions a token (M-RoPE) are refused.
        independent: whether the score of a token follows from that token alone, so that it stays right when later
            tokens are taken back.
    """

    stage = "scorer"
    mass: ClassVar[bool] = False
    reconstructs: ClassVar[bool] = False
    one_axis: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    @property
    def over_forwards(self) -> OverForwards:
        """What counts of the scores that one forward after the other gives a slot."""
        return "last"

    @property
    def protects(self) -> int:
        """Number of last tokens that this method always keeps, beyond the budget's own recents."""
        return 0

    @abstractmethod
    def score(self, layer: LayerContext) -> Importance:
        """Scores every slot by what this forward shows.

        Args:
            layer: the layer right after its attention.

        Returns:
            One score per key/value head and slot, `[batch, kv_heads, tokens]`, floating point, finite; where a slot
            holds no token it means nothing. A row scores as it would alone.
        """

    def score_part(self, layer: LayerContext, part: slice) -> Importance:
        """Scores some slots alone; what `score_by_reconstruction` asks of a scorer that is made for it.

        Args:
            layer: the layer right after its attention to what repeats a part of the prompt, as if it held nothing but
                the first four tokens, the part, and the repetition.
            part: the slots of that part.

        Returns:
            What `score` says of them, `[batch, kv_heads, slots of the part]`.
        """
        return self.score(layer)[..., part]

    def importance(self, score: Importance, queries: Int[Tensor, "batch sets tokens"]) -> Importance:
        """Turns scores into the importance that allocators and evictors rank.

        Args:
            score: what `score` returned, in the last forward or over all of them, as `over_forwards` says.
            queries: number of queries that saw each slot's token, its own included, in the forwards that scored it (the
                last one alone where `over_forwards` is "last"); at least 1.

        Returns:
            Importance of the same shape; by default the scores themselves.
        """
        return score


class Allocator(Policy):
    """Splits the total budget of every row over the layers, or over the heads of all layers.

    Class attributes:
        reads_importance: whether `allocate` looks at importance at all; if not, layers are compressed while later
            ones have yet to run, and the full cache of a long prompt never exists at once.
        reads_mass: whether it treats importance as mass (shares of a sum), which not every scorer gives.
        needs: names of the statistics (see `kvcompress.policies.statistics`) that it reads from the context.
        by_head: whether it sizes every key/value head of every layer, rather than layers. Then a slot is that of one
            head, `[layers, batch]` is `[layers, batch, kv_heads]` in all that `allocate` takes and gives, importance is
            `[layers, batch, kv_heads, tokens]`, and the total is that of all layers and heads. Asked in the shapes of
            layers, it answers for layers of one head each.
    """

    stage = "allocator"
    by_head: ClassVar[bool] = False
    reads_importance: ClassVar[bool] = True
    reads_mass: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Layers, and heads of each, that its fields speak of: a cache for a model with others is refused.

        Heads are 1 where fields have one number for a layer; None where they have none for single layers.
        """
        return None

    @property
    def reads_modality(self) -> bool:
        """Those that read the attention of what follows an image do."""
        return "attention_sparsity" in self.needs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wraps the subclass's `allocate` in the checks of the contract."""
        super().__init_subclass__(**kwargs)
        if "allocate" in cls.__dict__ and not getattr(cls.__dict__["allocate"], "__isabstractmethod__", False):
            cls.allocate = checked_allocation(cls.__dict__["allocate"])  # type: ignore[method-assign]

    @abstractmethod
    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Gives every layer of every row its number of slots.

        The input is checked before and the answer after, whoever calls; `total` arrives clamped to what floors and
        capacities allow.

        Args:
            importance: head-mean importance of each slot, higher = keep.
            total: slots per row over all layers.
            floor: slots per layer and row that must be kept (protected tokens).
            capacity: slots per layer and row that there are.
            context: validity, modality and the statistics in `needs`; also takes notes for the report.

        Returns:
            int64 `[layers, batch]` with `floor <= budget <= capacity` whose sum over layers is `total`; over layers and
            heads where it sizes heads.

        Raises:
            PolicyError: if an input is NaN, negative (for allocators of mass) or misshapen, or the answer breaks the
                contract; the message names the layer.
        """


class Evictor(Policy):
    """Selects the slots of a layer that stay, after a scoring forward and at each decode step.

    Class attributes:
        reads_importance: whether it ranks by importance, which needs a scorer.
        reads_mass: whether it treats importance as mass, which not every scorer gives.
        reads_value_norms: whether `SelectionContext.value_norms` is given; costs nothing where it is False.
    """

    stage = "evictor"
    reads_importance: ClassVar[bool] = True
    reads_mass: ClassVar[bool] = False
    reads_value_norms: ClassVar[bool] = False

    @abstractmethod
    def select(self, layer: SelectionContext) -> Bool[Tensor, "batch sets slots"]:
        """Marks the slots to keep: `budget` of each row and set, the protected among them, never an empty one."""

    @property
    def frees(self) -> Literal["oldest", "chosen", "nothing"]:
        """What a decode step frees in a layer over its budget.

        "oldest": the oldest token that is not pinned, which the host knows without asking the device; "chosen": what
        `victim` names; "nothing": the layer grows.
        """
        return "oldest"

    @property
    def by_head(self) -> bool:
        """Whether heads of a layer may hold different tokens while decoding."""
        return False

    @property
    def reach(self) -> int | None:
        """Most recents that decode steps can protect; None if any number."""
        return None

    @property
    def cuts_every(self) -> int | None:
        """Tokens that are generated before every layer is scored and cut to its budget anew; None if never.

        Only for evictors that free "nothing" in between: their layers hold up to so many tokens more than their budget.
        """
        return None

    def looks_back(self, scorer: Scorer | None) -> int:
        """Number of last queries that score then, from 1 to `cuts_every`, by what the scorer protects."""
        return self.cuts_every or 0

    def pinned(self, kept: Int[Tensor, " batch"], sinks: Int[Tensor, " batch"], recents: int) -> Int[Tensor, " batch"]:
        """Number of slots of each row, in the order of their tokens, that never leave by age; the sinks never do.

        Args:
            kept: slots that the layer keeps after a scoring forward.
            sinks: number of first tokens that are protected.
            recents: number of last tokens that are protected.
        """
        return sinks

    def victim(self, layer: DecodeContext) -> Int[Tensor, "batch sets"]:
        """Names the slot that is freed after a decode step, for evictors that free what is "chosen"."""
        raise NotImplementedError(f"evictor {self.name}: needs victim() for its decode rule")


class Merger(Policy):
    """Folds the tokens that are evicted into those that stay, before their slots are given back.

    Class attributes:
        reads_mass: whether it treats importance as mass, which needs a scorer that gives it.
    """

    stage = "merger"
    reads_mass: ClassVar[bool] = False

    @property
    def merges_decoding(self) -> bool:
        """Whether slots that decode steps free are merged too, which reads the whole layer once more per step."""
        return False

    @abstractmethod
    def merge(self, layer: MergeContext) -> Merged:
        """Gives every kept slot what it takes up of the evicted ones.

        Args:
            layer: all slots with what was selected. Rows, heads and empty slots are independent of each other.

        Returns:
            Keys and values in the shapes and dtypes they came in, accumulated in float32, and the merger's state.
            A kept slot that takes up nothing is bit for bit what it was.
        """


class Quantizer(Policy):
    """Stores keys and values in fewer bits, all but the most recent ones, a whole group of tokens at a time.

    What is quantized is never touched again: later groups are appended, and eviction copies codes as they are. Where
    heads hold different numbers of tokens, their groups come as those of one row with one head, one after the other.
    `decode` becomes a part of compiled decode steps, so it asks the device nothing.

    Class attributes:
        code_dtype: dtype (`torch.uint8` or `torch.float8_e4m3fn`) in which `kvcompress.kernels.codes` reads the bytes
            of `Codes.data`, of keys and values alike, if codes are in the layout described there and `decode` means
            what `kvcompress.kernels.codes.decoded` does: then a kernel decodes them on a GPU, while it attends. None
            where only `decode` can read them.

    Args:
        group: tokens that are quantized together.
        residual: most recent tokens that stay in full precision; decode steps evict among them alone.
    """

    stage = "quantizer"
    code_dtype: ClassVar[torch.dtype | None] = None

    group: int = Field(default=64, ge=1)
    residual: int = Field(default=64, ge=0)

    @abstractmethod
    def encode_keys(self, keys: Keys) -> Codes:
        """Quantizes keys, whose number of tokens is a multiple of `group`."""

    @abstractmethod
    def encode_values(self, values: Values) -> Codes:
        """Quantizes values, whose number of tokens is a multiple of `group`."""

    @abstractmethod
    def decode(self, codes: Codes) -> Keys:
        """Gives keys or values back, in the dtype of `codes.scale`.

        Args:
            codes: codes with as many rows of scales as slots, or one for every `group` slots.
        """


class Reducer(Policy):
    """Lets fewer image tokens go on from one decoder layer to the next, in the forward that brings the image.

    It may act before the first layer too, on what goes into the decoder. A layer that has run keeps the keys and values
    of all tokens it saw; the layers after it see, and store, fewer. Text always goes on as it is, and so does the last
    token of a row, which counts as text here even if it ends an image. All rows are reduced at once, each as it would
    be alone.

    Class attributes:
        reads_attention: whether `guidance` is called at the layers after which it acts.
        reads_tower: whether `ReductionContext.tower` is given before the first layer; models whose vision tower cannot
            be read are refused then.

    Args:
        positions: "original", each token keeps its rotary position; "contiguous", the tokens of a layer are numbered
            anew, without gaps, and later forwards go on from the length of the whole sequence in every layer;
            "per_layer", the same, and later forwards go on from the number of tokens that each layer got.
    """

    stage = "reducer"
    reads_attention: ClassVar[bool] = False
    reads_tower: ClassVar[bool] = False

    positions: Literal["original", "contiguous", "per_layer"] = "original"

    @property
    def reads_modality(self) -> bool:
        """Every reducer does."""
        return True

    @abstractmethod
    def acts_after(self, layers: int) -> tuple[int, ...]:
        """How many layers have run when it acts, once for each reduction, ascending; 0 before the first.

        Args:
            layers: number of decoder layers.

        Raises:
            ConfigError: if it cannot act in a decoder of so many layers.
        """

    def guidance(self, layer: LayerContext) -> Float[Tensor, "batch tokens"] | None:
        """Weighs the tokens of this forward by what the layer attends to; for reducers that read attention.

        Args:
            layer: the layer right after its attention. Its last slots are the tokens of this forward; `lse` is None.

        Returns:
            A sum or a mean over heads, which is averaged over the processes where several share them.
        """
        return None

    @abstractmethod
    def reduce(self, layer: ReductionContext) -> Reduced:
        """Decides which image tokens of each row go on, and what becomes of the others."""


__all__ = [
    "Allocator",
    "Evictor",
    "Merger",
    "Policy",
    "Quantizer",
    "Reducer",
    "Scorer",
]
