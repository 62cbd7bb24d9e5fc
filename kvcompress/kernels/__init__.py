"""Attention over the slots of a cache, and what it tells about them; tensors in, tensors out."""

from kvcompress.kernels.blocks import attend_blocks, decode_bias
from kvcompress.kernels.codes import decode_attention_codes
from kvcompress.kernels.dense import attention, attention_with_mask, attention_with_slots
from kvcompress.kernels.device import runs_triton, sent, sent_together
from kvcompress.kernels.highest import highest_probability
from kvcompress.kernels.mass import attention_mass
from kvcompress.kernels.precision import in_one_dtype, without_autocast
from kvcompress.kernels.probabilities import attention_probabilities, visible_keys
from kvcompress.kernels.ragged import decode_attention, write_slots
from kvcompress.kernels.share import attention_share
from kvcompress.kernels.softmax import Softmax, merge_attention, with_sinks

__all__ = [
    "Softmax",
    "attend_blocks",
    "attention",
    "attention_mass",
    "attention_probabilities",
    "attention_share",
    "attention_with_mask",
    "attention_with_slots",
    "decode_attention",
    "decode_attention_codes",
    "decode_bias",
    "highest_probability",
    "in_one_dtype",
    "merge_attention",
    "runs_triton",
    "sent",
    "sent_together",
    "visible_keys",
    "with_sinks",
    "without_autocast",
    "write_slots",
]
