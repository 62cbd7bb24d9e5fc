"""Decode steps of every kind, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument

Step = Callable[[], Any]
TO_COME = 64  # tokens that a cache is told to make room for, more than are measured


def seconds(step: Step, device: torch.device) -> float:
    """Time of one call, what it left to the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def milliseconds(step: Step, device: torch.device, steps: int, warm_up: int = 3) -> float:
    """Median time of a call after a warm-up."""
    times = [seconds(step, device) for _ in range(warm_up + steps)]
    return 1000 * statistics.median(times[warm_up:])


def asked(step: Step, device: torch.device, most: int = 6) -> dict[str, Any]:
    """What a call asks a device for, and what takes the host longest of it, waits and allocations included.

    Returns:
        Kernels launched; milliseconds of torch's own on the host, which are fewer than the call takes by what Python
        costs between them; and those that take most, with how many there are of each.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiled:
        seconds(step, device)
    found = sorted(profiled.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    longest = [f"{event.key} {event.self_cpu_time_total / 1000:.2f} ms of {event.count}" for event in found[:most]]
    return {
        "launches": sum(event.count for event in found if "LaunchKernel" in event.key),
        "torch_ms": sum(event.self_cpu_time_total for event in found) / 1000,
        "longest": "; ".join(longest),
    }


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device, 10) / 1000)


def graphed(step: Step, device: torch.device) -> Step:
    """A step as a CUDA graph, after it ran three times; as it is on other devices, which have none."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def fill(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> Cache:
    """Gives a cache of transformers random keys and values, as many as a prompt of `tokens` tokens would."""
    text = model.config.get_text_config(decoder=True)
    shape = (batch, text.num_key_value_heads, tokens, text.hidden_size // text.num_attention_heads)
    drawn = torch.randn(shape, device=model.device, dtype=model.dtype)
    for layer in range(text.num_hidden_layers):
        cache.update(drawn, drawn, layer)
    return cache


def token_of(model: PreTrainedModel, batch: int) -> Tensor:
    """A token for each row."""
    return torch.full((batch, 1), 5, device=model.device)


def in_python(model: PreTrainedModel, cache: Cache, batch: int, **more: Tensor) -> Step:
    """A step that the host asks for operation by operation."""
    ids = token_of(model, batch)
    return lambda: model(input_ids=ids, use_cache=True, **cache_argument(cache), **more)


def static(model: PreTrainedModel, cache: Cache, batch: int, held: int) -> Step:
    """A step with transformers' `StaticCache`, as a CUDA graph."""
    position = torch.full((batch, 1), held, device=model.device)
    return graphed(in_python(model, cache, batch, position_ids=position), model.device)


def captured(model: PreTrainedModel, cache: CompressedCache, batch: int) -> Step | None:
    """A step as `generate` takes it with `decoding="captured"`; None where nothing can be captured."""
    ids = token_of(model, batch)
    _, forward = cache.plan_decoding(model, {"input_ids": ids, "max_new_tokens": TO_COME})
    return None if forward is None else _counting(model, cache, batch, forward)


def compiled(model: PreTrainedModel, cache: CompressedCache, batch: int) -> Step:
    """A step as `generate` takes it with `decoding="compiled"`; off a GPU, the graph that was traced runs as it is."""
    config = None
    if model.device.type != "cuda":
        config = CompileConfig(backend="eager", mode=None)  # type: ignore[arg-type]
    step = _counting(model, cache, batch, model.get_compiled_call(config))

    def prepared() -> None:
        cache.get_mask_sizes(1)  # as `generate` asks before every step, so that buffers have room
        step()

    return prepared


def _counting(model: PreTrainedModel, cache: CompressedCache, batch: int, forward: Callable[..., Any]) -> Step:
    ids = token_of(model, batch)
    positions = torch.full_like(ids, int(cache.get_seq_length()))

    def step() -> None:
        forward(input_ids=ids, position_ids=positions, use_cache=True, return_dict=True, **cache_argument(cache))
        positions.add_(1)

    return step


def read(model: PreTrainedModel, cache: Any, **inputs: Tensor) -> Any:
    """The cache after a prompt, read as in `generate`: logits for the last token alone."""
    model(**inputs, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    return cache
