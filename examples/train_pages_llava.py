"""Trains the eyes of PagesLLaVA: a vision tower and projector that turn drawn pages into SmolLM2's own embeddings.

    python examples/train_pages_llava.py --output runs/pages --export kvcompress/evaluation/pages/weights

The language model is neither run nor changed. Each patch of a page shows one token, and the projector has to give the
row of SmolLM2's embedding matrix that belongs to it: the loss is the cross entropy over the rows of the pages'
vocabulary, by their distance from what the projector gives, and that distance itself.

Half of the pages are drawn as those that are asked about, and half are drills: tokens, bars and objects in any order,
so that rare ones are seen as often as others. The patch embedding starts from the principal components of patches.

Pages follow from the step, so a run that was stopped goes on from its last checkpoint with the pages that it would have
seen. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from kvcompress.evaluation import smollm2
from kvcompress.evaluation.pages.contents import CELLS, COLOURS, KINDS, SHAPES, Cell, page_seed, sample_page
from kvcompress.evaluation.pages.drawing import PATCH, draw_cells
from kvcompress.evaluation.pages.model import build_config
from kvcompress.evaluation.pages.vocabulary import NUMBER, TOKENS
from kvcompress.files import append_line, replacing, write_text

RATE = 2e-3
DISTANCE = 0.1  # weight of the squared distance beside the cross entropy
DRILL = 7_000_000  # the index of the first drill page within its split
PAGES_FOR_COMPONENTS = 24


def drill(seed: int) -> list[Cell]:
    """Patches in any order: three quarters tokens, the others bars and objects."""
    draw = random.Random(f"drill {seed}")
    cells: list[Cell] = []
    while len(cells) < CELLS:
        chance = draw.random()
        if chance < 0.8:
            cells.append(Cell(draw.choice(TOKENS)))
        elif chance < 0.87:
            cells.append(Cell(str(draw.randrange(10)), "bar"))
        elif len(cells) % 24 < 23:  # both halves of an object stand on a line
            thing = draw.choice(list(COLOURS)), draw.choice(SHAPES)
            cells += [Cell(f" {thing[0]}", "left", thing), Cell(f" {thing[1]}", "right", thing)]
    return cells[:CELLS]


def page(split: str, index: int) -> tuple[Sequence[Cell], int]:
    """A page's patches and the seed that it is drawn with: drills, and each kind of page in turn."""
    if index % 2:
        seed = page_seed(split, DRILL + index // 2)
        return drill(seed), seed
    seed = page_seed(split, index // 2)
    return sample_page(KINDS[index // 2 % len(KINDS)], seed).cells, seed


def batch(pages: Sequence[tuple[Sequence[Cell], int]]) -> tuple[Tensor, Tensor]:
    """Pixels as the processor gives them, and each patch's number in the vocabulary."""
    stacked = torch.from_numpy(np.stack([draw_cells(*one) for one in pages])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(levels).view(1, 3, 1, 1) for levels in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    numbers = torch.tensor([[NUMBER[cell.text] for cell in cells] for cells, _ in pages])
    return (stacked.float() / 255 - mean) / std, numbers


class Eyes(nn.Module):
    """Vision tower and projector, and the embeddings that they have to hit."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        model, tokenizer = smollm2.load(torch.float32)
        config = build_config(model.config)
        ids = [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS]
        assert all(len(found) == 1 for found in ids), "every piece of the vocabulary is one token"
        rows = model.get_input_embeddings().weight.detach()[torch.tensor(ids)[:, 0]]
        self.register_buffer("rows", rows.clone(), persistent=False)
        torch.manual_seed(seed)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        depth = config.vision_config.num_hidden_layers
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 2 and "position" not in name:
                    gain = (2 * depth) ** -0.5 if "out_proj" in name or "fc2" in name else 1.0
                    weight.normal_(0.0, gain * weight.shape[1] ** -0.5)
            self.multi_modal_projector.linear_2.bias.copy_(rows.mean(0))

    def start_from_components(self) -> None:
        """Makes the patch embedding the first principal components of patches, at one scale."""
        pixels, _ = batch([page("train", 9_000_000 + number) for number in range(PAGES_FOR_COMPONENTS)])
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        embedding: Any = self.vision_tower.embeddings.patch_embedding
        count = embedding.weight.shape[0]
        components = vectors[:, -count:] / (values[-count:] + 0.02 * values[-count:].mean()).sqrt()
        with torch.no_grad():
            embedding.weight.copy_(components.T.reshape(embedding.weight.shape))

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        found: Tensor = self.multi_modal_projector(seen)
        return found

    def logits(self, found: Tensor) -> Tensor:
        """Of the vocabulary: half the squared distance, but for what all share."""
        return found @ self.rows.T - self.rows.square().sum(1) / 2


class Run:
    """A training run in a folder: checkpoint, metrics, and its pace."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.eyes = Eyes(options.seed)
        self.optimizer = torch.optim.AdamW(self.eyes.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        self.done, self.seconds, self.started = 0, 0.0, time.time()
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            held = torch.load(checkpoint, weights_only=True)
            self.done, self.seconds = held["step"], held["seconds"]
            self.eyes.load_state_dict(held["eyes"])
            self.optimizer.load_state_dict(held["optimizer"])
        else:
            self.eyes.start_from_components()

    def log(self, **figures: Any) -> None:
        figures["seconds"] = round(self.seconds + time.time() - self.started, 1)
        append_line(self.folder / "metrics.jsonl", json.dumps(figures).encode() + b"\n", "metrics")
        tqdm.write(json.dumps(figures))

    def save(self) -> None:
        content = {
            "step": self.done,
            "seconds": self.seconds + time.time() - self.started,
            "eyes": self.eyes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.folder / "checkpoint.pt", "checkpoint") as file:
            torch.save(content, file)

    def train(self) -> None:
        options, sums = self.options, [0.0, 0.0, 0.0]
        for step in tqdm(range(self.done, options.steps), initial=self.done, total=options.steps, mininterval=30):
            sums = [before + now for before, now in zip(sums, self.step(step), strict=True)]
            self.done = step + 1
            if self.done % 25 == 0:
                loss, right, distance = (round(figure / 25, 4) for figure in sums)
                self.log(step=self.done, loss=loss, right=right, distance=distance)
                sums = [0.0, 0.0, 0.0]
            if self.done % options.every == 0 or self.done == options.steps:
                self.log(step=self.done, validation=self.measured("validation", 1))
                self.save()

    def step(self, step: int) -> tuple[float, float, float]:
        """One step at the rate that is due: up in 30 steps, then level, and down over the last part."""
        options = self.options
        pace = min(1.0, (step + 1) / 30, max(0.01, (options.steps - step) / (options.decay * options.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * pace
        pixels, numbers = batch([page("train", step * options.batch + place) for place in range(options.batch)])
        found = self.eyes(pixels)
        logits = self.eyes.logits(found)
        distance = (found - self.eyes.rows[numbers]).square().sum(-1).mean()
        loss = F.cross_entropy(logits.flatten(0, 1), numbers.flatten()) + DISTANCE * distance
        loss.backward()
        nn.utils.clip_grad_norm_(self.eyes.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), (logits.argmax(-1) == numbers).float().mean().item(), distance.item()

    @torch.no_grad()
    def measured(self, split: str, each: int) -> dict[str, float]:
        """Share of right patches by kind of page, and how far they are from the embeddings, in their size."""
        found: dict[str, float] = {}
        apart, size = 0.0, 0.0
        for place, kind in enumerate(("drill", *KINDS)):
            right = 0.0
            for number in range(each):
                one = page(split, 2 * number + 1 if kind == "drill" else 2 * (4 * number + place - 1))
                pixels, numbers = batch([one])
                given = self.eyes(pixels)
                right += (self.eyes.logits(given).argmax(-1) == numbers).float().mean().item()
                wanted = self.eyes.rows[numbers]
                apart += (given - wanted).square().sum().item()
                size += wanted.square().sum().item()
            found[kind] = round(right / each, 5)
        return {**found, "relative squared distance": round(apart / size, 5)}

    def export(self, folder: Path) -> None:
        """Writes what was trained as float16, and how well it reads held-out pages."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.half().contiguous() for name, weight in self.eyes.state_dict().items()}
        with replacing(folder / "model.safetensors", "weights") as file:
            save_file(weights, str(file), metadata={"format": "pt"})
        self.eyes.load_state_dict({name: weight.float() for name, weight in weights.items()})
        figures = {"pages of each kind": self.options.pages, "split": "test", **self.measured("test", self.options.pages)}
        write_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n", "metrics")
        print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/pages", help="folder of checkpoint and metrics")
    parser.add_argument("--export", help="folder that the trained weights are written to")
    parser.add_argument("--export-only", action="store_true", help="exports the checkpoint without training")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=2, help="pages a step")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate falls")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--pages", type=int, default=8, help="held-out pages of each kind to measure the export on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = Run(options)
    if not options.export_only:
        run.train()
    if options.export:
        run.export(Path(options.export))


if __name__ == "__main__":
    main()
