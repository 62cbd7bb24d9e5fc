"""What the grid reads and compares for ShapesLLaVA: drawn scenes, asked after the image and with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.grid_readings import Follow, Methods, Prompt
from benchmarks.grid_ways import EVEN, IMAGE, SHARED, merged, presets, ways
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.shapes.measure import encode, held_out_scenes
from kvcompress.evaluation.shapes.questions import KINDS, ask, describe_question


def scenes(loaded: LoadedModel, count: int) -> Iterator[Prompt]:
    """Drawn scenes: questions of every kind and the description, asked after the image, then each with the image."""
    end = [int(loaded.tokenizer.eos_token_id)]
    for number, scene in enumerate(held_out_scenes(count)):
        seen, asked = [], {}
        for kind in (*KINDS, "description"):
            question = describe_question(scene) if kind == "description" else ask(scene, kind, 0)
            if question is None:
                continue
            ids = [*loaded.tokenizer(question.answer, add_special_tokens=False).input_ids, *end]
            task, answer = "description" if kind == "description" else "question", torch.tensor([ids])
            inputs = encode(loaded, [(scene, question)])
            seen.append(Prompt(f"{number} {kind}", task, inputs, {"answer": Follow(answer)}))
            image = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero().max()) + 1
            rest = inputs["input_ids"][:, image:]
            asked[kind] = Follow(torch.cat([rest, answer], 1), rest.shape[1])
        alone = {**inputs, "input_ids": inputs["input_ids"][:, :image]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        yield Prompt(f"{number}", "image", alone, asked)
        yield from seen


def scene_methods() -> Methods:
    """For images."""
    every = {**SHARED, **EVEN}
    return {
        "snapkv": ways(IMAGE, {"name": "snapkv", "window": 8}, every),
        "attention": ways(IMAGE, "attention", every) | presets("prefixkv", "prefixkv+merge"),
        "expected": ways(IMAGE, "expected_attention", SHARED),
        "text": presets("text"),
        "none": presets("streaming"),
        "merged": merged(),
    }
