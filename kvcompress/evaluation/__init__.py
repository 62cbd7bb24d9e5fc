"""Running models with compressed caches, and measuring what that saves and costs."""

from kvcompress.evaluation.generation import Generation, encode_prompt, generate, warm_up
from kvcompress.evaluation.inspection import Inspection, inspect
from kvcompress.evaluation.models import LoadedModel, load_model

__all__ = ["Generation", "Inspection", "LoadedModel", "encode_prompt", "generate", "inspect", "load_model", "warm_up"]
