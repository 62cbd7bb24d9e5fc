"""Keys and values as quantizers meet them, as Hypothesis draws them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.testing.importance import generator, seeds


@st.composite
def tensors(draw: st.DrawFn, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys with channels and tokens of very different magnitude, constant ones and zeros among them."""
    batch, heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = draw(st.sampled_from([4, 6, 8, 16, 64]))
    g = generator(draw(seeds))
    keys = torch.randn(batch, heads, groups * group, dim, generator=g) + torch.randn(dim, generator=g)
    keys = keys * torch.pow(10.0, torch.randint(-2, 3, (dim,), generator=g))
    kind = draw(st.sampled_from(["mixed", "constant", "zero", "outlier"]))
    if kind == "constant":
        keys = keys[:, :, :1].expand(keys.shape).contiguous()
    elif kind == "zero":
        keys = torch.zeros_like(keys)
    elif kind == "outlier":
        keys[..., 0] *= 10
    return keys.to(dtype)
