"""What models are evaluated on: files in public formats, and built-in data that needs no network."""

from kvcompress.evaluation.data.asking import MODES, Asker, Mode, check_mode
from kvcompress.evaluation.data.encoding import answer_ids, encode_sample
from kvcompress.evaluation.data.loading import BUILT_IN, load_samples
from kvcompress.evaluation.data.sample import Sample, data_hash

__all__ = [
    "BUILT_IN",
    "MODES",
    "Asker",
    "Mode",
    "Sample",
    "answer_ids",
    "check_mode",
    "data_hash",
    "encode_sample",
    "load_samples",
]
