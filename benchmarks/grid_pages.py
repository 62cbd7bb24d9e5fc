"""What `benchmarks.grid` reads and compares for PagesLLaVA: drawn pages, asked after the image and with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.grid_readings import Follow, Methods, Prompt
from benchmarks.grid_ways import EVEN, IMAGE, LARGER, RUNS, SHARED, WINDOW, merged, presets, ways
from kvcompress.evaluation.data import Sample, answer_ids, encode_sample
from kvcompress.evaluation.models import LoadedModel
from kvcompress.evaluation.pages import KINDS, draw_page, page_seed, question, sample_page


def pages(loaded: LoadedModel, count: int) -> Iterator[Prompt]:
    """Held-out pages, each asked in its own way and to be read aloud: after the image, then each with the image."""
    for number in range(count):
        page = sample_page(KINDS[number % len(KINDS)], page_seed("test", number))
        picture, seen, after = draw_page(page), [], {}
        for kind in (page.kind, "read"):
            asked = question(page, kind)
            sample = Sample(kind, asked.text, asked.answer, picture=picture, kind=kind, answer_prefix=asked.prefix)
            inputs, answer = encode_sample(loaded, sample), answer_ids(loaded, sample)
            image = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero().max()) + 1
            rest = inputs["input_ids"][:, image:]
            seen.append(Prompt(f"{number} {kind}", "seen", inputs, {kind: Follow(answer)}))
            after[kind] = Follow(torch.cat([rest, answer], 1), rest.shape[1])
        yield Prompt(f"{number}", "unseen", _first(inputs, image), after)
        yield from seen


def _first(inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    begun = inputs["input_ids"][:, :tokens]
    return {**inputs, "input_ids": begun, "attention_mask": torch.ones_like(begun)}


def page_methods() -> Methods:
    """For images of text: scorers with every way to share, and the presets for images and for text."""
    every: dict[str, Any] = {**SHARED, **EVEN}
    return {
        "snapkv": ways(IMAGE, {"name": "snapkv", "window": 8}, every, LARGER),
        "attention": ways(IMAGE, "attention", every, LARGER) | presets("prefixkv", "prefixkv+merge"),
        "snapkv 16 in runs": ways(IMAGE, WINDOW, every, LARGER, RUNS),
        "text": presets("text"),
        "none": presets("streaming"),
        "merged": merged(),
    }
