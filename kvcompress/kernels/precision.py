"""In which dtype kernels compute, whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def without_autocast(
    function: Callable[Concatenate[Tensor, _Arguments], _Result],
) -> Callable[Concatenate[Tensor, _Arguments], _Result]:
    """Lets a function of a tensor, and whatever else, compute in the dtypes that it asks for, also under autocast."""

    @wraps(function)
    def exact(tensor: Tensor, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return exact


def in_one_dtype(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in autocast's dtype, or else in that of the queries: fused kernels take no other."""
    dtype, device = query.dtype, query.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if query.dtype == keys.dtype == values.dtype == dtype:
        return query, keys, values
    return query.to(dtype), keys.to(dtype), values.to(dtype)
