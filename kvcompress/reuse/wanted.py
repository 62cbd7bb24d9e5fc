"""What a caller may ask for: texts, and arguments of `generate` that go with one answer in one row of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, TextStreamer

from kvcompress.cache.argument import NAMES
from kvcompress.errors import ConfigError, shown

_INPUTS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", *NAMES}
_INPUTS |= {"mm_token_type_ids", "mm_encoder_outputs"}
_OF_IMAGES = ("pixel_", "image_", "video_")
_ASSISTED = (
    "with it transformers reads all of a prompt, and what came before was read already; leave it out, also of "
    "model.generation_config"
)
# What each has to be; and why, with the way out.
_ALLOWED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "an answer is written in one row of the cache; leave it out, or sample with do_sample=True"),
    "num_return_sequences": (1, "a question has one answer here; leave it out, and ask again with do_sample=True"),
    "return_dict_in_generate": (False, "what comes back is the answer's text; leave it out"),
    "prompt_lookup_num_tokens": (None, _ASSISTED),
    "assistant_model": (None, _ASSISTED),
    "assistant_early_exit": (None, _ASSISTED),
}


def check_text(name: str, value: object, *, optional: bool = False) -> None:
    """Refuses what is no text.

    Args:
        name: of the argument.
        value: what came.
        optional: whether None is allowed.

    Raises:
        ConfigError: naming the argument, what is allowed and what came.
    """
    if not (isinstance(value, str) or (optional and value is None)):
        several = isinstance(value, Sequence) and all(isinstance(part, str) for part in value)
        more = "; join several with '\\n\\n'.join(...)" if several else ""
        none = ", or None for images alone" if optional else ""
        raise ConfigError(f"{name}: must be a text (str){none}; got {_named(value)}{more}")


def check_texts(name: str, value: object) -> list[str]:
    """The texts of a sequence.

    Raises:
        ConfigError: if it is none, or some of it is no text.
    """
    texts = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if texts is None:
        raise ConfigError(f"{name}: must be a sequence of texts (str); got {_named(value)}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"{name}: must be texts (str) alone; got {_named(text)} at index {number}")
    return texts


def check_count(name: str, value: object) -> int:
    """A number of at least one.

    Raises:
        ConfigError: naming the argument, what is allowed and what came.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: must be a whole number of at least 1; got {_named(value)}")
    return value


def check_images(images: object) -> None:
    """Refuses what is no sequence of images.

    Raises:
        ConfigError: naming the way out.
    """
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise ConfigError(f"images: must be a list of PIL images; got {_named(images)}; for one, pass images=[image]")


def check_processor(processor: object) -> None:
    """Refuses what is neither a tokenizer nor a processor with one.

    Raises:
        ConfigError: naming the way out.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not (callable(processor) and callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise ConfigError(
            "processor: the second argument must be the model's tokenizer or processor "
            f"(AutoTokenizer.from_pretrained, AutoProcessor.from_pretrained); got {_named(processor)}"
        )


def check_generate(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Refuses arguments of `generate` by which it would not give one row of tokens for a prompt.

    Args:
        model: the model that generates.
        given: the arguments, a `generation_config` among them or not.

    Returns:
        Arguments that take back what the model's own generation configuration says to the contrary.

    Raises:
        ConfigError: naming the argument, what is allowed, what came and the way out.
    """
    if given.get("max_length") is not None:
        raise ConfigError(
            "max_length: counts what was read before the answer too; give max_new_tokens; got "
            f"{_named(given['max_length'])}"
        )
    for name in given:
        if name in _INPUTS or name.startswith(_OF_IMAGES):
            raise ConfigError(
                f"{name}: is made here, from what is asked and what was read; got one of the type "
                f"{type(given[name]).__name__}. Leave it out, or call model.generate with a CompressedCache of your own"
            )
    instead: dict[str, Any] = {}
    for name, (allowed, why) in _ALLOWED.items():
        value = given.get(name, getattr(given.get("generation_config"), name, None))
        default = getattr(getattr(model, "generation_config", None), name, None)
        if value is None and default not in (None, allowed):
            if allowed is None:
                value = default
            else:
                instead[name] = allowed
        if value not in (None, allowed):
            raise ConfigError(f"{name}: must be {allowed} here, since {why}; got {_named(value)}")
    return instead


def check_streamer(streamer: object, rows: int) -> None:
    """Refuses to stream several answers at a time where the streamer takes one.

    Raises:
        ConfigError: naming the way out.
    """
    if rows > 1 and isinstance(streamer, TextStreamer):
        raise ConfigError(
            f"streamer: a {type(streamer).__name__} takes one answer at a time, and {rows} would be written together; "
            "pass batch_size=1"
        )


def _named(value: object) -> str:
    return "None" if value is None else f"{shown(value)} ({type(value).__name__})"
