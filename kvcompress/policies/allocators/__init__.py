"""Allocators: how many slots each layer, or each head, keeps."""

from kvcompress.policies.allocators.adakv import AdaKV
from kvcompress.policies.allocators.duo import Duo
from kvcompress.policies.allocators.entropy import Entropy
from kvcompress.policies.allocators.headprefix import HeadPrefix
from kvcompress.policies.allocators.prefix import Prefix
from kvcompress.policies.allocators.profile import Profile
from kvcompress.policies.allocators.pyramid import Pyramid
from kvcompress.policies.allocators.scores import Scores
from kvcompress.policies.allocators.sparsity import Sparsity
from kvcompress.policies.allocators.uniform import Uniform

__all__ = [
    "AdaKV",
    "Duo",
    "Entropy",
    "HeadPrefix",
    "Prefix",
    "Profile",
    "Pyramid",
    "Scores",
    "Sparsity",
    "Uniform",
]
