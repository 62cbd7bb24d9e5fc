"""Where the trained ShapesLLaVA lies."""

from __future__ import annotations

from pathlib import Path

from kvcompress.errors import MissingDependencyError

NAME = "shapes"
_FOLDER = Path(__file__).parent / "weights"


def weights_folder() -> Path:
    """The folder with model and processor, for plain `from_pretrained`.

    Raises:
        MissingDependencyError: if this copy of the package came without the weights.
    """
    if not (_FOLDER / "model.safetensors").is_file():
        raise MissingDependencyError(
            f"model {NAME}: this copy of kvcompress lacks its weights ({_FOLDER}): install it again, or train them "
            "with examples/train_shapes_llava.py"
        )
    return _FOLDER
