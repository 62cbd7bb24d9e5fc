"""Mergers: what becomes of the tokens that are evicted."""

from kvcompress.policies.mergers.cam import CaM
from kvcompress.policies.mergers.lookm import LookM
from kvcompress.policies.mergers.nearest import Nearest
from kvcompress.policies.mergers.threshold import Threshold

__all__ = ["CaM", "LookM", "Nearest", "Threshold"]
