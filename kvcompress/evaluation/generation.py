"""One prompt, one cache: the answer, and what it took in memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer
from transformers.cache_utils import Cache

from kvcompress.cache import CompressedCache
from kvcompress.cache.argument import cache_argument
from kvcompress.cache.report import CacheReport
from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError
from kvcompress.evaluation.models import LoadedModel
from kvcompress.reuse.encoded import model_inputs


@dataclass(frozen=True)
class Generation:
    """An answer and what it took.

    Attributes:
        text: the answer, without special tokens.
        token_ids: its tokens, the end of sequence included.
        prompt_tokens: tokens of the prompt, those of an image included.
        seconds_to_first_token: from the call to the first token of the answer: prefill, compression, one choice.
        tokens_per_second: speed of the tokens after the first; None where there is none.
        report: what the cache held at the end.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    report: CacheReport

    def to_dict(self) -> dict[str, Any]:
        """The answer and the figures with the names they have as JSON; layers are those of the one row."""
        report = self.report
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "tokens_seen": report.tokens_seen,
            "given_per_layer": [rows[0] for rows in report.layer_tokens],
            "image_tokens_per_layer": [rows[0] for rows in report.image_tokens],
            "kept_per_layer": [rows[0] for rows in report.layer_lengths],
            "retention": report.retention,
            "vision_retention": report.vision_retention,
            "threshold": None if report.threshold is None else report.threshold[0],
            "kv_bytes": report.kv_bytes,
            "index_bytes": report.index_bytes,
            "full_kv_bytes": report.full_kv_bytes,
            "seconds_to_first_token": self.seconds_to_first_token,
            "tokens_per_second": self.tokens_per_second,
            "preset": report.preset,
            "notes": report.notes,
        }


def encode_prompt(
    loaded: LoadedModel, prompt: str, *, image: Any | None = None, chat: bool | None = None
) -> dict[str, Tensor]:
    """Turns a prompt into a model's input, on the model's device.

    Args:
        loaded: the model.
        prompt: what the user says.
        image: a PIL image, for a model that sees images; it comes before the text unless the text has its token.
        chat: whether the chat template goes around the prompt; None for "if there is one".

    Raises:
        ConfigError: if the prompt is empty, or a chat template is asked for where there is none.
        UnsupportedModelError: if there is an image and the model sees none.
    """
    if not prompt.strip():
        raise ConfigError("prompt: is empty")
    loaded.check_sees([] if image is None else [image])
    encoded: Any
    reader: Any = loaded.processor if loaded.processor is not None else loaded.tokenizer
    template = getattr(reader, "chat_template", None)
    if chat and template is None:
        raise ConfigError(f"chat: '{loaded.name}' has no chat template; leave chat out or turn it off")
    if template is not None and chat is not False:
        messages = chat_messages(loaded, prompt, image)
        wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        encoded = reader.apply_chat_template(messages, **wanted)
    elif loaded.processor is not None:
        token = loaded.processor.image_token
        text = prompt if image is None or token in prompt else f"{token}\n{prompt}"
        encoded = loaded.processor(images=image, text=text, return_tensors="pt")
    else:
        encoded = loaded.tokenizer(prompt, return_tensors="pt")
    return model_inputs(loaded.model, encoded)


def generate(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    config: CompressionConfig | None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    cache: Cache | None = None,
) -> Generation:
    """Generates an answer and measures it.

    The clock is read when transformers hands a token on, which waits for the device in any case; time spent in
    `on_text` does not count. Call `warm_up` before the first measurement of a model.

    Args:
        loaded: the model.
        inputs: what `encode_prompt` gave; one row.
        config: how the cache is compressed; None for transformers' own `DynamicCache`, which keeps everything.
        max_new_tokens: most tokens of the answer.
        temperature: 0 always takes the likeliest token; above 0, tokens are drawn.
        seed: of the draws; the random state outside stays as it was.
        on_text: is given the answer piece by piece while it grows.
        cache: one that may have read the beginning of the inputs, and is written to; a new one if None.
    """
    model = loaded.model
    cache = make_cache(loaded, config) if cache is None else cache
    clock = _Clock(loaded.tokenizer, on_text)
    with seeded(seed, model.device):
        clock.start()
        output = model.generate(  # type: ignore[operator]
            **inputs,
            **cache_argument(cache),
            streamer=clock,
            **_limits(loaded, max_new_tokens),
            **_sampling(temperature),
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    token_ids: list[int] = output[0, prompt_tokens:].tolist()
    return Generation(
        text=_decode(loaded.tokenizer, token_ids),
        token_ids=token_ids,
        prompt_tokens=prompt_tokens,
        seconds_to_first_token=clock.seconds_to_first_token,
        tokens_per_second=clock.tokens_per_second,
        report=report_of(cache),
    )


def make_cache(loaded: LoadedModel, config: CompressionConfig | None) -> Cache:
    """A new cache for a model; None gives transformers' own `DynamicCache`, which keeps everything."""
    if config is None:
        return DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
    return CompressedCache(loaded.model, config)


def report_of(cache: Cache) -> CacheReport:
    """What a cache holds; one that keeps everything, in the words of a compressed one."""
    return cache.report() if isinstance(cache, CompressedCache) else _report_full(cache)


def warm_up(loaded: LoadedModel) -> None:
    """Runs two tokens through a model, so that no measurement pays for what libraries do once."""
    start = torch.ones(1, 1, dtype=torch.long, device=loaded.model.device)
    loaded.model.generate(  # type: ignore[operator]
        start, attention_mask=start, **_limits(loaded, 2), **_sampling(0.0)
    )


class _Clock(TextStreamer):
    """Notes when tokens come, and passes the text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.arrivals: list[float] = []  # in seconds since the start, without the time spent here
        self._offset = 0.0

    def start(self) -> None:
        self._offset = time.perf_counter()

    @property
    def seconds_to_first_token(self) -> float:
        return self.arrivals[0]

    @property
    def tokens_per_second(self) -> float | None:
        if len(self.arrivals) < 2:
            return None
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def put(self, value: Tensor) -> None:
        arrived = time.perf_counter()
        if not self.next_tokens_are_prompt:
            self.arrivals.append(arrived - self._offset)
        if self.on_text is None:
            self.next_tokens_are_prompt = False
        else:
            super().put(value)  # type: ignore[no-untyped-call]
        self._offset += time.perf_counter() - arrived

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None and text:
            self.on_text(text)


def chat_messages(loaded: LoadedModel, prompt: str, image: Any | None) -> list[dict[str, Any]]:
    """The one message of a user, as chat templates read it."""
    if not loaded.sees_images:
        return [{"role": "user", "content": prompt}]
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature < 0:
        raise ConfigError(f"temperature: must be 0 (greedy) or above; got {temperature}")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature}


def _limits(loaded: LoadedModel, max_new_tokens: int) -> dict[str, Any]:
    """Where an answer ends; a `max_length` from the checkpoint is another way to say it, and steps back."""
    padding = loaded.tokenizer.pad_token_id
    if padding is None:
        padding = loaded.tokenizer.eos_token_id
    return {"max_new_tokens": max_new_tokens, "max_length": None, "pad_token_id": padding}


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside follow the seed; the random state outside stays as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _report_full(cache: Cache) -> CacheReport:
    seen = cache.get_seq_length()
    layers: list[Any] = list(cache.layers)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return CacheReport(
        tokens_seen=seen,
        row_tokens_seen=[seen],
        layer_tokens=[[seen] for _ in layers],
        image_tokens=[[0] for _ in layers],
        layer_lengths=[[layer.get_seq_length()] for layer in layers],
        layer_budgets=None,
        held_positions=[[[list(range(seen))]] for _ in layers],
        kv_bytes=held,
        index_bytes=0,
        full_kv_bytes=held,
    )
