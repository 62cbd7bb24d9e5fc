"""From samples to a profile: how much each layer keeps at every budget, from one prefill a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvcompress import __version__
from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.config import CompressionConfig
from kvcompress.config.profile import LayerProfile
from kvcompress.errors import BudgetWarning, ConfigError, KVCompressError
from kvcompress.evaluation.data import Sample, data_hash, encode_sample
from kvcompress.evaluation.distributed import Processes
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.repetition import check_read_once
from kvcompress.integrations import adapter_for
from kvcompress.policies.fingerprint import fingerprint_of
from kvcompress.progress import progress_bar

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def calibrate(
    loaded: LoadedModel,
    config: CompressionConfig,
    samples: Sequence[Sample],
    *,
    budgets: Sequence[float] = BUDGETS,
    data: str = "",
    on_sample: Callable[[int], None] | None = None,
    progress: bool = False,
    processes: Processes | None = None,
) -> LayerProfile:
    """Estimates the retention per layer for several budgets.

    Source: PrefixKV (arXiv 2412.03409, section 3), which does so with ten samples; here for any allocator and scorer.

    Args:
        loaded: the model.
        config: the policies whose layer sizes are estimated; of its budget, sinks and recents count.
        samples: their prompts are read, each in one prefill; answers are not.
        budgets: fractions of the tokens, each above 0 and at most 1.
        data: what the samples were taken from, for the reader of the profile.
        on_sample: is told the number of samples done.
        progress: whether a bar on stderr shows how far it is, in the first process alone.
        processes: those that share the samples; None for what `accelerate launch` started. All get the same profile.

    Raises:
        ConfigError: if there are no samples or budgets, a budget is no fraction, a sample cannot be read, or the
            configuration does not size layers (it keeps everything, or shrinks prompts between layers).
    """
    if not samples:
        raise ConfigError("samples: there are none; calibration needs at least one")
    budgets = check_budgets(budgets)
    check_config(config)
    processes = processes or Processes.current()
    with progress_bar(progress and processes.first, "prompts read", len(samples)) as tell:

        def done(number: int) -> None:
            tell(number)
            if on_sample is not None:
                on_sample(number)

        found = retentions(loaded, config, samples, budgets, done, processes)
    adapter = adapter_for(loaded.model)
    decoder = adapter.decoder(loaded.model)
    return LayerProfile(
        budgets=budgets,
        retention=found.mean(0).tolist(),
        heads=found.shape[2] // len(adapter.compressed_layers(loaded.model)),
        spread=found.std(0, correction=min(1, len(samples) - 1)).tolist(),
        samples=len(samples),
        model=fingerprint_of(decoder),
        config=config,
        data=data,
        data_hash=data_hash(samples),
        version=__version__,
    )


def retentions(
    loaded: LoadedModel,
    config: CompressionConfig,
    samples: Sequence[Sample],
    budgets: Sequence[float],
    on_sample: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Float[Tensor, "samples budgets layers"]:
    """Share of its tokens that each layer keeps of each sample's prompt at each budget, float64.

    Where sinks and recents are more than a budget, one warning says of how many samples and the first reason.
    """
    processes = Processes() if processes is None else processes
    mine = []
    for turn, sample in enumerate(processes.mine(samples), 1):
        mine.append(_sample_retention(loaded, config, sample, budgets))
        if on_sample is not None:
            on_sample(min(turn * processes.count, len(samples)))
    found = processes.gather(mine)  # errors too, so that no process waits for one that stopped
    done = []
    for sample, one in zip(samples, found, strict=True):
        if isinstance(one, KVCompressError):
            raise ConfigError(f"sample '{sample.name}': {one}") from one
        done.append(one)
    floors = [reason for _, reason in done if reason]
    if floors:
        warnings.warn(f"in {len(floors)} of {len(samples)} samples {floors[0]}", BudgetWarning, stacklevel=2)
    return torch.stack([shares for shares, _ in done])


def _sample_retention(
    loaded: LoadedModel, config: CompressionConfig, sample: Sample, budgets: Sequence[float]
) -> tuple[Tensor, str] | KVCompressError:
    """Retention of a sample, and the first warning about its floors; or what is wrong with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BudgetWarning)
        try:
            shares = prompt_retention(loaded, config, encode_sample(loaded, sample), budgets)
        except KVCompressError as error:
            return error
    for other in (warning for warning in caught if not issubclass(warning.category, BudgetWarning)):
        warnings.warn(other.message, stacklevel=2)
    return shares, next((str(w.message) for w in caught if issubclass(w.category, BudgetWarning)), "")


@torch.inference_mode()
def prompt_retention(
    loaded: LoadedModel, config: CompressionConfig, inputs: dict[str, Tensor], budgets: Sequence[float]
) -> Float[Tensor, "budgets layers"]:
    """Share of one prompt's tokens that each layer keeps at each budget, all of them from one scored prefill.

    Where the allocator sizes heads, that each head keeps: those of the first layer first.

    Args:
        loaded: the model.
        config: the policies.
        inputs: what `encode_sample` or `encode_prompt` gave; one row.
        budgets: fractions of the tokens.
    """
    cache = CompressedCache(loaded.model, config)
    cache.activate_past_recording()  # eviction waits for a crop that never comes, so all scores are there
    loaded.model(**inputs, **cache_argument(cache), logits_to_keep=1)
    found = []
    for budget in budgets:
        allocation = cache.allocation_at(config.override(budget=float(budget)))
        found.append(allocation.budgets[:, 0].reshape(-1) / cache.report().row_tokens_seen[0])
    return torch.tensor(np.stack(found), dtype=torch.float64)


def check_budgets(budgets: Sequence[float]) -> list[float]:
    """The budgets, ascending, each once.

    Raises:
        ConfigError: if there is none, or one is not above 0 and up to 1.
    """
    wrong = [budget for budget in budgets if not 0 < budget <= 1]
    if wrong or not budgets:
        raise ConfigError(f"budgets: must be fractions above 0 and up to 1; got {wrong[0] if wrong else 'none'}")
    return sorted({float(budget) for budget in budgets})


def check_config(config: CompressionConfig) -> None:
    """Raises ConfigError if a configuration keeps everything, shrinks prompts between layers, or has them repeated."""
    if config.evictor is None or config.reducer is not None:
        reason = "keeps everything" if config.evictor is None else f"has the reducer {config.reducer.name}"  # type: ignore[union-attr]
        raise ConfigError(
            f"config: {reason}, so layers have no sizes of their own to estimate; choose one with an evictor and "
            "without a reducer, such as the preset prefixkv"
        )
    check_read_once({"config": config}, "calibration", "leave sizes to an allocator")
