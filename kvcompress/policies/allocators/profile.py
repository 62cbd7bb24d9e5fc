"""Layer sizes that were estimated offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import yaml
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from kvcompress.errors import ConfigError, PolicyError
from kvcompress.policies.allocators.apportionment import apportion
from kvcompress.registry import ALLOCATORS
from kvcompress.shapes import AllocationContext, LayerImportance, TokenCounts
from kvcompress.stages import Allocator


@ALLOCATORS.register("profile")
class Profile(Allocator):
    """Layer sizes in proportion to a retention per layer that was estimated offline.

    Source: PrefixKV (arXiv 2412.03409, section 3) estimates layer sizes on a few samples and uses them for all.

    The profile is rescaled to the budget. Where the total is what the profile itself asks for, the sum of
    retention x tokens rounded to the nearest (a half up), every layer gets exactly that.

    *Deviates:* the paper's configuration files hold the share evicted; a profile holds the share kept.

    Args:
        retention: share of its tokens that each layer keeps, first layer first, from 0 to 1.
        path: short for the retention in a .json, .yaml or .yml file, which is read when the policy is made: a list, or
            a mapping with the key "retention", whose other keys are for the reader.
    """

    reads_importance: ClassVar[bool] = False

    retention: list[Annotated[float, Field(ge=0.0, le=1.0)]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("path") is None:
            return fields
        fields = dict(fields)
        path = fields.pop("path")
        if "retention" in fields:
            raise ConfigError(f"retention and path={str(path)!r} were both given; give one")
        return {**fields, "retention": _retention_in(Path(path))}

    def allocate(
        self,
        importance: LayerImportance,
        total: Int[Tensor, " batch"],
        floor: TokenCounts,
        capacity: TokenCounts,
        context: AllocationContext | None = None,
    ) -> TokenCounts:
        """Apportions the total by retention x capacity, or gives just that where it is what adds up to the total."""
        if len(self.retention) != len(floor):
            raise PolicyError(
                f"allocator {self.name}: the profile has {len(self.retention)} layers, the model has {len(floor)}; use "
                "a profile that was made for this model"
            )
        share = torch.tensor(self.retention, dtype=torch.float64, device=capacity.device).unsqueeze(1)
        implied = torch.maximum((share * capacity + 0.5).floor().long(), floor)
        return torch.where(implied.sum(0) == total, implied, apportion(share * capacity, total, floor, capacity))


def _retention_in(path: Path) -> Any:
    """What a file says of retention; the field's own checks follow."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"path: a profile is a .json, .yaml or .yml file; got '{path}'")
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"path: the profile {path} cannot be read: {error}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"path: the profile {path} is not valid {path.suffix[1:].upper()}: {reason}") from None
    if isinstance(held, dict):
        held = held.get("retention")
    if not isinstance(held, list):
        raise ConfigError(f"path: the profile {path} must hold a list, or a mapping with the list 'retention'")
    return held
