"""Mergers: what becomes of the tokens that are evicted."""

from kvcompress.policies.mergers.average import Average
from kvcompress.policies.mergers.cam import CaM
from kvcompress.policies.mergers.nearest import Nearest
from kvcompress.policies.mergers.pivotal import Pivotal
from kvcompress.policies.mergers.threshold import Threshold
from kvcompress.policies.mergers.weighted import Weighted

__all__ = ["Average", "CaM", "Nearest", "Pivotal", "Threshold", "Weighted"]
