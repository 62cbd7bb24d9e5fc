"""Logits, their softmax, and its log-sum-exp, by which attention over disjoint sets of keys can be joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """How a layer makes probabilities of products of queries and keys.

    Attributes:
        scaling: factor on the products, usually `head_dim ** -0.5`.
        softcap: what logits stay below; None for logits as they are.
        sinks: a logit of each head that the softmax runs over too, and that has no value; None if there is none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits that stay between minus and plus a cap (Gemma 2, arXiv 2408.00118, section 2); as they are without one."""
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, in place of the logits, and their log-sum-exp; 0 and minus infinity where every logit is that."""
    lse = logits.logsumexp(-1)
    return logits.sub_(lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp_(), lse


def merge_attention(
    output: Float[Tensor, "batch heads queries value_dim"],
    lse: Float[Tensor, "batch heads queries"],
    other_output: Float[Tensor, "batch heads queries value_dim"],
    other_lse: Float[Tensor, "batch heads queries"],
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Joins the attention of the same queries over two disjoint sets of keys (Online softmax, arXiv 1805.02867).

    Returns:
        Output and log-sum-exp as if one softmax had run over both sets; 0 and minus infinity if both are empty.
    """
    total = torch.logaddexp(lse, other_lse)
    finite = total.clamp(min=torch.finfo(total.dtype).min)  # minus infinity from itself is no number
    weight, other_weight = (lse - finite).exp().unsqueeze(-1), (other_lse - finite).exp().unsqueeze(-1)
    return (output * weight + other_output * other_weight).to(output.dtype), total


def with_sinks(
    output: Float[Tensor, "batch heads queries value_dim"],
    lse: Float[Tensor, "batch heads queries"],
    sinks: Float[Tensor, " heads"] | None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention of which a learned logit of each head takes its share and gives nothing (GPT-OSS's attention sinks).

    Returns:
        Output and log-sum-exp with the sinks among the logits; as they are without sinks.
    """
    if sinks is None:
        return output, lse
    logit = sinks.to(lse)[:, None]
    output = (output * (lse - logit).sigmoid().unsqueeze(-1)).to(output.dtype)
    return output, torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, logit))  # what sees nothing still does not
