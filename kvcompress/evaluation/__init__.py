"""Running models with compressed caches, and measuring what that saves and costs."""

from kvcompress.evaluation.generation import Generation, encode_prompt, generate, warm_up
from kvcompress.evaluation.models import LoadedModel, load_model

__all__ = ["Generation", "LoadedModel", "encode_prompt", "generate", "load_model", "warm_up"]
