"""What a processor encoded, as a model reads it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.integrations import adapter_for


def model_inputs(model: PreTrainedModel, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was encoded, on the model's device and in its dtype.

    `token_type_ids` are kept where they say which tokens of an image, or of its prompt, attend to those after them
    (Gemma 3, PaliGemma). Elsewhere they number the texts of a pair, and models of one text take none.

    Args:
        model: the model.
        encoded: what its tokenizer or processor returned.
    """
    typed = adapter_for(model).typed and encoded.get("pixel_values") is not None
    return {
        name: tensor.to(model.device, model.dtype) if tensor.is_floating_point() else tensor.to(model.device)
        for name, tensor in encoded.items()
        if typed or name != "token_type_ids"
    }
