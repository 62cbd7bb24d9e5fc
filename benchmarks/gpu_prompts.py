"""What a prompt costs on a GPU: the sections of `benchmarks.gpu` that read one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import kvcompress
from benchmarks import kernels, steps
from benchmarks.lab import About, Lab
from benchmarks.steps import read
from kvcompress import CompressedCache
from kvcompress.evaluation.memory import peak_of

Make = Callable[[], Cache | None]
BUDGET = 0.2


def prefill(lab: Lab) -> None:
    """The mass kernel against flash attention, then whole prompts against `DynamicCache`: time and peak memory."""
    lengths = (60,) if lab.tiny else (4096, 16384)
    for heads, kv_heads in ((4, 2),) if lab.tiny else ((32, 32), (32, 8)):
        for tokens in lengths:
            about = {"heads": heads, "kv_heads": kv_heads, "tokens": tokens}
            lab.attempt("prefill", about, partial(_masses, lab, about, heads, kv_heads, tokens))
    model = lab.model("prefill", "mha")
    if model is not None:
        for tokens in lengths:
            _prompts(lab, model, tokens)


def _masses(lab: Lab, about: About, heads: int, kv_heads: int, tokens: int) -> None:
    for name, pair in kernels.pairs(lab.device.type, torch.bfloat16, 1, heads, kv_heads, tokens).items():
        if name.startswith("mass of"):
            for function in pair:
                function()
            own, beside = kernels.seconds(pair, lab.device.type, 10)
            aim = "at most 0.6" if "all queries" in name else None
            lab.row("prefill", about, kernel=name, ratio=own / beside, ms=1000 * own, aim=aim)


def _prompts(lab: Lab, model: PreTrainedModel, tokens: int) -> None:
    kvcompress.restore(model)
    ids, first = lab.ids(1, tokens), (0.0, 1)

    def scored(queries: str) -> Make:
        scorer = {"name": "attention", "queries": queries}
        return partial(CompressedCache, model, "prefixkv", budget=BUDGET, scorer=scorer)

    makers: dict[str, tuple[Make, float | None]] = {
        "DynamicCache": (lambda: DynamicCache(config=model.config), None),
        "full": (partial(CompressedCache, model, "full"), None),
        "prefixkv, exact": (scored("all"), 1.25),
        "prefixkv, stride:4": (scored("stride:4"), 1.10),
        "prefixkv, window:32": (scored("window:32"), 1.05),
        "snapkv": (partial(CompressedCache, model, "snapkv", budget=BUDGET), 1.05),
        "uniform, key_norm": (partial(CompressedCache, model, "uniform", budget=BUDGET, scorer="key_norm"), 1.05),
    }

    def run(about: About, make: Make, most: float | None) -> None:
        nonlocal first

        def whole() -> None:
            read(model, make(), input_ids=ids)

        peak = peak_of(whole, lab.device) or 1
        ms = steps.milliseconds(whole, lab.device, 1 if lab.tiny else 3, warm_up=0)
        first = first if first[0] else (ms, peak)
        figures = {"ms": ms, "ratio": ms / first[0], "peak_gib": peak / 2**30, "peak_ratio": peak / first[1]}
        aim = None if most is None else f"ratio at most {most}, peak_ratio at most 1.05"
        lab.row("prefill", about, **figures, aim=aim)

    for name, (make, most) in makers.items():
        about = {"batch": 1, "tokens": tokens, "cache": name}
        lab.attempt("prefill", about, partial(run, about, make, most), 8)


def llava(lab: Lab) -> None:
    """LightKV on LLaVA-1.5-7B: a prompt of an image (its tower included) and 64 text tokens, then decode steps."""
    model = lab.model("llava", "llava")
    if model is not None:
        for batch in (2,) if lab.tiny else (1, 16):
            _images(lab, model, batch)


def _images(lab: Lab, model: PreTrainedModel, batch: int) -> None:
    kvcompress.restore(model)
    vision, first = model.config.vision_config, 0.0
    image = [model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[1, *image, *range(100, 163)]] * batch, device=lab.device)
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, device=lab.device, dtype=model.dtype)
    makers: dict[str, Make] = {
        "DynamicCache": lambda: DynamicCache(config=model.config.get_text_config(decoder=True)),
        "full": partial(CompressedCache, model, "full"),
        "prefixkv": partial(CompressedCache, model, "prefixkv", budget=BUDGET),
        "lightkv": partial(CompressedCache, model, "lightkv"),
        "prefixkv+lightkv": partial(CompressedCache, model, "prefixkv+lightkv", budget=BUDGET),
    }

    def run(about: About, make: Make) -> None:
        nonlocal first

        def whole() -> Any:
            return read(model, make(), input_ids=ids, pixel_values=pixels)

        ms = steps.milliseconds(whole, lab.device, 1 if lab.tiny else 3, warm_up=1)
        first = first or ms
        aim = f"ratio at most {0.75 if batch == 16 else 1.0}" if about["cache"] == "lightkv" else None
        lab.row("llava", about, prefill_ms=ms, ratio=ms / first, aim=aim)
        if lab.tiny or batch == 1:  # where the host may be what takes time
            lab.row("llava", about, **steps.asked(whole, lab.device))
        cache = whole()
        if isinstance(cache, CompressedCache):
            lab.decoding("llava", about, model, cache, batch)
        else:
            lab.row("llava", about, mode="eager", ms=lab.milliseconds(steps.in_python(model, cache, batch)))

    for name, make in makers.items():
        about = {"batch": batch, "tokens": ids.shape[1], "cache": name}
        lab.attempt("llava", about, partial(run, about, make), 8)
