"""Which heads of a layer this process holds, and how it learns of the others: tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompress.errors import UnsupportedModelError


@dataclass(frozen=True)
class HeadGroup:
    """The processes that share the heads of every layer: equal runs of neighbouring heads, by rank.

    Alone, as it is for a model in one process, nothing is sent and every method gives back what it got. In a group each
    method but `own` and `first` waits for all processes, which must call it in the same order.

    Attributes:
        group: the process group; None for a process that holds all heads.
        rank: number of this process in it.
        size: number of processes.
        device: where the group can send tensors from.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadGroup:
        """A connection cannot be copied; copies of a cache share it."""
        return self

    def first(self, heads: int) -> int:
        """Number of this process's first head, where it holds so many."""
        return self.rank * heads

    def part(self, heads: int) -> slice:
        """This process's part of so many heads over all."""
        own = heads // self.size
        return slice(self.first(own), self.first(own) + own)

    def gather(self, tensor: Tensor) -> Tensor:
        """What all processes hold of a tensor `[batch, heads, ...]`, in the order of the heads."""
        return tensor if self.group is None else torch.cat(self._everyone(tensor), 1)

    def gather_slots(self, tensor: Tensor, fill: float) -> Tensor:
        """The same of `[batch, heads, slots]` where processes may differ in the number of slots; filled at the end."""
        if self.group is None:
            return tensor
        sizes = self._everyone(torch.tensor([tensor.shape[2]]))
        return self.gather(F.pad(tensor, (0, int(torch.cat(sizes).max()) - tensor.shape[2]), value=fill))

    def own(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor `[batch, sets, ...]` over all heads; a single set is for every head."""
        if self.group is None or tensor.shape[1] == 1:
            return tensor
        return tensor[:, self.part(tensor.shape[1])]

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, the same to the last bit in each: of a figure that is a mean over heads."""
        return tensor if self.group is None else torch.stack(self._everyone(tensor)).mean(0)

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.detach().to(self.device).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.group)
        return [part.to(tensor.device) for part in received]


ALONE = HeadGroup()


def local(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


def head_group(attentions: Iterable[nn.Module], heads: int, kv_heads: int, mesh: Any) -> HeadGroup:
    """Finds out how the projections of a model's attention are shared out.

    Args:
        attentions: attention modules with `q_proj`, `k_proj`, `v_proj` and `head_dim`.
        heads: query heads of the whole model.
        kv_heads: key/value heads of the whole model.
        mesh: the model's device mesh; None for a model in one process.

    Returns:
        The group of tensor parallelism; `ALONE` where every process holds all heads.

    Raises:
        UnsupportedModelError: if some process holds anything but its whole key/value heads, or not all layers.
    """
    names = () if mesh is None else (mesh.mesh_dim_names or ("tp",) * (mesh.ndim == 1))
    if "pp" in names and mesh.size(names.index("pp")) > 1:
        raise UnsupportedModelError(
            "model: its layers are on several processes (pipeline parallelism), but a compressed cache splits its "
            "budget over all layers; share out the heads instead (tp_plan='auto')"
        )
    size = mesh.size(names.index("tp")) if "tp" in names else 1
    if size == 1:
        return ALONE
    parts = set()
    for index, attention in enumerate(attentions):
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            weight = getattr(getattr(attention, name, None), "weight", None)
            rows, whole = -1 if weight is None else local(weight).shape[0], count * getattr(attention, "head_dim", 0)
            share = rows * size == whole and count % size == 0
            parts.add("whole" if rows == whole else "share" if share else "other")
            if "other" in parts or len(parts) > 1:
                raise UnsupportedModelError(
                    f"model: each of the {size} processes must hold an equal number of the {heads} query heads and of "
                    f"the {kv_heads} key/value heads, in every layer; layer {index}: {name} has "
                    f"{'no weight' if weight is None else f'{rows} of {whole} rows'} here. Start as many processes as "
                    "divide both numbers (torchrun --nproc-per-node) and load with tp_plan='auto'"
                )
    if parts == {"whole"}:
        return ALONE
    own = mesh["tp"] if mesh.mesh_dim_names else mesh
    return HeadGroup(own.get_group(), own.get_local_rank(), size, own.device_type)
