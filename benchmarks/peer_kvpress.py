"""kvpress's side of `benchmarks.peer`, run by its own Python: `python peer_kvpress.py MODEL JOB.json` prints JSON.

It imports nothing of kvcompress.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def stops(model: Any) -> list[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return [] if found is None else list(found) if isinstance(found, list) else [found]


def press_of(method: str, ratio: float) -> Any:
    """A press with its defaults; None for the full cache."""
    import kvpress  # type: ignore[import-not-found]

    names = {
        "snapkv": "SnapKVPress",
        "knorm": "KnormPress",
        "tova": "TOVAPress",
        "expected_attention": "ExpectedAttentionPress",
        "streaming": "StreamingLLMPress",
    }
    return None if method == "full" else getattr(kvpress, names[method])(compression_ratio=ratio)


@torch.inference_mode()
def answer(model: Any, press: Any, asked: dict[str, Any]) -> list[int]:
    """Greedy answer to a question on a context that was compressed before it, as kvpress's pipeline gives it."""
    from transformers import DynamicCache

    cache, context = DynamicCache(), torch.tensor([asked["context"]])
    with contextlib.nullcontext() if press is None else press(model):
        model.model(input_ids=context, past_key_values=cache)
    ids, place, end = torch.tensor([asked["question"]]), context.shape[1], set(stops(model))
    found: list[int] = []
    while len(found) < asked["new_tokens"]:
        places = torch.arange(place, place + ids.shape[1])[None]
        logits = model(input_ids=ids, past_key_values=cache, position_ids=places).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] in end:
            break
        place, ids = place + ids.shape[1], torch.tensor([[found[-1]]])
    return found


def main() -> None:
    """Answers a job's questions with every method."""
    from transformers import AutoModelForCausalLM

    folder, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"]))
    model.train(False)
    answers: dict[str, list[list[int]]] = {}
    for method in job["methods"]:
        press = press_of(method, 1 - job["budget"])
        answers[method] = [answer(model, press, asked) for asked in job["asked"]]
    about = ", ".join(f"{name} {metadata.version(name)}" for name in ("kvpress", "transformers"))
    print(json.dumps({"answers": answers, "about": about}))


if __name__ == "__main__":
    main()
