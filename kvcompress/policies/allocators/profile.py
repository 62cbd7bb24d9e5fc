"""Sizes of layers, or of heads, that were estimated offline, read and interpolated."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.errors import ConfigError, PolicyError, shown
from kvcompress.kernels import sent
from kvcompress.policies.allocators.apportionment import apportion
from kvcompress.policies.allocators.heads import as_heads, as_layers
from kvcompress.policies.allocators.interpolation import interpolate
from kvcompress.policies.allocators.profile_file import fields_in
from kvcompress.policies.base import Allocator
from kvcompress.policies.context import AllocationContext, LayerImportance, TokenCounts
from kvcompress.policies.fingerprint import Fingerprint
from kvcompress.policies.registry import ALLOCATORS

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


@ALLOCATORS.register("profile")
class Profile(Allocator):
    """Layer sizes from a retention per layer that was estimated offline, for one budget or for several.

    Source: PrefixKV (arXiv 2412.03409, section 3) estimates layer sizes on a few samples and uses them for all.

    A single `retention` is rescaled to the budget. Where the total is what it asks for itself, the sum of retention x
    tokens rounded to the nearest (a half up), every layer gets exactly that. Several `retentions` each stand for the
    budget that is their mean over the layers; a row whose total is another share of its slots gets what lies between
    the next two, and beyond the last ones towards all 0 at budget 0 and all 1 at budget 1. With several `heads`, all of
    this is said of the key/value heads of every layer.

    *Deviates:* the paper's configuration files hold the share evicted; a profile holds the share kept.

    Args:
        retention: share of its tokens that each layer keeps, first layer first, from 0 to 1.
        retentions: such a list for each of several budgets, in any order; instead of `retention`.
        heads: key/value heads of a layer that the lists tell apart: 1 for lists with a share for each layer; else they
            hold one for each head, those of the first layer first.
        model: the model that they were estimated for, if known; a cache for another model is refused.
        path: short for the other fields in a .json, .yaml or .yml file, which is read when the policy is made: a list;
            a mapping with the key "retention", whose other keys are for the reader; or what `kvcompress calibrate`
            wrote.
    """

    reads_importance: ClassVar[bool] = False

    retention: list[_Share] | None = Field(default=None, min_length=1)
    retentions: list[Annotated[list[_Share], Field(min_length=1)]] | None = Field(default=None, min_length=1)
    heads: int = Field(default=1, ge=1)
    model: Fingerprint | None = None

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        """Whether its lists tell heads apart."""
        return self.heads > 1

    @property
    def made_for(self) -> tuple[int, int]:
        """Layers and heads of its lists."""
        first = (self.retentions or [self.retention or []])[0]
        return len(first) // self.heads, self.heads

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("path") is None:
            return fields
        fields = dict(fields)
        path = fields.pop("path")
        if not isinstance(path, (str, PathLike)):
            raise ConfigError(f"path: must be the path of a profile; got {shown(path)}")
        if given := {"retention", "retentions"} & set(fields):
            raise ConfigError(f"{given.pop()} and path={shown(str(path))} were both given; give one")
        return {**fields, **fields_in(Path(path))}

    @model_validator(mode="after")
    def _one_kind(self) -> Profile:
        if (self.retention is None) == (self.retentions is None):
            came = "none" if self.retention is None else "both"
            raise ConfigError(f"profile: give exactly one of retention, retentions and path; got {came}")
        lengths = [len(one) for one in self.retentions or []]
        if len(set(lengths)) > 1:
            raise ConfigError(f"retentions: each list needs one share per layer; got lists of {lengths}")
        for name, lists in (("retention", [self.retention]), ("retentions", self.retentions)):
            if lists and lists[0] is not None and len(lists[0]) % self.heads:
                raise ConfigError(
                    f"{name}: {len(lists[0])} shares are not {self.heads} heads for each of some layers; give a share "
                    "for every head of every layer, or heads=1"
                )
        return self

    def retention_at(self, budget: Float[Tensor, " batch"]) -> Float[Tensor, "layers batch"]:
        """Retention per layer, or per head, for the budget of each row, a fraction from 0 to 1; float64."""
        if self.retentions is None:
            assert self.retention is not None
            one = sent(self.retention, budget.device, torch.float64)
            return one.unsqueeze(1).expand(-1, len(budget))
        return interpolate(self.retentions, budget)

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Apportions the total by retention x capacity, or gives just that where it is what adds up to the total."""
        layers = len(floor)
        if self.by_head:
            floor, capacity = as_layers(floor), as_layers(capacity)
        share = self.retention_at(total.double() / capacity.sum(0).clamp(min=1))
        if len(share) != len(floor):
            known = f"{len(share) // self.heads} layers" + (f" of {self.heads} heads" if self.by_head else "")
            model = f"{layers}" + (f" of {len(floor) // max(1, layers)}" if self.by_head else "")
            raise PolicyError(
                f"allocator {self.name}: the profile has {known}, the model has {model}; use a profile that was made "
                "for this model"
            )
        implied = torch.maximum((share * capacity + 0.5).floor().long(), floor)
        budget = torch.where(implied.sum(0) == total, implied, apportion(share * capacity, total, floor, capacity))
        return as_heads(budget, layers) if self.by_head else budget
