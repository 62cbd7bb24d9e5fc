"""Figures of docs/benchmarks.md on SmolLM2, paired in one process: `python -m benchmarks.smollm2`.

Every figure is a ratio of runs that take turns, and the median of those ratios, since a busy machine changes its mind
about what a second is.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, QuantizedCache

from benchmarks.machine import about_line, console
from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.config.composition import policies_of
from kvcompress.config.presets import PRESETS
from kvcompress.config.profile import LayerProfile
from kvcompress.evaluation.calibration import prompt_retention
from kvcompress.evaluation.memory import peak_of
from kvcompress.evaluation.models import load_model
from kvcompress.evaluation.perplexity import continuation_perplexity, english_text, samples_of
from kvcompress.evaluation.timing import in_turns, ratios, timed
from kvcompress.kernels import attention_with_mask
from kvcompress.policies.context import LayerContext, LayerWeights
from kvcompress.policies.registry import ALLOCATORS

BUDGETS = (0.5, 0.2, 0.1)
PROFILED: dict[str, dict[str, Any]] = {
    "keys alone (key_norm)": {"scorer": "key_norm"},
    "keys alone (key_diff)": {"scorer": "key_diff"},
    "last 32 queries (attention)": {"scorer": {"name": "attention", "queries": "window:32"}},
    "last 32 queries (snapkv)": {"scorer": "snapkv"},
    "no scores (streaming)": {"scorer": None, "evictor": "streaming"},
}
QUANTIZED = ("quanto8", "fp8", "quanto4", "quanto2", "k8v4", "rotated")
QUERIES = {"exact": "all", "stride:4": "stride:4", "window:32": "window:32"}


class Bench:
    """SmolLM2 in bfloat16, a long prompt, and the caches to compare."""

    def __init__(self, tokens: int) -> None:
        """Loads the model and reads `tokens` tokens of English text."""
        loaded = load_model("smollm2", dtype="bfloat16")
        self.loaded, self.model = loaded, loaded.model
        self.tokenizer = loaded.tokenizer
        self.ids: Tensor = loaded.tokenizer(english_text(), return_tensors="pt").input_ids[:, :tokens]

    def dynamic(self) -> Cache:
        """Transformers' default cache."""
        return DynamicCache(config=self.model.config)

    def compressed(self, queries: str, budget: float = 0.2) -> CompressedCache:
        """PrefixKV with attention summed over some queries."""
        scorer = {"name": "attention", "queries": queries}
        return CompressedCache(self.model, "prefixkv", budget=budget, scorer=scorer)

    @functools.cached_property
    def profile(self) -> LayerProfile:
        """Layer sizes of PrefixKV for the start of the prompt."""
        inputs = {"input_ids": self.ids[:, :1000]}
        shares = prompt_retention(self.loaded, CompressionConfig.preset("prefixkv"), inputs, BUDGETS)
        return LayerProfile(budgets=sorted(BUDGETS), retention=shares.flip(0).tolist())

    def profiled(self, fields: dict[str, Any]) -> CompressedCache:
        """PrefixKV's layer sizes from a profile, its tokens by some other scorer."""
        return CompressedCache(self.model, "prefixkv", budget=0.2, profile=self.profile, **fields)

    @torch.inference_mode()
    def run(self, cache: Cache, ids: Tensor) -> float:
        """Seconds of one forward, as in `generate`: logits for the last token alone."""
        start = time.perf_counter()
        self.model(ids, **cache_argument(cache), logits_to_keep=1)
        return time.perf_counter() - start

    def run_new(self, make: Callable[[], Cache]) -> float:
        """Seconds of the whole prompt with a new cache."""
        return self.run(make(), self.ids)

    def quantized(self, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
        """Decoding from four bits against transformers' cache of the same bits, and bytes held against all of them."""
        cut = {name: CompressedCache(self.model, "full", quantizer=name) for name in QUANTIZED}
        theirs = QuantizedCache("quanto", self.model.config, nbits=4, q_group_size=64, residual_length=128)
        caches: dict[str, Cache] = {"transformers' QuantizedCache, 4 bits": theirs, **cut}
        for cache in caches.values():
            self.run(cache, self.ids)
        held = {name: cache.report().kv_bytes / cache.report().full_kv_bytes for name, cache in cut.items()}
        one = self.ids[:, :1]
        times = in_turns({name: partial(self.run, cache, one) for name, cache in caches.items()}, rounds, warm_up=5)
        return ratios(times, next(iter(caches))), held

    def prefill(self, rounds: int) -> dict[str, float]:
        """Time of a whole prompt, as a ratio to `DynamicCache`."""
        makers: dict[str, Callable[[], Cache]] = {
            "DynamicCache": self.dynamic,
            "no scores (preset full)": partial(CompressedCache, self.model, "full"),
            **{f"scores {name}": partial(self.compressed, queries) for name, queries in QUERIES.items()},
            **{f"profile, {name}": partial(self.profiled, fields) for name, fields in PROFILED.items()},
        }
        times = in_turns({name: partial(self.run_new, make) for name, make in makers.items()}, rounds)
        return ratios(times, "DynamicCache")

    def decode(self, rounds: int) -> tuple[dict[str, float], float]:
        """Time of one decoded token as a ratio to a cache of one token (weights alone), and that one's seconds."""
        fifth = self.ids[:, : self.ids.shape[1] // 5]
        caches = {
            "DynamicCache, everything": (self.dynamic(), self.ids),
            "DynamicCache, cut to 20 %": (self.dynamic(), fifth),
            "kvcompress, everything": (CompressedCache(self.model, "full"), self.ids),
            "kvcompress prefixkv, 20 %": (self.compressed("all"), self.ids),
        }
        for cache, ids in caches.values():
            self.run(cache, ids)
        one = self.ids[:, :1]

        def floor() -> float:
            cache = self.dynamic()
            self.run(cache, one)
            return self.run(cache, one)

        steps: dict[str, Callable[[], float]] = {"DynamicCache, one token": floor}
        steps |= {name: partial(self.run, cache, one) for name, (cache, _) in caches.items()}
        times = in_turns(steps, rounds, warm_up=5)
        return ratios(times, "DynamicCache, one token"), statistics.median(times["DynamicCache, one token"])

    def kept(self) -> dict[str, float]:
        """Share of the exactly scored choice that cheaper scores choose too, and bytes held against the budget."""
        caches = {name: self.compressed(queries) for name, queries in QUERIES.items()}
        for cache in caches.values():
            self.run(cache, self.ids)
        reports = {name: cache.report() for name, cache in caches.items()}
        exact, found = reports["exact"], {}
        layers = range(len(exact.layer_lengths))
        for name in list(QUERIES)[1:]:
            same = [len({*exact.positions(n, 0)} & {*reports[name].positions(n, 0)}) for n in layers]
            found[f"kept by {name} too"] = sum(same) / sum(map(sum, exact.layer_lengths))
        found["bytes held / (20 % of all bytes)"] = exact.kv_bytes / (0.2 * exact.full_kv_bytes)
        found["index bytes / bytes held"] = exact.index_bytes / exact.kv_bytes
        return found


def allocation_seconds(tokens: int = 131_072, layers: int = 80) -> dict[str, float]:
    """Time of the prefix allocator on a long context, and how it grows when the context doubles."""
    seconds = {}
    for length in (tokens // 2, tokens):
        mass = torch.rand(layers, 1, length, generator=torch.Generator().manual_seed(0)) ** 8
        capacity = torch.full((layers, 1), length)
        total, floor = capacity.sum(0) // 5, torch.full_like(capacity, 2)
        runs = in_turns({"run": partial(timed, ALLOCATORS.create("prefix").allocate, mass, total, floor, capacity)}, 3)
        seconds[length] = statistics.median(runs["run"])
    return {"seconds": seconds[tokens], "when tokens double": seconds[tokens] / seconds[tokens // 2]}


def scorer_costs(rounds: int, tokens: int = 4000) -> dict[str, float]:
    """Time of one scorer step as a share of its layer's attention, in SmolLM2's shape."""
    g = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, heads, tokens, 64, generator=g).bfloat16() for heads in (9, 3, 3))
    _, lse = attention_with_mask(query, keys, values, 0.125, None)
    weights = LayerWeights(torch.randn(576, 576, generator=g).bfloat16(), 10000.0 ** (-torch.arange(32) / 32))
    index = torch.arange(tokens, dtype=torch.int32).view(1, 1, tokens)
    seen = torch.tensor([tokens], dtype=torch.int64)
    context = LayerContext(0, query, keys, values, lse, 0.125, index, seen, weights=weights)
    runs: dict[str, Callable[[], float]] = {
        "attention": partial(timed, attention_with_mask, query, keys, values, 0.125, None)
    }
    for label, scorer in policies_of("scorer"):
        runs[f"{label} "] = partial(timed, scorer.score, context)  # type: ignore[attr-defined]
    return dict(list(ratios(in_turns(runs, rounds), "attention").items())[1:])


def peak_bytes(case: str, tokens: int) -> int:
    """Memory that the prefill of a fresh process takes on top of the loaded model (Linux).

    The allocator gives back what is freed: what it would keep for later differs by a half from run to run.
    """
    command = [sys.executable, "-m", "benchmarks.smollm2", "--peak", case, "--tokens", str(tokens)]
    kept = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **kept}).stdout
    return int(json.loads(said.splitlines()[-1]))


def own_peak_bytes(case: str, tokens: int) -> int:
    """The same for this process."""
    bench = Bench(tokens)
    CompressedCache(bench.model, "full")
    bench.run(bench.dynamic(), bench.ids[:, :64])
    cache = bench.dynamic() if case == "DynamicCache" else bench.compressed(QUERIES[case])
    return peak_of(partial(bench.run, cache, bench.ids), torch.device("cpu")) or 0


def table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns under a title."""
    found = Table("", "measured", title=title, title_justify="left")
    for row in rows:
        found.add_row(*row)
    return found


def preset_table(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int = 4, prompt: int = 1536, new: int = 96
) -> Table:
    """Perplexity of continuations for every preset and retention."""
    ids = samples_of(tokenizer, english_text(), samples, prompt + new)
    full = continuation_perplexity(model, partial(DynamicCache, config=model.config), ids, prompt)
    found = Table(title=f"Perplexity of {new} tokens after {prompt}; DynamicCache: {full:.2f}", title_justify="left")
    for column in ("preset", *(f"retention {budget}" for budget in BUDGETS)):
        found.add_column(column)
    for name in PRESETS:
        budgets = [None] if CompressionConfig.preset(name).budget.keeps_everything else BUDGETS
        configs = [CompressionConfig.preset(name, **({"budget": b} if b else {})) for b in budgets]
        makers = [partial(CompressedCache, model, config) for config in configs]
        found.add_row(
            name, *(f"{continuation_perplexity(model, make, ids, prompt):.2f}" for make in track(makers, name))
        )
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4000,
    rounds: Annotated[int, typer.Option(help="Paired rounds of prefill; decoding takes ten times as many.")] = 5,
    quality: Annotated[bool, typer.Option(help="Perplexity of every preset too (20 minutes).")] = True,
    peak: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures decoding, prefill, memory and allocation on SmolLM2-135M in bfloat16."""
    if peak is not None:
        print(own_peak_bytes(peak, tokens))
        return
    printer, bench = console(), Bench(tokens)
    printer.print(f"SmolLM2-135M, bfloat16, {tokens} tokens; {about_line()}")
    decode, floor = bench.decode(10 * rounds)
    own, full = decode["kvcompress prefixkv, 20 %"], decode["kvcompress, everything"]
    gone = (decode["DynamicCache, everything"] - own) / (decode["DynamicCache, everything"] - 1)
    against = {
        "prefixkv at 20 % faster than DynamicCache with everything": decode["DynamicCache, everything"] / own,
        "prefixkv at 20 % faster than DynamicCache cut to 20 %": decode["DynamicCache, cut to 20 %"] / own,
        "kvcompress with everything faster than DynamicCache": decode["DynamicCache, everything"] / full,
    }
    rows = [(name, f"{ratio:.2f}x the floor") for name, ratio in decode.items()]
    rows.insert(0, ("share of DynamicCache's time above the floor that is gone with prefixkv at 20 %", f"{gone:.0%}"))
    rows += [(name, f"{ratio:.2f}x") for name, ratio in against.items()]
    printer.print(table(f"Decoding one token (floor: {1000 * floor:.1f} ms)", rows))
    printer.print(table("Prefill", [(n, f"{r:.2f}x DynamicCache") for n, r in bench.prefill(rounds).items()]))
    printer.print(table("What is kept at 20 %", [(name, f"{share:.3f}") for name, share in bench.kept().items()]))
    if sys.platform == "linux":
        base = peak_bytes("DynamicCache", tokens)
        peaks = [(f"scores {case}", f"{peak_bytes(case, tokens) / base:.2f}x DynamicCache") for case in QUERIES]
        printer.print(
            table(f"Peak memory of prefill (DynamicCache: {base / 2**20:.0f} MiB on top of the model)", peaks)
        )
    allocation = allocation_seconds()
    rows = [
        ("seconds", f"{allocation['seconds']:.2f}"),
        ("when tokens double", f"{allocation['when tokens double']:.2f}x"),
    ]
    printer.print(table("Prefix allocation, 80 layers x 131,072 tokens", rows))
    costs = scorer_costs(2 * rounds)
    printer.print(table("One scorer step", [(n, f"{r:.2f}x the layer's attention") for n, r in costs.items()]))
    speed, held = bench.quantized(2 * rounds)
    rows = [(name, f"{1 / ratio:.2f}x as fast") for name, ratio in speed.items()]
    rows += [(f"bytes of {name} / bfloat16", f"{share:.3f}") for name, share in held.items()]
    printer.print(table("Decoding from quantized storage", rows))
    if quality:
        printer.print(preset_table(bench.model, bench.tokenizer))


if __name__ == "__main__":
    typer.run(main)
