"""What decode rules cost over long answers, in perplexity and repetition: `python -m benchmarks.long_answers`.

Pieces of Python's manual: a prompt is read and compressed, and what follows it is fed token by token (perplexity, of
the first and of the last quarter too), or as many tokens are generated greedily (how often four words come again). All
pieces are one batch, so that a step costs hardly more than for one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from benchmarks.machine import about_line
from kvcompress import CompressedCache, CompressionConfig
from kvcompress.cache.argument import cache_argument
from kvcompress.evaluation.bootstrap import ratio_interval
from kvcompress.evaluation.metrics import distinct
from kvcompress.evaluation.models import LoadedModel, load_model
from kvcompress.evaluation.perplexity import continuation_losses, english_text, samples_of
from kvcompress.files import write_text

RULES = ("fixed_point", "oldest", "lowest_score", "every", "rkv")
Row = dict[str, Any]


def config_of(rule: str, budget: int) -> CompressionConfig:
    """TOVA's scores with a decode rule, and so many tokens a layer from the prompt to the end.

    "every" is the evictor of that name, and "rkv" the preset, which is made for it. They cut layers to two thirds of so
    many tokens, and let them grow by the other third in between.
    """
    config = CompressionConfig.preset("rkv" if rule == "rkv" else "tova")
    sink, recent = (config.budget.sink, config.budget.recent) if rule == "rkv" else (4, 32)
    if rule not in ("every", "rkv"):
        return config.override(
            budget={"tokens": budget, "sink": sink, "recent": recent}, evictor={"name": "topk", "decode": rule}
        )
    period = max(1, budget // 3)
    evictor = {"name": "every", "period": period, "granularity": "head" if rule == "rkv" else "layer"}
    tokens = budget - period
    return config.override(budget={"tokens": tokens, "sink": sink, "recent": min(recent, tokens // 2)}, evictor=evictor)


@torch.inference_mode()
def generated(loaded: LoadedModel, cache: Cache, ids: Int[Tensor, "batch prompt"], new: int) -> list[str]:
    """So many tokens of each row, greedily, whether the model would end or not."""
    output = loaded.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        max_length=None,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
    )
    return [str(text) for text in loaded.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]


def measured(loaded: LoadedModel, make: Callable[[], Cache], ids: Int[Tensor, "batch tokens"], prompt: int) -> Row:
    """Losses and repetition of one cache, for every piece."""
    losses: Float[Tensor, "batch new"] = continuation_losses(loaded.model, make, ids, prompt)
    new = ids.shape[1] - prompt
    texts = generated(loaded, make(), ids[:, :prompt], new)
    parts = {"all": losses, "first": losses[:, : new // 4], "last": losses[:, -(new // 4) :]}
    found: Row = {name: part.double().mean(1).tolist() for name, part in parts.items()}
    return {**found, "distinct": [distinct(text, "", "") for text in texts], "texts": texts}


def shown(values: list[float], *, share: bool = False) -> str:
    """A mean over the pieces with its bounds: a share in percent, or a perplexity from nats."""
    figures = ratio_interval(values, [1] * len(values), seed=0)
    value, low, high = (100 * figure if share else math.exp(figure) for figure in figures)
    return f"{value:.0f} ({low:.0f}-{high:.0f})" if share else f"{value:.1f} ({low:.1f}-{high:.1f})"


def main(
    prompt: Annotated[int, typer.Option(help="Tokens that are read at once.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens that follow, and that are generated.")] = 1000,
    samples: Annotated[int, typer.Option(help="Pieces of the manual, spread evenly over it.")] = 4,
    budget: Annotated[list[int] | None, typer.Option(help="Tokens a layer; repeatable. 128 if left out.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Decode rules; repeatable. All if left out.")] = None,
    model: Annotated[str, typer.Option(help="A text model, as for kvcompress evaluate.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="A .json for every piece.")] = None,
) -> None:
    """Prints a row for each rule and budget as it comes, after the full cache's."""
    loaded = load_model(model, dtype=dtype)
    ids = samples_of(loaded.tokenizer, english_text(), samples, prompt + new).to(loaded.model.device)
    caches: dict[str, Callable[[], Cache]] = {"full cache": partial(DynamicCache, config=loaded.model.config)}
    for amount in budget or [128]:
        for name in rule or RULES:
            caches[f"`{name}`, {amount}"] = partial(CompressedCache, loaded.model, config_of(name, amount))
    print(f"{model} in {dtype}, {samples} pieces of {prompt} + {new} tokens; {about_line(loaded.model.device)}\n")
    print("| rule, tokens a layer | perplexity | of the first quarter | of the last | distinct runs of four words, % |")
    print("|---|---|---|---|---|", flush=True)
    rows: dict[str, Row] = {}
    for name, make in caches.items():
        row = rows[name] = measured(loaded, make, ids, prompt)
        cells = [shown(row[part]) for part in ("all", "first", "last")]
        print(f"| {name} | {' | '.join(cells)} | {shown(row['distinct'], share=True)} |", flush=True)
        if output is not None:
            write_text(output, json.dumps(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
