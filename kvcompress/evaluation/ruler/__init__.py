"""RULER's tasks as records of contexts and questions, from the generators of the package nvidia-long-context-eval."""

from kvcompress.evaluation.ruler.records import make_records, task_names

__all__ = ["make_records", "task_names"]
