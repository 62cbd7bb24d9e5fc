"""Reducers: which hidden states go on to later layers in prefill."""

from kvcompress.policies.reducers.cdpruner import CDPruner
from kvcompress.policies.reducers.divprune import DivPrune
from kvcompress.policies.reducers.fastv import FastV
from kvcompress.policies.reducers.lightkv import LightKV
from kvcompress.policies.reducers.pyramiddrop import PyramidDrop
from kvcompress.policies.reducers.random import RandomReducer
from kvcompress.policies.reducers.tome import ToMe
from kvcompress.policies.reducers.uniform_grid import UniformGrid
from kvcompress.policies.reducers.visionzip import VisionZip

__all__ = [
    "CDPruner",
    "DivPrune",
    "FastV",
    "LightKV",
    "PyramidDrop",
    "RandomReducer",
    "ToMe",
    "UniformGrid",
    "VisionZip",
]
