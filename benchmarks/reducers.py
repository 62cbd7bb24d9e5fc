"""What a reducer saves of prefill: `python -m benchmarks.reducers`.

The decoder has the architecture of a LLaVA of 24 layers with random weights, which cost as much time as trained ones. A
prompt has 576 image tokens, whose features are made before the clock starts, and 64 text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.machine import about_line, console
from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.reduction import Reduction
from kvcompress.evaluation.timing import in_turns, ratios
from kvcompress.policies.registry import REDUCERS

IMAGE_TOKENS, TEXT_TOKENS = 576, 64
_IMAGE_TOKEN = 999


def build_model(layers: int = 24, hidden: int = 1024) -> PreTrainedModel:
    """A LLaVA-1.5 with a small vision tower, whose grid is 24 x 24."""
    text = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE_TOKEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.LlavaForConditionalGeneration(config)
    model.train(False)
    return model


class Prefill:
    """One prompt of an image and text, read with any reducer."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Makes the features of the image."""
        source = torch.Generator().manual_seed(0)
        text = torch.randint(1, _IMAGE_TOKEN, (1, TEXT_TOKENS), generator=source)
        half = TEXT_TOKENS // 2
        image = torch.full((1, IMAGE_TOKENS), _IMAGE_TOKEN)
        pixels = torch.randn(1, 3, 336, 336, generator=source)
        self.model = model
        self.ids = torch.cat([text[:, :half], image, text[:, half:]], dim=1)
        with torch.inference_mode():
            self.features = model.model.get_image_features(pixels, return_dict=True)

    @torch.inference_mode()
    def read(self, reducer: str | None) -> CompressedCache:
        """Prefill with a new cache that keeps everything it gets."""
        cache = CompressedCache(self.model, "full", reducer=reducer)
        encoded = {"image": self.features}
        self.model(self.ids, **cache_argument(cache), mm_encoder_outputs=encoded, logits_to_keep=1)
        return cache

    def seconds(self, reducer: str | None) -> float:
        """Time of it."""
        start = time.perf_counter()
        self.read(reducer)
        return time.perf_counter() - start

    def flops(self, reducer: str | None) -> int:
        """Floating-point operations: those that torch counts, and those of causal attention, which it does not."""
        with FlopCounterMode(display=False) as counted:
            cache = self.read(reducer)
        text = self.model.config.get_text_config()
        pairs = sum(rows[0] * (rows[0] + 1) // 2 for rows in cache.report().layer_tokens)
        return int(counted.get_total_flops()) + 4 * pairs * int(text.hidden_size)

    def overhead(self, reducer: str) -> float:
        """Share of its time that goes into guidance, merging and moving what is left."""
        with _clocked(Reduction, ("observe", "reduce", "of_the_tokens", "spread")) as spent:
            whole = self.seconds(reducer)
        return sum(spent) / whole


@contextmanager
def _clocked(owner: type, names: tuple[str, ...]) -> Iterator[list[float]]:
    """Notes the seconds of every call of some methods."""
    spent: list[float] = []
    before = {name: getattr(owner, name) for name in names}

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return run

    try:
        for name, method in before.items():
            setattr(owner, name, clocked(method))
        yield spent
    finally:
        for name, method in before.items():
            setattr(owner, name, method)


def measured(prefill: Prefill, rounds: int) -> Table:
    """Bytes, operations and time of prefill with every reducer that needs no vision tower, against none."""
    names = [name for name in REDUCERS.names() if not REDUCERS.get(name).reads_tower]  # features are made beforehand
    whole = prefill.read(None).report()
    text_bytes = whole.kv_bytes * TEXT_TOKENS // (IMAGE_TOKENS + TEXT_TOKENS)
    times = ratios(in_turns({str(name): partial(prefill.seconds, name) for name in (None, *names)}, rounds), "None")
    flops, layers = prefill.flops(None), len(whole.layer_lengths)
    found = Table(
        *("reducer", "image tokens in layers", "KV bytes of the image", "FLOPs", "time", "of it the reducer's own"),
        title=f"Prefill of {IMAGE_TOKENS} image and {TEXT_TOKENS} text tokens, {layers} layers, against no reducer",
        title_justify="left",
    )
    for name in names:
        report = prefill.read(name).report()
        steps = dict.fromkeys(rows[0] for rows in report.image_tokens)
        image_bytes = (report.kv_bytes - text_bytes) / (whole.kv_bytes - text_bytes)
        own = sorted(prefill.overhead(name) for _ in range(3))[1]
        found.add_row(
            name,
            ", ".join(map(str, steps)),
            f"{image_bytes:.3f}x",
            f"{prefill.flops(name) / flops:.3f}x",
            f"{times[name]:.2f}x",
            f"{own:.1%}",
        )
    return found


def main(rounds: Annotated[int, typer.Option(help="Paired rounds; medians are printed.")] = 7) -> None:
    """Prints bytes, operations and time of prefill with every reducer, against none."""
    printer = console()
    printer.print(about_line())
    printer.print(measured(Prefill(build_model()), rounds))


if __name__ == "__main__":
    typer.run(main)
