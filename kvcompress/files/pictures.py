"""Pictures that strangers made: few formats, within limits, and only from the folder that the user named."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError, MissingDependencyError, shown
from kvcompress.files.reading import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # others run more code than a picture needs: EPS starts Ghostscript
PICTURE_BYTES = 64 * 2**20


def picture_path(folder: Path, name: object, where: str) -> Path:
    """Where a picture is that a data file names; nothing is read.

    Args:
        folder: the folder of the pictures.
        name: the path in the data file, relative to the folder, or absolute and below it.
        where: how an error begins.

    Raises:
        ConfigError: if it is no path, or one out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(f"{where}: an image is named by its path, a text; got {shown(name)}")
    path = folder / name
    if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
        raise ConfigError(
            f"{where}: the image {shown(name)} lies outside of its folder {folder}; name the folder that holds all "
            "images with images (--images)"
        )
    return path


def read_picture(path: Path, folder: Path | None = None) -> bytes:
    """The bytes of a picture's file.

    Args:
        path: the file.
        folder: where it must lie once links are followed; None allows any place.

    Raises:
        ConfigError: if it lies elsewhere, is no regular file, cannot be read or has more than `PICTURE_BYTES`.
    """
    if folder is not None and not _inside(path, folder):
        raise ConfigError(
            f"image {path}: is a link out of its folder {folder}; copy the image into it, or name the folder that "
            "holds all images with images (--images)"
        )
    if not path.exists():
        raise ConfigError(f"image {path}: there is no such file; name its folder with images")
    return read_bytes(path, "image", PICTURE_BYTES)


def open_picture(path: Path, folder: Path | None = None) -> Any:
    """Reads a picture as RGB (PIL); its first frame where it moves.

    Args:
        path: the file.
        folder: where it must lie once links are followed; None allows any place.

    Raises:
        ConfigError: as `read_picture`; or if it is none of `FORMATS`, damaged, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million).
        MissingDependencyError: if pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError("image: pillow reads images: pip install 'kvcompress[evaluation]'") from None
    content = read_picture(path, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what decoders remark on damaged files
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as picture:
                return picture.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ConfigError(
            f"image {path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels, the most that is decoded; make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise ConfigError(f"image {path}: cannot be read: it is no picture in {', '.join(FORMATS)}") from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ConfigError(f"image {path}: cannot be read: {str(error) or type(error).__name__}") from None


def _inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return False
