"""Speed and memory on a GPU: `python -m benchmarks.gpu`, under five minutes.

bfloat16, random weights in the shapes of LLaMA-7B ("mha"), LLaMA-3.1-8B ("gqa") and LLaVA-1.5-7B. Every figure is
printed as it comes and written to a JSON file; `aim` beside it says what it should be. A section can be run alone
(`--section decode`), and what would begin too late is left out with a word. `--tiny` runs through the same code with
models so small that a CPU will do; its figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import kvcompress
from benchmarks import steps
from benchmarks.gpu_prompts import BUDGET, Make, llava, prefill
from benchmarks.lab import About, Lab
from benchmarks.steps import read
from kvcompress import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.evaluation.memory import peak_of

COMPILING = 80  # seconds that generating code takes, at most


def decode(lab: Lab) -> None:
    """A decode step against `DynamicCache` and against `StaticCache` in a CUDA graph, of everything and of 20 %."""
    # Batch, tokens, and how much faster than StaticCache with everything prefixkv should be.
    cases: dict[str, list[tuple[int, int, float | None]]] = {
        "mha": [(16, 2048, 1.35), (1, 2048, None), (1, 16384, None)],
        "gqa": [(16, 8192, 1.4), (1, 32768, 3.0)],
    }
    for kind, shapes in {"gqa": [(2, 60, None)]}.items() if lab.tiny else cases.items():
        model = lab.model("decode", kind)
        if model is None:
            continue
        for batch, tokens, faster in shapes:
            about = {"model": kind, "batch": batch, "tokens": tokens}
            lab.attempt("decode", about, partial(_decode_case, lab, about, model, batch, tokens, faster), 15)


def _decode_case(lab: Lab, about: About, model: PreTrainedModel, batch: int, tokens: int, faster: float | None) -> None:
    kvcompress.restore(model)
    others: dict[str, float] = {}
    graph = "graph" if lab.device.type == "cuda" else "eager, as there are no graphs here"
    for share, held in {"1 token": 1, "20 %": tokens // 5, "100 %": tokens}.items():
        cache: Cache = steps.fill(DynamicCache(config=model.config), model, batch, held)
        others[f"dynamic {share}"] = lab.milliseconds(steps.in_python(model, cache, batch))
        label = {**about, "cache": f"DynamicCache, {share}"}
        lab.row("decode", label, mode="eager", ms=others[f"dynamic {share}"])
        cache = steps.fill(StaticCache(config=model.config, max_cache_len=held + 64), model, batch, held)
        others[f"static {share}"] = lab.milliseconds(steps.static(model, cache, batch, held))
        label = {**about, "cache": f"StaticCache, {share}"}
        lab.row("decode", label, mode=graph, ms=others[f"static {share}"])
        del cache
    ours: dict[str, dict[str, Any]] = {"prefixkv": {"budget": BUDGET}, "full": {}}
    for name, fields in ours.items():
        cache = CompressedCache(model, name, **fields)
        read(model, cache, input_ids=lab.ids(batch, tokens))
        label = {**about, "cache": name}
        found = lab.decoding("decode", label, model, cache, batch)
        said = cache.report()
        reading = 1000 * said.retention * said.full_kv_bytes / lab.bandwidth
        for mode, ms in found.items():
            floor = others["static 1 token" if mode == "captured" else "dynamic 1 token"]
            figures = {
                "over_floor_by_bytes": ((ms - floor) / reading, "at most 1.3"),
                "to_static_20": (ms / others["static 20 %"], "at most 1.05" if fields else None),
                "faster_than_static": (others["static 100 %"] / ms, _least(name, faster)),
                "faster_than_dynamic": (others["dynamic 100 %"] / ms, None),
            }
            for what, (figure, aim) in figures.items():
                lab.row("decode", {**label, "mode": mode}, **{what: figure}, aim=aim if mode == "captured" else None)
        del cache


def _least(name: str, faster: float | None) -> str | None:
    if name == "full":
        return "at least 2.5" if faster == 3.0 else None
    return None if faster is None else f"at least {faster}"


def generate(lab: Lab) -> None:
    """Tokens per second of `generate`, prompt included: PrefixKV's published setting in our shape."""
    model = lab.model("generate", "mha")
    if model is None:
        return
    caches: dict[str, Make] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "prefixkv, captured": partial(CompressedCache, model, "prefixkv", budget=BUDGET),
        "prefixkv, eager": partial(CompressedCache, model, "prefixkv", budget=BUDGET, decoding="eager"),
        "full, captured": partial(CompressedCache, model, "full"),
    }
    _generate_with(lab, "generate", model, caches, {"prefixkv, captured": "to_the_first at least 2"}, 25)


def _generate_with(
    lab: Lab, section: str, model: PreTrainedModel, caches: dict[str, Make], aims: dict[str, str], seconds: float
) -> None:
    """The better of two runs of each; None stands for the static cache that `generate` makes and compiles."""
    batch, tokens, new = (2, 40, 34) if lab.tiny else (16, 2048, 128)
    ids, first = lab.ids(batch, tokens), 0.0
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}

    def once(whole: steps.Step, times: list[float]) -> None:
        times.append(steps.seconds(whole, lab.device))

    def run(name: str, make: Make) -> None:
        nonlocal first
        times: list[float] = []
        for _ in range(1 if lab.tiny else 2):
            cache = make()
            how = {"cache_implementation": "static"} if cache is None else cache_argument(cache)
            answer: Any = model.generate  # which the first compressed cache of a model puts its own before
            whole = partial(answer, ids, **given, **how)
            peak = peak_of(partial(once, whole, times), lab.device)
            ran = cache.report().decoding if isinstance(cache, CompressedCache) else None
            del cache, answer, whole, how
        least = min(times)
        first = first or least
        figures = {"tokens_per_s": batch * new / least, "to_the_first": first / least, "first_run_s": times[0]}
        label = {"batch": batch, "tokens": tokens, "new": new, "cache": name}
        lab.row(section, label, ran=ran, **figures, peak_gib=(peak or 0) / 2**30, aim=aims.get(name))

    for name, make in caches.items():
        lab.attempt(section, {"cache": name}, partial(run, name, make), seconds)


def quantized(lab: Lab) -> None:
    """A decode step from four and from eight bits, everything kept, against the same in bfloat16."""
    model = lab.model("quantized", "gqa")
    for batch, tokens in ((2, 150),) if lab.tiny else ((16, 8192), (1, 8192)):
        if model is not None:
            about = {"batch": batch, "tokens": tokens}
            lab.attempt("quantized", about, partial(_codes, lab, about, model, batch, tokens), 20)


def _codes(lab: Lab, about: About, model: PreTrainedModel, batch: int, tokens: int) -> None:
    base: dict[str, float] = {}
    for name, quantizer in {"bfloat16": None, "4 bits": "quanto4", "8 bits": "quanto8"}.items():
        cache = CompressedCache(model, "full", quantizer=quantizer)
        read(model, cache, input_ids=lab.ids(batch, tokens))
        label = {**about, "cache": name}
        found = lab.decoding("quantized", label, model, cache, batch)
        said = cache.report()
        lab.row("quantized", label, bytes_ratio=said.kv_bytes / said.full_kv_bytes)
        for mode in found.keys() & base.keys():
            aim = f"at most {0.8 if batch == 16 and name == '4 bits' else 1.0}"
            lab.row("quantized", {**label, "mode": mode}, ratio=found[mode] / base[mode], aim=aim)
        base = base or found
        del cache


def heads(lab: Lab) -> None:
    """A decode step where heads hold tokens of their own, alike or unlike many, against one choice for a layer."""
    model = lab.model("heads", "gqa")
    for batch, tokens in ((2, 400),) if lab.tiny else ((16, 8192), (1, 32768)):
        if model is not None:
            about = {"batch": batch, "tokens": tokens}
            lab.attempt("heads", about, partial(_by_head, lab, about, model, batch, tokens), 25)


def _by_head(lab: Lab, about: About, model: PreTrainedModel, batch: int, tokens: int) -> None:
    base: dict[str, float] = {}
    text = model.config.get_text_config(decoder=True)
    shares = [share * BUDGET for share in (20 / 11, 2 / 11)] * (text.num_hidden_layers * text.num_key_value_heads // 2)
    own = {"name": "topk", "granularity": "head", "decode": "oldest"}
    ten_to_one = {"name": "profile", "retention": shares, "heads": text.num_key_value_heads}
    caches: dict[str, dict[str, Any]] = {
        "heads alike": {},
        "tokens of their own": {"evictor": own},
        "sizes by scores": {"evictor": own, "allocator": "adakv"},
        "sizes 10 to 1": {"evictor": own, "allocator": ten_to_one},
    }
    for name, fields in caches.items():
        cache = CompressedCache(model, "snapkv", budget=BUDGET, **fields)
        read(model, cache, input_ids=lab.ids(batch, tokens))
        label, said = {**about, "cache": name}, cache.report()
        found = lab.decoding("heads", label, model, cache, batch)
        lab.row("heads", label, bytes_ratio=said.kv_bytes / said.full_kv_bytes)
        for mode in found.keys() & base.keys():
            aim = "at most 1.0" if mode == "captured" else None
            lab.row("heads", {**label, "mode": mode}, ratio=found[mode] / base[mode], aim=aim)
        base = base or found
        del cache


def compiled(lab: Lab) -> None:
    """Steps for which code is generated: a decode step, and `generate` with `StaticCache` and with ours."""
    model = lab.model("compiled", "mha")
    if model is None:
        return
    lab.attempt("compiled", {"cache": "prefixkv"}, partial(_compiled_step, lab, model), COMPILING)
    kvcompress.restore(model)
    caches: dict[str, Make] = {
        "StaticCache, compiled": lambda: None,
        "prefixkv, captured": partial(CompressedCache, model, "prefixkv", budget=BUDGET),
        "prefixkv, compiled": partial(CompressedCache, model, "prefixkv", budget=BUDGET, decoding="compiled"),
    }
    aims = dict.fromkeys(("prefixkv, captured", "prefixkv, compiled"), "to_the_first at least 1.15")
    _generate_with(lab, "compiled", model, caches, aims, COMPILING)


def _compiled_step(lab: Lab, model: PreTrainedModel) -> None:
    batch, tokens = (2, 60) if lab.tiny else (16, 2048)
    cache = CompressedCache(model, "prefixkv", budget=BUDGET, reserve=steps.TO_COME, decoding="compiled")
    step = steps.compiled(model, read(model, cache, input_ids=lab.ids(batch, tokens)), batch)
    waited = [steps.seconds(step, lab.device) for _ in range(3)]
    ms = lab.milliseconds(step)
    label = {"batch": batch, "tokens": tokens, "cache": "prefixkv", "mode": cache.report().decoding}
    lab.row("compiled", label, ms=ms, until_compiled_s=sum(waited))


SECTIONS: dict[str, Callable[[Lab], None]] = {
    "decode": decode,
    "generate": generate,
    "prefill": prefill,
    "llava": llava,
    "quantized": quantized,
    "heads": heads,
    "compiled": compiled,
}
Section = Enum("Section", {name: name for name in SECTIONS}, type=str)  # type: ignore[misc]


def main(
    section: Annotated[list[Section] | None, typer.Option(help="What to measure; repeatable; all if none.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON file.", dir_okay=False)] = Path("runs/gpu.json"),
    minutes: Annotated[float, typer.Option(help="After which nothing more is begun.")] = 4.7,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small models: a run through the code, on any device.")] = False,
) -> None:
    """Measures what caches cost on a GPU, section by section."""
    if not (torch.cuda.is_available() or tiny):
        typer.echo(
            f"gpu: needs a CUDA device, and torch {torch.__version__} finds none; --tiny runs through the code on the "
            "CPU, and `make bench` measures what a CPU can",
            err=True,
        )
        raise typer.Exit(2)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    output.parent.mkdir(parents=True, exist_ok=True)
    lab = Lab(torch.device("cuda" if torch.cuda.is_available() else "cpu"), tiny, output, minutes)
    with torch.no_grad():
        for name in [one.value for one in section or ()] or SECTIONS:
            start = time.monotonic()
            SECTIONS[name](lab)
            lab.row(name, {}, took_s=time.monotonic() - start)
    if lab.failures:
        typer.echo(f"{lab.failures} could not be measured: see the lines with error=", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
