"""Buffers of slots, of which each row, or head, uses as many as it holds: a token is written, one query attends."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvcompress.kernels.device import runs_triton, takes_triton
from kvcompress.kernels.precision import in_one_dtype


def decode_attention(
    query: Float[Tensor, "batch heads one head_dim"],
    keys: Float[Tensor, "*buffer head_dim"],
    values: Float[Tensor, "*buffer value_dim"],
    scaling: float,
    length: Int[Tensor, "batch sets"] | None,
    start: Int[Tensor, "batch kv_heads"] | None = None,
    slots: int = 0,
) -> Float[Tensor, "batch heads one value_dim"]:
    """Attention of one query per row over the slots in use.

    On CUDA, a Triton kernel reads the slots in use alone, once for the heads of a group, split among as many programs
    as the shapes ask for: it asks the device nothing, so that a CUDA graph can hold it. Elsewhere, attention with a
    mask over all slots. Both are one node, or traceable without a break, for `torch.compile`.

    Args:
        query: one query per row, after rotary embedding.
        keys: buffer of keys, after rotary embedding, `[batch, kv_heads, slots, head_dim]`; may have more slots than are
            in use. With `start`, the slots of all rows and heads one after the other, `[all slots, head_dim]`.
        values: buffer of values, likewise.
        scaling: factor on the logits.
        length: slots in use, the first ones of each row (`sets` is 1) or of each row and key/value head; None if all
            are. Whatever lies in other slots counts for nothing if it is finite.
        start: where the slots of each row and key/value head begin in buffers without gaps.
        slots: with `start`, slots of the row and head that has most.

    Returns:
        The attention output in the dtype of `query` (under autocast, in autocast's); 0 where no slot is in use.
    """
    query, keys, values = in_one_dtype(query, keys, values)
    if query.device.type != "cuda":
        return _in_torch(query, keys, values, scaling, length, start, slots)
    if torch.compiler.is_compiling():
        return decode_op(query, keys, values, scaling, length, start, slots)  # type: ignore[no-any-return]
    return _on_cuda(query, keys, values, scaling, length, start, slots)


def write_slots(
    keys: Float[Tensor, "*buffer head_dim"],
    values: Float[Tensor, "*buffer value_dim"],
    key: Float[Tensor, "batch kv_heads one head_dim"],
    value: Float[Tensor, "batch kv_heads one value_dim"],
    slot: Int[Tensor, "batch sets"],
    start: Int[Tensor, "batch kv_heads"] | None = None,
) -> None:
    """Puts one token of each row into a slot of its buffers, in place; on CUDA keys and values in one launch.

    Args:
        keys: buffer of keys, as in `decode_attention`.
        values: buffer of values, likewise.
        key: the token's keys.
        value: its values.
        slot: where they go, in each row (`sets` is 1) or in each row and key/value head.
        start: where the slots of each row and key/value head begin in buffers without gaps.

    Raises:
        TypeError: if the token's dtype is not that of the buffers, which no kernel may change unasked.
    """
    if key.dtype != keys.dtype or value.dtype != values.dtype:
        raise TypeError(
            f"decode step: the cache holds keys and values in {keys.dtype}, {values.dtype}, and the model now gives "
            f"{key.dtype}, {value.dtype}; go on in one dtype (the same autocast), or start with another cache"
        )
    if not torch.compiler.is_compiling() and runs_triton(keys.device):  # compiled steps write within other kernels
        from kvcompress.kernels.triton_write import write

        write(keys, values, key, value, slot, start)
        return
    if start is not None:
        at = (start + slot).flatten()
        keys.index_copy_(0, at, key.reshape(-1, key.shape[3]))
        values.index_copy_(0, at, value.reshape(-1, value.shape[3]))
        return
    if torch.compiler.is_compiling():
        at = slot[:, :, None, None]
        keys.scatter_(2, at.expand(key.shape), key)
        values.scatter_(2, at.expand(value.shape), value)
        return
    if slot.shape == (1, 1):  # the same place in every head
        keys.index_copy_(2, slot[0], key)
        values.index_copy_(2, slot[0], value)
        return
    rows, heads = _rows_and_heads(*key.shape[:2], key.device)
    keys.index_put_((rows, heads, slot), key[:, :, 0])  # in half precision on a CPU, scatter_ copies whole buffers
    values.index_put_((rows, heads, slot), value[:, :, 0])


@functools.lru_cache(maxsize=64)
def _rows_and_heads(batch: int, kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of rows, `[batch, 1]`, and of heads, `[1, kv_heads]`, the same in every layer and step."""
    with torch.inference_mode(False):
        return torch.arange(batch, device=device)[:, None], torch.arange(kv_heads, device=device)[None]


def _on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, length: Tensor | None, start: Tensor | None, slots: int
) -> Tensor:
    if not takes_triton(query):
        return _in_torch(query, keys, values, scaling, length, start, slots).contiguous()
    from kvcompress.kernels.triton_decode import decode

    return decode(query, keys, values, scaling, length, start, slots)


decode_op = torch.library.custom_op(
    "kvcompress::decode_attention",
    _on_cuda,
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, float scaling, Tensor? length, Tensor? start, int slots) "
    "-> Tensor",
)


@decode_op.register_fake
def _shape(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, length: Tensor | None, start: Tensor | None, slots: int
) -> Tensor:
    return query.new_empty(*query.shape[:3], values.shape[-1])


def _in_torch(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, length: Tensor | None, start: Tensor | None, slots: int
) -> Tensor:
    """The heads of a group as queries of one head, so that keys and values are repeated nowhere."""
    batch, heads, _, head_dim = query.shape
    if start is not None:
        keys, values = padded(keys, start, slots), padded(values, start, slots)
    kv_heads, slots = keys.shape[1:3]
    grouped, mask = query.reshape(batch, kv_heads, heads // kv_heads, head_dim), None
    if length is not None:
        mask = (torch.arange(slots, device=keys.device) < length.unsqueeze(-1)).unsqueeze(2)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    if length is not None:
        output = output.masked_fill((length == 0)[:, :, None, None], 0.0)
    return output.reshape(batch, heads, 1, -1)


def padded(
    buffer: Float[Tensor, "all_slots dim"], start: Int[Tensor, "batch kv_heads"], slots: int
) -> Float[Tensor, "batch kv_heads slots dim"]:
    """So many slots of every row and head out of a buffer without gaps; where one has fewer, others in their place."""
    at = (start.unsqueeze(-1) + torch.arange(slots, device=start.device)).clamp(max=buffer.shape[0] - 1)
    return buffer.index_select(0, at.flatten()).view(*at.shape, -1)
