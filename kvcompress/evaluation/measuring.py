"""What one sample gives with one cache: metrics, memory and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError, KVCompressError
from kvcompress.evaluation.data import Asker, Mode, Sample, answer_ids, encode_sample
from kvcompress.evaluation.generation import Generation, generate, make_cache, seeded
from kvcompress.evaluation.likelihood import Reading, read_answer
from kvcompress.evaluation.memory import peak_bytes, reset_peak
from kvcompress.evaluation.metrics import METRICS
from kvcompress.evaluation.models import LoadedModel


class Measure:
    """Measures samples one by one."""

    def __init__(self, metrics: Sequence[str], max_new_tokens: int, seed: int, question: Mode = "seen") -> None:
        """Takes what is to be measured.

        Args:
            metrics: names in `METRICS`.
            max_new_tokens: most tokens of a generated answer, unless its sample says otherwise.
            seed: of what policies draw.
            question: "seen" compresses once the whole prompt is read, "unseen" after its context.
        """
        self.metrics, self.max_new_tokens, self.seed = metrics, max_new_tokens, seed
        self.asker = Asker() if question == "unseen" else None
        self.reads_text = any(METRICS[name].reads_text for name in metrics)
        self.reads_likelihood = any(not METRICS[name].reads_text for name in metrics)
        self.needs_answer = any(METRICS[name].needs_answer for name in metrics)

    def __call__(
        self, loaded: LoadedModel, sample: Sample, config: CompressionConfig | None, full: str | None
    ) -> dict[str, Any]:
        """Runs one sample.

        Args:
            loaded: the model.
            sample: the sample.
            config: how the cache is compressed; None for the full cache.
            full: the text that the full cache gave; None where this run is the one to give it.

        Returns:
            Figures ready for JSON; for a sample that cannot be evaluated, `skipped` with the reason.
        """
        try:
            return self._run(loaded, sample, config, full)
        except (KVCompressError, torch.OutOfMemoryError) as error:
            return {"skipped": " ".join(str(error).split())}

    def _run(
        self, loaded: LoadedModel, sample: Sample, config: CompressionConfig | None, full: str | None
    ) -> dict[str, Any]:
        if self.needs_answer and not (sample.answer or "").strip():
            raise ConfigError("its reference answer is empty; leave out the metrics that need one, or give one")
        reset_peak(loaded.model.device)
        inputs, cache = self._asked(loaded, sample, config)
        found: dict[str, Any] = {"kind": sample.kind, "prompt_tokens": inputs["input_ids"].shape[1]}
        measured: Generation | Reading | None = None
        if self.reads_likelihood:
            measured = read_answer(loaded, inputs, answer_ids(loaded, sample), config, seed=self.seed, cache=cache)
            if not math.isfinite(measured.nll):
                raise ConfigError(f"the likelihood of its answer is {measured.nll}: the model's logits overflow")
            found |= {"nll": measured.nll, "answer_tokens": measured.tokens}
        if self.reads_text:
            if measured is not None:  # the cache has read an answer by now
                inputs, cache = self._asked(loaded, sample, config)
            most = sample.max_new_tokens or self.max_new_tokens
            measured = generate(loaded, inputs, config, max_new_tokens=most, seed=self.seed, cache=cache)
            text, answer = measured.text, sample.answer or ""
            found |= {"text": text, "new_tokens": len(measured.token_ids)}
            scores = {name: METRICS[name].score for name in self.metrics}
            found |= {
                name: score(text, text if full is None else full, answer)
                for name, score in scores.items()
                if score is not None
            }
        assert measured is not None  # every metric reads one of the two
        report = measured.report
        return {
            **found,
            "seen_tokens": report.tokens_seen,
            "held_tokens": sum(map(sum, report.layer_lengths)) / len(report.layer_lengths),
            "retention": report.retention,
            "kv_bytes": report.kv_bytes,
            "full_kv_bytes": report.full_kv_bytes,
            "seconds_to_first_token": measured.seconds_to_first_token,
            "tokens_per_second": measured.tokens_per_second,
            "peak_bytes": peak_bytes(loaded.model.device),
        }

    def _asked(
        self, loaded: LoadedModel, sample: Sample, config: CompressionConfig | None
    ) -> tuple[dict[str, Tensor], Cache]:
        """A prompt and the cache that reads it; both new, for one answer."""
        try:
            if self.asker is None:
                return encode_sample(loaded, sample), make_cache(loaded, config)
            with seeded(self.seed, loaded.model.device):
                return self.asker.ask(loaded, sample, config)
        except (KVCompressError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # processors and tokenizers raise whatever they like about odd images and texts
            raise ConfigError(f"cannot be encoded: {type(error).__name__}: {error}") from error
