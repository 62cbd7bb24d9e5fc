"""Running models with compressed caches, and measuring what that saves and costs."""

from kvcompress.evaluation.generation import Generation, encode_prompt, generate, warm_up
from kvcompress.evaluation.models import LoadedModel, load_model
from kvcompress.evaluation.results import read_results, read_samples
from kvcompress.evaluation.runner import Progress, evaluate

__all__ = [
    "Generation",
    "LoadedModel",
    "Progress",
    "encode_prompt",
    "evaluate",
    "generate",
    "load_model",
    "read_results",
    "read_samples",
    "warm_up",
]
