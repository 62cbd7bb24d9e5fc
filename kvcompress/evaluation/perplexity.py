"""How well a model with a compressed cache foretells text: perplexity of a continuation, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvcompress.cache.argument import cache_argument


def english_text() -> str:
    """About 113,000 tokens of English that every Python carries: its own manual."""
    return "\n".join(topics[name] for name in sorted(topics))


def samples_of(
    tokenizer: PreTrainedTokenizerBase, text: str, samples: int, tokens: int
) -> Int[Tensor, "samples tokens"]:
    """Pieces of a text, spread evenly over it.

    Raises:
        ValueError: if the text is too short for so many pieces that do not overlap.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    apart = len(ids) // samples
    if apart < tokens:
        raise ValueError(f"text: {len(ids)} tokens are too few for {samples} samples of {tokens}; ask for less")
    return torch.stack([ids[start : start + tokens] for start in range(0, samples * apart, apart)])


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    ids: Int[Tensor, "batch tokens"],
    prompt: int,
) -> Float[Tensor, "batch new"]:
    """How badly each token after a prompt is foretold, each fed on its own, so that decode rules are at work.

    Args:
        model: a causal language model.
        make_cache: makes the cache; one for all rows.
        ids: prompts and continuations, without padding.
        prompt: tokens of the prompt, which is read in one forward and compressed.

    Returns:
        Negative log-likelihood of every token of the continuations, in nats, float32.
    """
    cache, losses = make_cache(), []
    logits = model(ids[:, :prompt], **cache_argument(cache), logits_to_keep=1).logits
    for position in range(prompt, ids.shape[1]):
        losses.append(F.cross_entropy(logits[:, -1].float(), ids[:, position], reduction="none"))
        if position + 1 < ids.shape[1]:
            logits = model(ids[:, position : position + 1], **cache_argument(cache)).logits
    return torch.stack(losses, 1)


def continuation_perplexity(
    model: PreTrainedModel, make_cache: Callable[[], Cache], ids: Int[Tensor, "batch tokens"], prompt: int
) -> float:
    """Perplexity of what follows a prompt: exp of the mean of `continuation_losses`, in nats per token."""
    return math.exp(float(continuation_losses(model, make_cache, ids, prompt).mean()))
