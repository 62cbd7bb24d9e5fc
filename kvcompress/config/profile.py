"""Retention per layer, estimated offline for one model and several budgets: what `kvcompress calibrate` writes."""

from __future__ import annotations

import json
import re
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from kvcompress.config.compression import CompressionConfig
from kvcompress.errors import ConfigError, shown
from kvcompress.files import path_of, read_structure, write_text
from kvcompress.policies.allocators import Profile
from kvcompress.policies.base import Allocator
from kvcompress.policies.configured import Configured
from kvcompress.policies.fingerprint import Fingerprint, fingerprint_of

_FORMATS = (".json", ".yaml", ".yml")
_Budget = Annotated[float, Field(gt=0.0, le=1.0)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Spread = Annotated[float, Field(ge=0.0)]


class LayerProfile(Configured):
    """Retention per layer for several budgets, with what it was estimated on.

    Source: PrefixKV (arXiv 2412.03409, section 3) estimates layer sizes offline on a few samples.

    Args:
        budgets: fractions of the tokens seen, ascending.
        retention: for each budget, the share that each layer keeps, first layer first: the mean over the samples.
        heads: key/value heads of a layer that the lists tell apart: 1 for a share for each layer; else one for each
            head, those of the first layer first.
        spread: for each budget and layer, the standard deviation over the samples; 0 for one sample; empty if unknown.
        samples: number of samples; 0 if unknown.
        model: the model's fingerprint; None if unknown, and then only the number of layers is checked.
        config: the policies it was estimated with; their budget is not used. None if unknown.
        data: what the samples were taken from.
        data_hash: SHA-256 of the samples.
        version: of kvcompress.

    Raises:
        ConfigError: if the lists do not fit together.

    Example:
        >>> profile = LayerProfile(budgets=[0.5], retention=[[0.7, 0.3]])
        >>> print(*(round(share, 3) for share in profile.at(0.25)))
        0.35 0.15
        >>> CompressionConfig.preset("prefixkv", allocator=profile.allocator()).allocator.name
        'profile'
    """

    budgets: list[_Budget] = Field(min_length=1)
    retention: list[Annotated[list[_Share], Field(min_length=1)]] = Field(min_length=1)
    heads: int = Field(default=1, ge=1)
    spread: list[list[_Spread]] = Field(default_factory=list)
    samples: int = Field(default=0, ge=0)
    model: Fingerprint | None = None
    config: CompressionConfig | None = None
    data: str = ""
    data_hash: str = ""
    version: str = ""

    @model_validator(mode="after")
    def _fit_together(self) -> LayerProfile:
        if any(low >= high for low, high in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ConfigError(f"budgets: must ascend; got {self.budgets}")
        units = len(self.retention[0])
        if units % self.heads:
            raise ConfigError(f"retention: {units} shares are not {self.heads} heads for each of some layers")
        shape, each = [units] * len(self.budgets), "layers" if self.heads == 1 else "heads"
        for name in ("retention", "spread"):
            lists = getattr(self, name)
            if (lists or name == "retention") and [len(one) for one in lists] != shape:
                raise ConfigError(
                    f"{name}: needs a list of {units} {each} for each of the {len(self.budgets)} budgets; got "
                    f"lists of {[len(one) for one in lists]}"
                )
        if self.model is not None and self.model.layers != self.layers:
            raise ConfigError(f"retention: the model has {self.model.layers} layers; got lists of {self.layers}")
        return self

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.retention[0]) // self.heads

    @property
    def layer_retention(self) -> list[list[float]]:
        """For each budget, the share that each layer keeps; the mean over its heads."""
        shares = torch.tensor(self.retention, dtype=torch.float64).view(len(self.budgets), -1, self.heads)
        return shares.mean(2).tolist()

    def allocator(self) -> Profile:
        """The allocator that gives layers these sizes at any budget, without reading a score."""
        return Profile(retentions=self.retention, heads=self.heads, model=self.model)

    def at(self, budget: float) -> list[float]:
        """Retention per layer, or per head, for a budget, whose mean over all of them is the budget.

        Interpolated linearly between the calibrated budgets, each taken as the mean of what its layers keep (which
        differs a little from the budget asked for, since tokens are whole); below the lowest towards all 0 at budget
        0, above the highest towards all 1 at budget 1.

        Raises:
            ConfigError: if the budget is not a fraction.
        """
        if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 <= budget <= 1:
            raise ConfigError(f"budget: must be a fraction from 0 to 1; got {shown(budget)}")
        shares: list[float] = self.allocator().retention_at(torch.tensor([budget], dtype=torch.float64))[:, 0].tolist()
        return shares

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerProfile:
        """Reads a .json, .yaml or .yml file.

        Raises:
            ConfigError: if the file cannot be read or parsed, or does not hold a profile.
        """
        path = _format_of(path)
        fields = read_structure(path, "profile")
        if not isinstance(fields, dict) or "budgets" not in fields:
            raise ConfigError(
                f"profile {path}: must hold a mapping with budgets and retention, as 'kvcompress calibrate' writes it; "
                "a bare list of shares kept goes into allocator={'name': 'profile', 'path': ...}, a folder of PrefixKV "
                "through 'kvcompress calibrate --from-prefixkv'"
            )
        try:
            return cls(**fields)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"profile {path}: {error}") from None

    def dump(self, path: str | PathLike[str]) -> None:
        """Writes the exact inverse of `load`, whole or not at all.

        Raises:
            ConfigError: if it cannot be written; a file that was there is then what it was.
        """
        path, fields = _format_of(path), self.model_dump(mode="json")
        text = json.dumps(fields) + "\n" if path.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
        write_text(path, text, "profile")

    @classmethod
    def from_prefixkv(cls, folder: str | PathLike[str]) -> LayerProfile:
        """Reads the configurations that PrefixKV publishes: a JSON file for each ratio.

        A file's name ends in its ratio (`prefixkv_llava-v1.5-7b_0.7.json`, `0.7.json`), and it holds one list with a
        number per layer. In both, 0.7 is the share *evicted*: such a file becomes the budget 0.3, and its numbers x
        become the retention 1 - x. It says nothing of the model, so only the number of layers is checked when the
        profile is used.

        Args:
            folder: with the files; where it holds those of several models, with the start of their names:
                `confs/prefixkv_llava-v1.5-7b`.

        Raises:
            ConfigError: if there are no such files, or those of several models, or one holds anything else.
        """
        folder = path_of(folder, "from_prefixkv")
        files = {round(1 - ratio, 9): path for ratio, path in _ratios(folder).items() if ratio < 1}
        budgets = sorted(files)
        retention = [[1 - share for share in _evicted(files[budget])] for budget in budgets]
        return cls(budgets=budgets, retention=retention, data=f"PrefixKV: {folder.name}")


def profile_override(profile: LayerProfile | str | PathLike[str] | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration to override, with a profile or its file for the allocator; None changes nothing.

    Raises:
        ConfigError: if the profile cannot be read, or an allocator is among the fields.
    """
    if profile is None:
        return overrides
    if "allocator" in overrides:
        raise ConfigError("profile: takes the place of the allocator, and both were given; give one")
    if not isinstance(profile, (LayerProfile, str, PathLike)):
        raise ConfigError(
            f"profile: must be a LayerProfile, or the path of one as 'kvcompress calibrate' writes it; got "
            f"{shown(profile)}. A list of shares kept goes into allocator={{'name': 'profile', 'retention': ...}}"
        )
    profile = profile if isinstance(profile, LayerProfile) else LayerProfile.load(profile)
    return {**overrides, "allocator": profile.allocator()}


def check_made_for(config: CompressionConfig, decoder: PreTrainedModel, layers: int | None = None) -> None:
    """Raises ConfigError if an allocator in a configuration was made for another model; the message names what differs.

    Args:
        config: the policies.
        decoder: the module that owns the decoder layers.
        layers: how many of them are compressed; None if all are.
    """
    compressed = decoder.config.num_hidden_layers if layers is None else layers
    kv_heads = getattr(decoder.config, "num_key_value_heads", None)
    held = _with_parts(config.allocator)
    known = any(isinstance(one, Profile) and one.model is not None for one in held)
    mine = fingerprint_of(decoder) if known else None
    for one in held:
        model = one.model if isinstance(one, Profile) else None
        differences = [] if model is None or mine is None else model.differences(mine)
        if not differences and one.made_for is not None:
            differences = _other_shape(*one.made_for, compressed, kv_heads)
        if differences and isinstance(one, Profile):
            raise ConfigError(
                f"profile: was made for another model ({', '.join(differences)}); make one for this model with "
                "'kvcompress calibrate', or leave the profile out"
            )
        if differences:
            raise ConfigError(
                f"allocator {one.name}: was made for another model ({', '.join(differences)}); give what it says of "
                "layers and heads for those of this one, or choose another allocator"
            )


def _other_shape(layers: int, heads: int, model_layers: int, model_heads: int | None) -> list[str]:
    """What is not as in the model; a number for a whole layer goes with however many heads."""
    found = [] if layers == model_layers else [f"layers {layers} instead of {model_layers}"]
    if heads not in (1, model_heads) and model_heads is not None:
        found.append(f"kv_heads {heads} instead of {model_heads}")
    return found


def _with_parts(allocator: Allocator) -> list[Allocator]:
    """An allocator, and every one that it is made of."""
    parts = [value for _, value in allocator if isinstance(value, Allocator)]
    return [allocator, *(one for part in parts for one in _with_parts(part))]


def _ratios(folder: Path) -> dict[float, Path]:
    """The files of PrefixKV by the ratio that their names end in."""
    folder, start = (folder, "") if folder.is_dir() else (folder.parent, folder.name)
    models: dict[str, dict[float, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        name = re.fullmatch(r"(|.*[^\d.])([01](?:\.\d+)?)", path.stem)
        if name and path.name.startswith(start) and float(name[2]) <= 1:
            models.setdefault(name[1], {})[float(name[2])] = path
    if not models:
        raise ConfigError(
            f"from_prefixkv: {folder} has no .json file whose name {f'starts with {start} and ' if start else ''}ends "
            "in the ratio evicted, such as 0.7.json"
        )
    if len(models) > 1:
        raise ConfigError(
            f"from_prefixkv: {folder} has the files of several models; add the start of the names: "
            f"{', '.join(str(folder / name) for name in models)}"
        )
    return models.popitem()[1]


def _evicted(path: Path) -> list[float]:
    shares = read_structure(path, "profile")
    if not isinstance(shares, list) or not shares or not all(_is_share(share) for share in shares):
        raise ConfigError(f"profile {path}: must hold one list with the share evicted of each layer, from 0 to 1")
    return [float(share) for share in shares]


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _format_of(path: str | PathLike[str]) -> Path:
    path = path_of(path, "profile")
    if path.suffix not in _FORMATS:
        raise ConfigError(f"profile {path}: the file name must end in one of {', '.join(_FORMATS)}")
    return path
