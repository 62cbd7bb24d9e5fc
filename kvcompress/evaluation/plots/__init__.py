"""Pictures of what compression does: plain data in, matplotlib figures out."""

from kvcompress.evaluation.plots.every import plot_profile, plot_results, save_all
from kvcompress.evaluation.plots.lorenz import lorenz
from kvcompress.evaluation.plots.merging import groups, merging
from kvcompress.evaluation.plots.patches import kept_share, patches
from kvcompress.evaluation.plots.quality import quality
from kvcompress.evaluation.plots.retention import retention
from kvcompress.evaluation.plots.speed import speed
from kvcompress.evaluation.plots.style import check_matplotlib, check_pictures, save

__all__ = [
    "check_matplotlib",
    "check_pictures",
    "groups",
    "kept_share",
    "lorenz",
    "merging",
    "patches",
    "plot_profile",
    "plot_results",
    "quality",
    "retention",
    "save",
    "save_all",
    "speed",
]
