"""Seeds of drawn pictures, in splits that share none."""

from __future__ import annotations

from kvcompress.errors import ConfigError

_EACH = 10_000_000
_SPLITS = {"test": 0, "validation": _EACH, "train": 2 * _EACH}


def split_seed(split: str, index: int) -> int:
    """The seed of a picture of a split; no two splits share one.

    Args:
        split: "train", "validation" (looked at while training) or "test" (held out).
        index: of the picture, from 0; below ten million but in "train", the last, which goes on.

    Raises:
        ConfigError: if there is no such split or index.
    """
    if split not in _SPLITS:
        raise ConfigError(f"split: unknown '{split}'; known: {', '.join(_SPLITS)}")
    if (split != "train" and not 0 <= index < _EACH) or index < 0:
        raise ConfigError(f"index: must be from 0 to {_EACH - 1:,}; got {index}")
    return _SPLITS[split] + index
