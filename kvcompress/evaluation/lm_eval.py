"""The model `kvcompress` for EleutherAI's lm-evaluation-harness: every task with a compressed cache.

The harness has no place where it looks for models of others, so this module is run in place of `lm_eval` and takes its
arguments: `python -m kvcompress.evaluation.lm_eval --model kvcompress --model_args pretrained=...,budget=0.2`.
In Python, importing it registers the model.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from kvcompress.cache import CompressedCache
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation.likelihood import read_continuations
from kvcompress.evaluation.repetition import check_read_once
from kvcompress.reuse import compressing

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(f"lm_eval: {error}; pip install 'kvcompress[lm-eval]'") from None


_AUTO = 16  # continuations at a time where the batch size is left to the program


@register_model("kvcompress")
class CompressedLM(HFLM):  # type: ignore[misc]
    """A causal model of transformers with a compressed cache; also takes what the harness's `hf` takes.

    A context is read in one forward and compressed, then its continuation is fed token by token, so that what is
    measured is what generating would see. Continuations of one context are read together.

    Args:
        pretrained: a folder, a model's id on the hub, or a model.
        preset: the configuration: a preset's name or the path of a .yaml or .json file.
        budget: what the cache may hold, in place of the configuration's: 0.2, 20%, 512 or 64MiB.
        **kwargs: of the harness's model `hf`.
    """

    def __init__(
        self, pretrained: Any, preset: str = "auto", budget: float | int | str | None = None, **kwargs: Any
    ) -> None:
        self.compression = CompressionConfig.read(preset, **({} if budget is None else {"budget": budget}))
        way_out = "ask a Document, or run kvcompress evaluate --question unseen"
        check_read_once({"preset": self.compression}, "a harness that reads contexts once", way_out)
        if kwargs.get("backend", "causal") != "causal":
            raise ConfigError(f"backend: a compressed cache needs a causal model; got '{kwargs['backend']}'")
        super().__init__(pretrained=pretrained, **{**kwargs, "backend": "causal"})
        CompressedCache(self.model, self.compression)  # refuses what cannot be before any request

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        contexts = [self._fitting(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda number: contexts[number])
        asked = override_bs or self.batch_size_per_gpu
        most = asked if isinstance(asked, int) else _AUTO
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="continuations") as progress:
            for context, numbers in groupby(order, key=lambda number: contexts[number]):
                same = list(numbers)
                for first in range(0, len(same), most):
                    part = same[first : first + most]
                    answers = read_continuations(
                        self.model, context, [requests[number][2] for number in part], self.compression
                    )
                    for number, answer in zip(part, answers, strict=True):
                        found[number] = answer
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    progress.update(len(part))
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of a context, as much of it as the model was made for."""
        return context[-max(1, self.max_length + 1 - len(continuation)) :]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        with compressing(self.model, self.compression):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results, with the configuration."""
        return {**super().get_model_info(), "kvcompress": self.compression.model_dump(mode="json")}


def main() -> None:
    """Runs `lm_eval` with the model `kvcompress` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
