"""How every picture looks, and how it is written: for print, and for readers who see few colours.

Figures are built without pyplot and without the reader's own style, so nothing of matplotlib's state changes and the
same data gives the same file.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.evaluation.metrics import METRICS
from kvcompress.files import check_output, make_folder, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Drawn = TypeVar("Drawn")

# Okabe and Ito's colours without yellow, which is too faint on paper. Neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
GREY = "#6E6E6E"
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "kvcompress",
}
_DPI = 200  # of the PNG


def check_matplotlib() -> None:
    """Raises MissingDependencyError, which says how to install it, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("pictures: matplotlib draws them: pip install 'kvcompress[evaluation]'")


def drawing(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """Lets a function draw in the style of this module, where matplotlib is installed."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with _style():
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; two columns of a paper are about 7 inches wide."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def look(index: int) -> dict[str, Any]:
    """Colour, line and marker of the line with that number; any two of the first 252 differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


_NAMES = ("lorenz", "merging", "patches", "retention", "speed", *METRICS)
_MARK = "Drawn by kvcompress"  # in the files, so that no other picture is ever replaced


def ruled(axes: Axes) -> None:
    """Faint lines at the ticks of the y axis."""
    axes.grid(axis="y", color="0.88", linewidth=0.5)


def integer_ticks(axes: Axes) -> None:
    """Whole numbers along the x axis, a dozen at most, for layers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Writes a figure as PNG (200 dots per inch) and SVG, next to each other; the same figure gives the same bytes.

    Args:
        figure: what a function of this package gave.
        path: of either file, or of both without the ending; folders are made where they are missing.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ConfigError: if they cannot be written, or another program's file is in the way.
    """
    path = Path(path)
    stem = path.name.removesuffix(".png").removesuffix(".svg")
    image, drawn = path.with_name(f"{stem}.png"), path.with_name(f"{stem}.svg")
    make_folder(path.parent, "picture")
    for each in (image, drawn):
        check_replaceable(each)
    with _style():
        with replacing(image, "picture") as file:
            figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": _MARK})
        with replacing(drawn, "picture") as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": _MARK})
    return image, drawn


def check_pictures(folder: Path) -> None:
    """Finds out before the work whether pictures can be drawn into a folder after it, and makes the folder.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        ConfigError: if the folder cannot be written to, or holds a file that has the name of a picture of ours.
    """
    check_matplotlib()
    check_output(folder / "picture", "pictures", overwrite=True)
    for file in folder.iterdir():
        if file.suffix in (".png", ".svg") and file.name.startswith(_NAMES):
            check_replaceable(file)


def check_replaceable(path: Path) -> None:
    """Raises ConfigError if a file is there that this package has not drawn."""
    try:
        with path.open("rb") as file:
            drawn = _MARK.encode() in file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"picture {path}: cannot be written: {error.strerror or error}") from None
    if not drawn:
        raise ConfigError(f"picture {path}: is a file that kvcompress has not drawn; move it, or name another folder")


@contextmanager
def _style() -> Iterator[None]:
    """The style of this module instead of the reader's, for a while."""
    check_matplotlib()
    import matplotlib

    defaults: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    plain = {name: value for name, value in defaults.items() if not name.startswith("backend")}
    with matplotlib.rc_context({**plain, **_STYLE}):
        yield
