"""What the kernels cost on this machine, each as a ratio to the plain operation that it stands beside.

Run `python -m benchmarks.kernels` (CPU, about half a minute on one thread) or `python -m benchmarks.kernels cuda`.
Times are the least of many, taken in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import about_line
from kvcompress.kernels import attention_mass, attention_with_mask, decode_attention, decode_attention_codes

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # what is measured, and what it is measured by


def seconds(functions: Pair, device: str, repeats: int) -> list[float]:
    """Least time of each, in turns; of the processor that works on it."""
    least = [float("inf")] * 2
    for _ in range(repeats):
        for number, function in enumerate(functions):
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                function()
                end.record()
                end.synchronize()
                least[number] = min(least[number], start.elapsed_time(end) / 1000)
            else:
                begin = time.perf_counter()
                function()
                least[number] = min(least[number], time.perf_counter() - begin)
    return least


def pairs(device: str, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, tokens: int) -> dict[str, Pair]:
    """Pairs by name, over one layer's tensors."""
    head_dim, scale = 64 if device == "cpu" else 128, 0.125

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    query, last = drawn(batch, heads, tokens, head_dim), drawn(batch, heads, 1, head_dim)
    keys, values = drawn(batch, kv_heads, tokens, head_dim), drawn(batch, kv_heads, tokens, head_dim)
    column = torch.arange(tokens, device=device)
    valid = column >= torch.arange(batch, device=device).unsqueeze(1) * tokens // (4 * batch)
    lse = attention_with_mask(query, keys, values, scale, None)[1]
    fifth = torch.full((batch, 1), tokens // 5, device=device)
    all_slots = torch.full((batch, 1), tokens, device=device)
    data = torch.randint(0, 256, (2, batch, kv_heads, tokens, head_dim // 2), device=device, dtype=torch.uint8)
    key_scale, value_scale = drawn(batch, kv_heads, tokens // 64, head_dim), drawn(batch, kv_heads, tokens, 1)
    codes = (data[0], key_scale, key_scale, data[1], value_scale, value_scale, keys[:, :, :0], values[:, :, :0])

    def attend() -> Any:
        return attention_with_mask(query, keys, values, scale, None)

    def decode_all() -> Any:
        grouped = last.reshape(batch, kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scale)

    return {
        "prefill, padded / unpadded": (lambda: attention_with_mask(query, keys, values, scale, valid), attend),
        "mass of all queries / prefill": (lambda: attention_mass(query, keys, lse, scale), attend),
        "mass, padded / unpadded": (
            lambda: attention_mass(query, keys, lse, scale, valid=valid),
            lambda: attention_mass(query, keys, lse, scale),
        ),
        "mass of every fourth query / prefill": (lambda: attention_mass(query, keys, lse, scale, stride=4), attend),
        "mass of the last 32 queries / prefill": (
            lambda: attention_mass(query, keys, lse, scale, start=tokens - 32),
            attend,
        ),
        "decode, all slots by length / plain": (
            lambda: decode_attention(last, keys, values, scale, all_slots),
            decode_all,
        ),
        "decode, a fifth of the slots / plain, all": (
            lambda: decode_attention(last, keys, values, scale, fifth),
            decode_all,
        ),
        "decode, 4-bit codes / plain": (
            lambda: decode_attention_codes(last, *codes, scale, None, None),
            decode_all,
        ),
    }


def main() -> None:
    """Prints a line per pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", nargs="?", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    shapes = [(1, 9, 3, 2048), (16, 9, 3, 256)] if device == "cpu" else [(16, 32, 32, 2048), (16, 32, 8, 8192)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    print(f"{about_line(torch.device(device))}, {dtype}")
    for batch, heads, kv_heads, tokens in shapes:
        print(f"batch {batch}, heads {heads}, kv_heads {kv_heads}, tokens {tokens}")
        with torch.inference_mode():
            for name, functions in pairs(device, dtype, batch, heads, kv_heads, tokens).items():
                for function in functions:
                    function()
                measured, beside = seconds(functions, device, 10)
                print(
                    f"  {name:45} {measured / beside:6.2f}  ({measured * 1e3:.2f} ms / {beside * 1e3:.2f} ms)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
