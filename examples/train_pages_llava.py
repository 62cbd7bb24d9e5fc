"""Fits the eyes of PagesLLaVA: a vision tower and projector that turn drawn pages into SmolLM2's own embeddings.

    python examples/train_pages_llava.py --export kvcompress/evaluation/pages/weights

The language model is neither run nor changed. Each patch of a page shows one token, and the projector has to give the
row of SmolLM2's embedding matrix that belongs to it. That is so little that all weights follow by formula from drawn
patches; nothing is left to gradients, and it takes minutes:

1. The patch embedding is made of linear discriminants: the directions in which the means of the looks that a patch may
   have lie furthest apart, measured by what shift, colours and noise change (Fisher, 1936). The layer norm behind it
   leaves the angle between them alone.
2. Two hidden units of the tower's one layer open for one look: where the cosine between a patch and the look's mean
   passes a threshold that lies halfway between its own patches and all others, they write the embedding of its token.
3. The projector passes that on: its activation is all but linear where it is used.

Attention writes nothing: every patch is read by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from kvcompress.evaluation import smollm2
from kvcompress.evaluation.pages.contents import (
    CELLS,
    COLOURS,
    KINDS,
    LOOKS,
    SHAPES,
    SIDE,
    Cell,
    page_seed,
    sample_page,
)
from kvcompress.evaluation.pages.drawing import PATCH, draw_cells
from kvcompress.evaluation.pages.model import build_config
from kvcompress.evaluation.pages.vocabulary import TOKENS
from kvcompress.files import replacing, write_text

NUMBER = {look: number for number, look in enumerate(LOOKS)}
DRILL = 7_000_000  # the index of the first drill page within its split
LOUD = 1000.0  # how much larger than what a patch looked like its embedding is written
OFFSET, SCALE = 8.0, 2.0  # where the projector's activation is all but linear


def drill(seed: int) -> list[Cell]:
    """A page of patches in any order: tokens, bars and objects, rare ones as often as others."""
    draw = random.Random(f"drill {seed}")
    cells: list[Cell] = []
    while len(cells) < CELLS:
        chance = draw.random()
        if chance < 0.8:
            cells.append(Cell(draw.choice(TOKENS)))
        elif chance < 0.87:
            cells.append(Cell(str(draw.randrange(10)), "bar"))
        elif len(cells) % SIDE < SIDE - 1:  # both halves of an object stand on a line
            thing = draw.choice(list(COLOURS)), draw.choice(SHAPES)
            cells += [Cell(f" {thing[0]}", "left", thing), Cell(f" {thing[1]}", "right", thing)]
    return cells[:CELLS]


def pixels_of(cells: Sequence[Cell], seed: int) -> Tensor:
    """A page as the processor gives it, `[1, 3, height, width]`."""
    drawn = torch.from_numpy(draw_cells(cells, seed)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(levels).view(1, 3, 1, 1) for levels in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (drawn - mean) / std


def patches_of(split: str, index: int) -> tuple[Tensor, Tensor]:
    """Patches of a drill page as the patch embedding takes them, `[patches, values]`, and the number of each look."""
    seed = page_seed(split, DRILL + index)
    cells = drill(seed)
    patches = F.unfold(pixels_of(cells, seed), PATCH, stride=PATCH)[0].T
    return patches, torch.tensor([NUMBER[cell] for cell in cells])


class Eyes(nn.Module):
    """Vision tower and projector, and the embeddings that they have to hit."""

    def __init__(self) -> None:
        super().__init__()
        model, tokenizer = smollm2.load(torch.float32)
        config = build_config(model.config)
        ids = {look.text: tokenizer(look.text, add_special_tokens=False).input_ids for look in LOOKS}
        assert all(len(found) == 1 for found in ids.values()), "every piece of the vocabulary is one token"
        self.table = model.get_input_embeddings().weight.detach()
        self.ids = {text: found[0] for text, found in ids.items()}
        self.wanted = self.table[torch.tensor([self.ids[look.text] for look in LOOKS])]
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    @torch.no_grad()
    def fit(self, pages: int) -> None:
        """Finds all weights from so many drill pages for means and discriminants, and as many for thresholds."""
        directions, centre, means = discriminants(pages, self.vision_tower.config.hidden_size // 2)
        lows, highs = cosines(pages, directions, centre, means)
        tower, projector = self.vision_tower, self.multi_modal_projector
        for weight in (*tower.parameters(), *projector.parameters()):
            weight.zero_()
        embeddings: Any = tower.embeddings
        both = torch.cat([directions, -directions])  # so that the layer norm finds a mean of zero
        embeddings.patch_embedding.weight.copy_(both.reshape(embeddings.patch_embedding.weight.shape))
        embeddings.position_embedding.weight[1:] = -(both @ centre)  # the patch embedding has no bias
        layer: Any = tower.encoder.layers[0]
        for norm in (tower.pre_layrnorm, layer.layer_norm1, layer.layer_norm2, tower.post_layernorm):
            norm.weight.fill_(1.0)
        gap = (lows - highs).clamp(min=0.02)
        slope, middle = 16 / gap, (lows + highs) / 2
        length = (embeddings.patch_embedding.out_channels / 2) ** 0.5  # of half of what a layer norm gives
        gates = F.normalize(means, dim=1) * (slope / length)[:, None]
        layer.mlp.fc1.weight[:, : means.shape[1]] = torch.cat([gates, gates])
        layer.mlp.fc1.bias.copy_(torch.cat([-slope * (middle - gap / 4), -slope * (middle + gap / 4)]))
        average = self.wanted.mean(0)
        written = (self.wanted - average).T * (LOUD / 8)  # 8: what a pair of units gives once it is open
        layer.mlp.fc2.weight.copy_(torch.cat([written, -written], 1))
        identity = torch.eye(len(average))
        projector.linear_1.weight.copy_(identity * (SCALE / LOUD))
        projector.linear_1.bias.fill_(OFFSET)
        projector.linear_2.weight.copy_(identity / SCALE)
        projector.linear_2.bias.copy_(average - OFFSET / SCALE)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        found: Tensor = self.multi_modal_projector(seen)
        return found

    @torch.no_grad()
    def measured(self, split: str, pages: int) -> dict[str, float]:
        """Share of patches that are nearest to their token of all of SmolLM2's, and how far off, by kind of page."""
        found: dict[str, float] = {}
        apart = size = 0.0
        for kind in ("drill", *KINDS):
            right = 0
            for number in range(pages):
                seed = page_seed(split, DRILL + number if kind == "drill" else number)
                cells = drill(seed) if kind == "drill" else sample_page(kind, seed).cells
                given, ids = self(pixels_of(cells, seed))[0], torch.tensor([self.ids[cell.text] for cell in cells])
                nearest = given @ self.table.T - self.table.square().sum(1) / 2
                right += int((nearest.argmax(1) == ids).sum())
                apart += (given - self.table[ids]).square().sum().item()
                size += self.table[ids].square().sum().item()
            found[kind] = right / (pages * CELLS)
        return {**found, "squared distance from the embeddings, relative": apart / size}


def discriminants(pages: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions `[count, values]`, the mean of all looks `[values]`, and each look's mean along the directions."""
    first, _ = patches_of("train", 0)
    values = first.shape[1]
    squares, sums, seen = torch.zeros(values, values), torch.zeros(len(LOOKS), values), torch.zeros(len(LOOKS))
    for index in tqdm(range(pages), desc="discriminants", mininterval=10):
        patches, numbers = patches_of("train", index)
        squares += patches.T @ patches
        sums.index_add_(0, numbers, patches)
        seen += torch.bincount(numbers, minlength=len(LOOKS))
    assert seen.min() > 0, "every look was drawn"
    means, share = sums / seen[:, None], seen / seen.sum()
    within = squares / seen.sum() - (means * share[:, None]).T @ means
    within += 0.01 * within.diagonal().mean() * torch.eye(values)
    centre = means.mean(0)
    root = torch.linalg.cholesky(within)
    spread = torch.linalg.solve_triangular(root, (means - centre).T.contiguous() / len(LOOKS) ** 0.5, upper=False)
    vectors = torch.linalg.svd(spread, full_matrices=False)[0][:, :count].contiguous()
    directions = torch.linalg.solve_triangular(root.T.contiguous(), vectors, upper=True).T.contiguous()
    return directions, centre, (means - centre) @ directions.T


def cosines(pages: int, directions: Tensor, centre: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """For every look, the least cosine of its own patches with its mean, and the largest of all others."""
    lows, highs = torch.ones(len(LOOKS)), -torch.ones(len(LOOKS))
    for index in tqdm(range(pages), desc="thresholds", mininterval=10):
        patches, numbers = patches_of("train", 100_000 + index)
        found = F.normalize((patches - centre) @ directions.T, dim=1) @ F.normalize(means, dim=1).T
        lows.scatter_reduce_(0, numbers, found.gather(1, numbers[:, None])[:, 0], "amin")
        found.scatter_(1, numbers[:, None], -1.0)
        highs = torch.maximum(highs, found.amax(0))
    return lows, highs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="folder that weights and metrics are written to")
    parser.add_argument("--pages", type=int, default=120, help="drill pages to fit on, twice")
    parser.add_argument("--held-out", type=int, default=4, help="held-out pages of each kind to measure on")
    options = parser.parse_args()
    folder, start = Path(options.export), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    eyes = Eyes()
    eyes.fit(options.pages)
    weights = {name: weight.half().contiguous() for name, weight in eyes.state_dict().items()}
    with replacing(folder / "model.safetensors", "weights") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    seconds = time.time() - start
    eyes.load_state_dict({name: weight.float() for name, weight in weights.items()})  # as they will be read
    found = {"pages of each kind": options.held_out, "split": "test", **eyes.measured("test", options.held_out)}
    write_text(folder / "metrics.json", json.dumps(found, indent=2) + "\n", "metrics")
    print(json.dumps({**found, "seconds to fit": round(seconds)}))


if __name__ == "__main__":
    main()
