"""What torch is asked to do: counts do not depend on the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "tolist", "cpu")
_CALLS = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu"}  # which the dispatcher never hears of on a CPU


class Operations(TorchDispatchMode):
    """Counts operations by name while it is active.

    Attributes:
        counts: all of them.
        views: those that make a view of what they were given, which start nothing on a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __enter__(self) -> Operations:
        """Also counts lists made of tensors and copies to the host."""
        self._calls = _Calls(self.counts)
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stops counting."""
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts and goes on."""
        name = func.overloadpacket.__name__
        if name == "scalar_tensor":  # a number among tensors, which stays on the host
            return func(*args, **(kwargs or {}))
        self.counts[name] += 1
        # A mask as an index asks for the number of its slots.
        if name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.counts["nonzero"] += 1
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.views[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def number(self) -> int:
        """Operations that are no views."""
        return self.counts.total() - self.views.total() - sum(self.counts[name] for name in _CALLS.values())

    @property
    def syncs(self) -> int:
        """Times that the host waits for an answer of the device."""
        return sum(self.counts[name] for name in _SYNCS)


class _Calls(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CALLS:
            self.counts[_CALLS[func]] += 1
        return func(*args, **(kwargs or {}))
