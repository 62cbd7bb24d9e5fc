"""Scorers that rank by what repeating a prompt looks at, where a prompt is read once and nothing is repeated."""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError


def check_read_once(configs: Mapping[str, CompressionConfig], reader: str, way_out: str) -> None:
    """Refuses configurations that would be something else than their name says.

    Args:
        configs: by name.
        reader: who reads prompts once.
        way_out: what else can be done than to choose another scorer.

    Raises:
        ConfigError: naming the first configuration whose scorer wants a repetition.
    """
    for name, config in configs.items():
        if config.evictor is not None and config.scorer is not None and config.scorer.reconstructs:
            raise ConfigError(
                f"{name}: scorer {config.scorer.name} ranks by what repeating a prompt looks at, "
                f"which {reader} does not do; {way_out}, or choose another scorer"
            )


def check_asked(question: str, configs: Mapping[str, CompressionConfig]) -> None:
    """Refuses the same where questions are seen: only a context by itself is repeated.

    Args:
        question: "seen" or "unseen".
        configs: by name.

    Raises:
        ConfigError: as above.
    """
    if question == "seen":
        check_read_once(configs, "a prompt with its question (question: seen)", "take question: unseen")
