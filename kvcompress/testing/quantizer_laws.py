"""Laws of quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.policies.base import Quantizer
from kvcompress.policies.context import Codes
from kvcompress.testing.laws import Law, law, require, require_unchanged, tensors_of
from kvcompress.testing.numbers import tensors

_HALVES = (torch.bfloat16, torch.float16)


def _quantizer_law(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,), share: float = 1.0
) -> Callable[[Callable[[Any, Any], None]], Law]:
    return law(
        "quantizer",
        draws=lambda quantizer: st.one_of(*(tensors(quantizer.group, dtype) for dtype in dtypes)),
        share=share,
    )


def _both(quantizer: Quantizer, tensor: Tensor) -> list[tuple[str, Codes]]:
    return [("keys", quantizer.encode_keys(tensor)), ("values", quantizer.encode_values(tensor))]


def _slots(codes: Codes, first: int, last: int, group: int) -> Codes:
    """The codes of some slots, whole groups of them."""
    tokens = codes.data.shape[2]

    def cut(tensor: Tensor) -> Tensor:
        each = 1 if tensor.shape[2] == tokens else group
        return tensor[:, :, first // each : last // each]

    return codes.each(cut)


@_quantizer_law((torch.float32, *_HALVES))
def decodes_to_what_it_encoded(quantizer: Quantizer, tensor: Tensor) -> None:
    """What is decoded has the shape, dtype and device of what was encoded, and is finite."""
    for what, codes in _both(quantizer, tensor):
        found = quantizer.decode(codes)
        require(
            found.shape == tensor.shape and found.dtype == tensor.dtype and found.device == tensor.device,
            f"gave {what} back as {found.dtype} of {tuple(found.shape)}",
        )
        require(found.isfinite(), f"gave {what} back that are not finite")


@_quantizer_law(share=1 / 4)
def writes_rows_of_codes(quantizer: Quantizer, tensor: Tensor) -> None:
    """Codes have one row of data for each slot, scales and shifts of one shape with one row for each slot or group, in
    the dtype that was encoded, whose parts divide a slot's dimensions.
    """
    batch, heads, tokens, dim = tensor.shape
    for what, codes in _both(quantizer, tensor):
        rows, parts = codes.scale.shape[2:]
        require(tuple(codes.data.shape[:3]) == (batch, heads, tokens), f"data of {what}: {tuple(codes.data.shape)}")
        require(codes.dim == dim, f"says that {what} have {codes.dim} dimensions, not {dim}")
        require(rows in (tokens, tokens // quantizer.group), f"{rows} rows of scales for {tokens} {what}")
        require(codes.scale.dtype == tensor.dtype, f"scales of {what} are {codes.scale.dtype}")
        require(dim % parts == 0, f"{parts} scales for {dim} dimensions of {what}")
        require(codes.shift is None or codes.shift.shape == codes.scale.shape, f"shifts of {what} of another shape")


@_quantizer_law()
def quantizes_groups_by_themselves(quantizer: Quantizer, tensor: Tensor) -> None:
    """A group is quantized as it would be alone, so that what was quantized before is never touched again."""
    group = quantizer.group
    alone = [_both(quantizer, part) for part in torch.split(tensor, group, 2)]
    for number, (what, codes) in enumerate(_both(quantizer, tensor)):
        for place, own in enumerate(alone):
            cut = _slots(codes, place * group, (place + 1) * group, group)
            for name in ("data", "scale", "shift"):
                found, wanted = getattr(cut, name), getattr(own[number][1], name)
                same = (found is wanted) if wanted is None else _equal(found, wanted)
                require(same, f"{name} of {what}: group {place} is another beside the others")


@_quantizer_law()
def decodes_groups_by_themselves(quantizer: Quantizer, tensor: Tensor) -> None:
    """The codes of some groups decode to the numbers that they are among all others."""
    group = quantizer.group
    for what, codes in _both(quantizer, tensor):
        whole = quantizer.decode(codes)
        for first in range(0, tensor.shape[2], group):
            part = quantizer.decode(_slots(codes, first, first + group, group))
            require(torch.equal(part, whole[:, :, first : first + group]), f"decoded {what} otherwise by groups")


@_quantizer_law(share=1 / 4)
def quantizes_rows_by_themselves(quantizer: Quantizer, tensor: Tensor) -> None:
    """A row is quantized as it would be alone."""
    whole = [quantizer.decode(codes) for _, codes in _both(quantizer, tensor)]
    for row in range(len(tensor)):
        for found, (what, codes) in zip(whole, _both(quantizer, tensor[row : row + 1]), strict=True):
            require(torch.equal(quantizer.decode(codes), found[row : row + 1]), f"{what} of row {row} are others alone")


@_quantizer_law(share=1 / 4)
def quantizes_heads_by_themselves(quantizer: Quantizer, tensor: Tensor) -> None:
    """A head is quantized as it would be alone, so that heads with different numbers of tokens can be."""
    whole = [quantizer.decode(codes) for _, codes in _both(quantizer, tensor)]
    for head in range(tensor.shape[1]):
        for found, (what, codes) in zip(whole, _both(quantizer, tensor[:, head : head + 1]), strict=True):
            own = found[:, head : head + 1]
            require(torch.equal(quantizer.decode(codes), own), f"{what} of head {head} are others alone")


@_quantizer_law()
def is_off_by_less_than_the_largest(quantizer: Quantizer, tensor: Tensor) -> None:
    """What comes back is near what went in: no number is off by more than the largest one of its head and group."""
    batch, heads, tokens, dim = tensor.shape
    blocks = (batch, heads, tokens // quantizer.group, quantizer.group * dim)
    largest = tensor.reshape(blocks).abs().amax(-1)
    for what, codes in _both(quantizer, tensor):
        off = (quantizer.decode(codes) - tensor).reshape(blocks).abs().amax(-1)
        require(off <= largest * 1.001, f"{what}: off by {off.tolist()} where the largest are {largest.tolist()}")


@_quantizer_law(share=1 / 4)
def leaves_its_numbers_alone(quantizer: Quantizer, tensor: Tensor) -> None:
    """A quantizer writes neither to what it encodes nor to the codes it decodes."""
    before = tensor.clone()
    for _, codes in _both(quantizer, tensor):
        require(torch.equal(tensor, before), "wrote to what it was to encode")
        copies = tensors_of(codes)
        quantizer.decode(codes)
        require_unchanged(copies, codes)


@_quantizer_law(share=1 / 4)
def quantizes_alike(quantizer: Quantizer, tensor: Tensor) -> None:
    """The same numbers get the same codes, however often it is asked and whatever was drawn in between."""
    first = _both(quantizer, tensor)
    torch.rand(3)
    for (what, codes), (_, again) in zip(first, _both(quantizer, tensor), strict=True):
        require(_equal(codes.data, again.data) and _equal(codes.scale, again.scale), f"gave {what} other codes")


@_quantizer_law(_HALVES)
def decodes_half_precision_as_single(quantizer: Quantizer, tensor: Tensor) -> None:
    """The same codes and scales in half precision mean the same numbers, but for the rounding of the dtype."""
    for what, codes in _both(quantizer, tensor):
        shift = None if codes.shift is None else codes.shift.float()
        found = quantizer.decode(codes)
        wanted = quantizer.decode(Codes(codes.data, codes.scale.float(), shift, codes.dim))
        require(found.dtype == tensor.dtype, f"gave {what} back as {found.dtype}")
        largest = wanted.abs().amax() + (0 if shift is None else shift.abs().amax())
        off = (found.float() - wanted).abs()
        require(off <= 4 * torch.finfo(tensor.dtype).eps * largest, f"{what}: off by {float(off.max()):.3g}")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
