"""ShapesLLaVA: a small LLaVA that ships with the package, and the drawn scenes that it is asked about."""

from kvcompress.evaluation.shapes.dataset import write_dataset
from kvcompress.evaluation.shapes.questions import Question, ask, ask_several, describe_question
from kvcompress.evaluation.shapes.scenes import Scene, Thing, draw_scene, sample_scene, scene_seed

__all__ = [
    "Question",
    "Scene",
    "Thing",
    "ask",
    "ask_several",
    "describe_question",
    "draw_scene",
    "sample_scene",
    "scene_seed",
    "write_dataset",
]
