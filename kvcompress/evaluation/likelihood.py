"""How likely a reference answer is with a compressed cache, and what reading it took."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.evaluation.generation import make_cache, report_of, seeded
from kvcompress.evaluation.models import LoadedModel


@dataclass(frozen=True)
class Reading:
    """What reading an answer gave.

    Attributes:
        nll: negative log-likelihood of the answer's tokens together, in nats.
        tokens: of the answer.
        seconds_to_first_token: prefill, compression and the first token's likelihood.
        tokens_per_second: speed of the tokens after the first; None where there is none.
        report: what the cache held at the end.
    """

    nll: float
    tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    report: CacheReport


@torch.inference_mode()
def read_answer(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    answer: Int[Tensor, "1 tokens"],
    config: CompressionConfig | None,
    *,
    seed: int = 0,
    cache: Cache | None = None,
) -> Reading:
    """Reads a prompt in one forward, compresses, and is then fed the answer token by token.

    Decode rules are at work as they are while generating, and every token is foretold from what the cache holds then.

    Source: PrefixKV (arXiv 2412.03409), the perplexity of section 4.1.

    Args:
        loaded: the model.
        inputs: of one prompt, as `encode_sample` gives it.
        answer: what follows, at least one token.
        config: how the cache is compressed; None for transformers' own.
        seed: of what policies draw.
        cache: one that may have read the beginning of the inputs, and is written to; a new one if None.
    """
    model = loaded.model
    cache = make_cache(loaded, config) if cache is None else cache
    if read := cache.get_seq_length():
        inputs = {"input_ids": inputs["input_ids"][:, read:]}
    count = answer.shape[1]
    with seeded(seed, model.device):
        start = _now(model.device)
        logits = model(**inputs, **cache_argument(cache), logits_to_keep=1).logits
        losses = [_loss(logits, answer[:, :1])]
        first = _now(model.device)
        for position in range(1, count):
            logits = model(input_ids=answer[:, position - 1 : position], **cache_argument(cache)).logits
            losses.append(_loss(logits, answer[:, position : position + 1]))
        end = _now(model.device)
    speed = (count - 1) / (end - first) if count > 1 else None
    return Reading(float(torch.stack(losses).double().sum()), count, first - start, speed, report_of(cache))


@torch.inference_mode()
def read_continuations(
    model: PreTrainedModel, context: list[int], continuations: list[list[int]], config: CompressionConfig
) -> list[tuple[float, bool]]:
    """How likely each of several continuations of one context is, and whether greedy decoding would give it.

    The context is read and compressed once; then every continuation is fed token by token, as while generating.

    Args:
        model: the model.
        context: ids, at least one.
        continuations: ids of each, at least one.
        config: how the cache is compressed.

    Returns:
        For each the sum of its tokens' log-likelihoods, in nats, and whether every token was the likeliest.
    """
    cache, rows = CompressedCache(model, config), len(continuations)
    logits = model(torch.tensor([context], device=model.device), **cache_argument(cache), logits_to_keep=1).logits
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    longest = max(map(len, continuations))
    padded = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in continuations]
    wanted = torch.tensor(padded, device=model.device)
    counted = torch.tensor([[place < len(ids) for place in range(longest)] for ids in continuations])
    steps = [logits[:, -1].expand(rows, -1)]
    for place in range(longest - 1):
        steps.append(model(wanted[:, place : place + 1], **cache_argument(cache)).logits[:, -1])
    likelihoods = torch.stack(steps, 1).float().log_softmax(-1)
    counted = counted.to(likelihoods.device)
    found = likelihoods.gather(2, wanted.unsqueeze(-1)).squeeze(-1).double().masked_fill(~counted, 0.0).sum(1)
    greedy = ((likelihoods.argmax(-1) == wanted) | ~counted).all(1)
    return list(zip(found.tolist(), greedy.tolist(), strict=True))


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, -1].float(), wanted[:, 0])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
