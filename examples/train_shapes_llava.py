"""Trains ShapesLLaVA, the small LLaVA that ships with kvcompress, from scratch on drawn scenes.

    python examples/train_shapes_llava.py --output runs/shapes --export kvcompress/evaluation/shapes/weights

Two phases. In the first the vision tower learns alone: each patch says which object lies in its cell of the grid, and
which cell that is. In the second the tower is held still, and projector and decoder learn to answer: several questions
share an image, most of them about single cells, and a share of the dialogues describes the image.

Scenes are drawn as they are needed, from seeds that follow from the step, so a run that was stopped goes on from its
last checkpoint with the scenes that it would have seen. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kvcompress.evaluation import load_model
from kvcompress.evaluation.shapes.measure import accuracy, description_perplexity, gini_per_layer, held_out_scenes
from kvcompress.evaluation.shapes.model import PATCH, SPECIAL, VISION_TOKENS, build_model, build_processor
from kvcompress.evaluation.shapes.questions import ask_several, describe_question
from kvcompress.evaluation.shapes.scenes import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    draw_scene,
    sample_scene,
    scene_seed,
)
from kvcompress.files import append_line, replacing, write_text

IGNORED = -100
# What a patch is asked in the first phase; 0 stands for "nothing here".
PATCH_CLASSES = {
    "row": GRID,
    "column": GRID,
    "size": 1 + len(SIZES),
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
}
# Kinds of short questions once single cells are learned; counting, which takes longest, gets the rest.
LATER_SHARES = {"cell": 0.2, "colour": 0.1, "shape": 0.08, "count": 0.0, "exists": 0.15, "compare": 0.1}
VISION_BATCH = 48
RATES = {"vision": (0.02, 2e-3), "joint": (0.02, 3e-3)}  # of Muon and of AdamW
VALIDATION_SCENES = 96


# -- data --------------------------------------------------------------------------------------------------------------


class Reader:
    """Turns scenes and dialogues into tensors, equal to what the processor makes of them."""

    def __init__(self) -> None:
        self.processor = build_processor()
        self.words: dict[str, list[int]] = {}
        images = self.processor.image_processor
        self.mean = torch.tensor(images.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(images.image_std).view(1, 3, 1, 1)

    def pixels(self, scenes: list[Any]) -> Tensor:
        stacked = torch.from_numpy(np.stack([np.asarray(draw_scene(scene)) for scene in scenes]))
        return (stacked.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def ids(self, text: str) -> list[int]:
        if text not in self.words:
            self.words[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self.words[text]

    def dialogue(self, questions: list[Any]) -> tuple[list[int], list[int], list[tuple[str, int, int]]]:
        """Token ids, labels (the answers alone), and kind, start and end of each answer."""
        start, end, user, assistant, image = (
            SPECIAL.index(token) for token in ("<s>", "</s>", "USER:", "ASSISTANT:", "<image>")
        )
        ids, labels = [start], [IGNORED]
        spans = []
        for number, question in enumerate(questions):
            picture = [image] * VISION_TOKENS if number == 0 else []
            asked = [user, *picture, *self.ids(question.text), assistant]
            answer = [*self.ids(question.answer), end]
            spans.append((question.kind, len(ids) + len(asked), len(ids) + len(asked) + len(answer)))
            ids += [*asked, *answer]
            labels += [*[IGNORED] * len(asked), *answer]
        return ids, labels, spans

    def batch(self, dialogues: list[list[Any]]) -> tuple[Tensor, Tensor, list[list[tuple[str, int, int]]]]:
        rows = [self.dialogue(questions) for questions in dialogues]
        length = max(len(ids) for ids, _, _ in rows)
        # padded on the right: no answer sees it, so the decoder needs no mask
        ids = torch.tensor([row + [SPECIAL.index("<pad>")] * (length - len(row)) for row, _, _ in rows])
        labels = torch.tensor([row + [IGNORED] * (length - len(row)) for _, row, _ in rows])
        return ids, labels, [spans for _, _, spans in rows]


def patch_labels(scenes: list[Any]) -> dict[str, Tensor]:
    """For each patch, the classes of the cell that its centre lies in."""
    side = IMAGE_SIZE // PATCH
    cell = torch.arange(side) * GRID // side
    row, column = cell[:, None].expand(side, side).flatten(), cell[None, :].expand(side, side).flatten()
    grid = torch.zeros(3, len(scenes), GRID, GRID, dtype=torch.long)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            classes = (SIZES.index(thing.size), list(COLOURS).index(thing.colour), SHAPES.index(thing.shape))
            grid[:, index, thing.row - 1, thing.column - 1] = torch.tensor(classes) + 1
    size, colour, shape = grid[:, :, row, column]
    count = len(scenes)
    return {
        "row": row.expand(count, -1),
        "column": column.expand(count, -1),
        "size": size,
        "colour": colour,
        "shape": shape,
    }


def joint_dialogues(scenes: list[Any], step: int, options: argparse.Namespace) -> list[list[Any]]:
    """Short questions about each scene, or, in a share of the steps, its description and then a few of them."""
    counting = sum(LATER_SHARES.values()) * options.counting / (1 - options.counting)
    shares = None if step < options.turn else {**LATER_SHARES, "count": counting}
    if random.Random(f"step {step}").random() < options.described:
        return [
            [describe_question(scene), *ask_several(scene, options.questions // 3, step, shares)] for scene in scenes
        ]
    return [ask_several(scene, options.questions, step, shares) for scene in scenes]


# -- the model ---------------------------------------------------------------------------------------------------------


class PatchHeads(nn.Module):
    """What the first phase reads from each vision token; left behind when the model is exported."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in PATCH_CLASSES.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        features = self.norm(features)
        return {name: head(features) for name, head in self.heads.items()}


def _embed_patches(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """What a convolution with a stride of its kernel's size gives; its gradient is many times faster as a product."""
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    side = pixels.shape[-1] // PATCH
    return F.linear(patches, convolution.weight.flatten(1)).transpose(1, 2).unflatten(2, (side, side))


def vision_features(model: Any, pixels: Tensor) -> Tensor:
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


@torch.no_grad()
def project_attributes(model: Any, heads: PatchHeads, features: Tensor) -> None:
    """Starts the projector with what the patches were asked: its first units are the heads, at one scale each.

    In the tower's own features, colours are loud and places hardly heard, and a decoder finds places very late.
    """
    projector, norm = model.model.multi_modal_projector, heads.norm
    scale = features.var(-1, unbiased=False).sqrt().mean()
    first = 0
    projector.linear_1.weight.mul_(0.3 / features.std())  # the other units whisper
    for name, head in heads.heads.items():
        weight = head.weight * norm.weight
        weight = (weight - weight.mean(1, keepdim=True)) / scale
        bias = head.weight @ norm.bias + head.bias
        logits = features @ weight.T + bias
        gain = (4 if name in ("row", "column") else 2) / logits.std()
        units = slice(first, first + len(weight))
        projector.linear_1.weight[units] = weight * gain
        projector.linear_1.bias[units] = (bias - logits.mean()) * gain
        first += len(weight)
    hidden = projector.act(projector.linear_1(features))
    projector.linear_2.weight.div_((hidden @ projector.linear_2.weight.T).std())


def answer_logits(model: Any, features: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where the next token is part of an answer, and those tokens."""
    embedded = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(features).to(embedded.dtype)
    embedded = torch.cat([embedded[:, :2], image, embedded[:, 2 + VISION_TOKENS :]], dim=1)
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][wanted]).float(), labels[:, 1:][wanted]


def optimizers_for(parameters: list[tuple[str, nn.Parameter]]) -> list[Any]:
    """Muon for the matrices inside, AdamW for embeddings, heads, norms and biases."""

    def inner(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and ("layers." in name or "projector" in name)

    matrices = [parameter for name, parameter in parameters if inner(name, parameter)]
    rest = [parameter for name, parameter in parameters if not inner(name, parameter)]
    return [
        torch.optim.Muon(matrices, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


# -- training ----------------------------------------------------------------------------------------------------------


class Run:
    """A training run in a folder: checkpoint, metrics, and the pace of both phases."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.reader = Reader()
        self.model: Any = build_model(options.seed)
        self.model.set_attn_implementation("eager")  # at this size faster than the fused kernel's backward
        convolution = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        convolution.forward = functools.partial(_embed_patches, convolution)
        self.heads = PatchHeads(self.model.config.vision_config.hidden_size)
        self.seconds = 0.0
        self.started = time.time()

    def optimizers(self, phase: str) -> list[Any]:
        if phase == "vision":
            named = [*self.model.model.vision_tower.named_parameters(), *self.heads.named_parameters()]
            return optimizers_for(named)
        named = [(name, p) for name, p in self.model.named_parameters() if "vision_tower" not in name]
        return optimizers_for(named)

    def save(self, name: str, phase: str, step: int, optimizers: list[Any]) -> None:
        content = {
            "phase": phase,
            "step": step,
            "seconds": self.seconds + time.time() - self.started,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        with replacing(self.folder / name, "checkpoint") as file:
            torch.save(content, file)

    def load(self, path: Path) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.heads.load_state_dict(content["heads"])
        self.seconds = content["seconds"]
        return content

    def log(self, **figures: Any) -> None:
        figures["seconds"] = round(self.seconds + time.time() - self.started, 1)
        append_line(self.folder / "metrics.jsonl", json.dumps(figures).encode() + b"\n", "metrics")
        tqdm.write(json.dumps(figures))

    def train(self) -> None:
        checkpoint = self.folder / "checkpoint.pt"
        held: dict[str, Any] = {"phase": "vision", "step": 0, "optimizers": None}
        if checkpoint.exists():
            held = self.load(checkpoint)
        elif self.options.vision is not None:
            trained = torch.load(self.options.vision, weights_only=True)
            tower = {name: weight for name, weight in trained["model"].items() if "vision_tower" in name}
            self.model.load_state_dict(tower, strict=False)
            self.heads.load_state_dict(trained["heads"])
            project_attributes(self.model, self.heads, self.features())
            held = {"phase": "joint", "step": 0, "optimizers": None}
        if held["phase"] == "vision":
            self.phase("vision", self.options.vision_steps, held)
            project_attributes(self.model, self.heads, self.features())
            self.save("vision.pt", "vision", self.options.vision_steps, [])
            held = {"phase": "joint", "step": 0, "optimizers": None}
        self.phase("joint", self.options.joint_steps, held)

    def phase(self, phase: str, steps: int, held: dict[str, Any]) -> None:
        options = self.options
        optimizers = self.optimizers(phase)
        if held["optimizers"]:
            for optimizer, state in zip(optimizers, held["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        bar = tqdm(range(held["step"], steps), initial=held["step"], total=steps, desc=phase, mininterval=5)
        seen: list[tuple[float, float, float]] = []
        for step in bar:
            done, last = step + 1, step + 1 == steps
            seen.append(self.step(phase, step, steps, optimizers))
            if done % 25 == 0 or last:
                loss, right, answers = (sum(figures) for figures in zip(*seen, strict=True))
                self.log(phase=phase, step=done, loss=round(loss / len(seen), 4), right=round(right / answers, 4))
                seen = []
            stops = options.minutes and time.time() - self.started > 60 * options.minutes
            if done % options.every == 0 or last or stops:
                self.log(phase=phase, step=done, validation=self.validate(phase))
                self.save("checkpoint.pt", phase, done, optimizers)
            if stops:
                raise SystemExit(f"stopped after {options.minutes} minutes; run again to go on")

    def step(self, phase: str, step: int, steps: int, optimizers: list[Any]) -> tuple[float, float, float]:
        """One step at the rate that is due: up in 30 steps, then level, and down over the last share of the phase."""
        pace = min(1.0, (step + 1) / 30, max(0.02, (steps - step) / (self.options.decay * steps)))
        for optimizer, rate in zip(optimizers, RATES[phase], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * pace
        loss, right, of = self.vision_step(step) if phase == "vision" else self.joint_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for o in optimizers for group in o.param_groups for p in group["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), right, of

    def scenes(self, phase: str, step: int, count: int) -> list[Any]:
        start = 0 if phase == "vision" else 5_000_000
        return [sample_scene(scene_seed("train", start + step * count + index)) for index in range(count)]

    def vision_step(self, step: int) -> tuple[Tensor, float, float]:
        scenes = self.scenes("vision", step, VISION_BATCH)
        labels = patch_labels(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.heads(vision_features(self.model, self.reader.pixels(scenes)))
        losses = [F.cross_entropy(logits[name].float().flatten(0, 1), labels[name].flatten()) for name in labels]
        right = torch.stack([logits[name].argmax(-1) == labels[name] for name in labels]).all(0)
        return torch.stack(losses).sum(), right.sum().item(), right.numel()

    def joint_step(self, step: int) -> tuple[Tensor, float, float]:
        options = self.options
        scenes = self.scenes("joint", step, options.batch)
        ids, labels, _ = self.reader.batch(joint_dialogues(scenes, step, options))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = vision_features(self.model, self.reader.pixels(scenes))
            logits, wanted = answer_logits(self.model, features, ids, labels)
        loss = F.cross_entropy(logits, wanted)
        return loss, (logits.argmax(-1) == wanted).sum().item(), wanted.numel()

    @torch.no_grad()
    def features(self) -> Tensor:
        """Vision tokens of some scenes."""
        return vision_features(self.model, self.reader.pixels(self.scenes("vision", 0, 32)))

    @torch.no_grad()
    def validate(self, phase: str) -> dict[str, float]:
        """Share of exact answers of each kind, given the right ones before; in the first phase, of right patches."""
        scenes = [sample_scene(scene_seed("validation", index)) for index in range(VALIDATION_SCENES)]
        found: dict[str, list[float]] = {}
        for start in range(0, len(scenes), 32):
            some = scenes[start : start + 32]
            with torch.autocast("cpu", torch.bfloat16):
                features = vision_features(self.model, self.reader.pixels(some))
                if phase == "vision":
                    logits, labels = self.heads(features), patch_labels(some)
                    for name in labels:
                        found.setdefault(name, []).append(
                            (logits[name].argmax(-1) == labels[name]).float().mean().item()
                        )
                    continue
                for dialogues in ([ask_several(s, 10) for s in some], [[describe_question(s)] for s in some]):
                    ids, labels, spans = self.reader.batch(dialogues)
                    logits, wanted = answer_logits(self.model, features, ids, labels)
                    right = torch.zeros(labels.shape, dtype=torch.bool)
                    right[:, 1:][labels[:, 1:] != IGNORED] = logits.argmax(-1) == wanted
                    found.setdefault("token", []).append((logits.argmax(-1) == wanted).float().mean().item())
                    for row, answers in enumerate(spans):
                        for kind, first, last in answers:
                            found.setdefault(kind, []).append(right[row, first:last].all().item())
        return {kind: round(float(np.mean(values)), 4) for kind, values in found.items()}

    def export(self, folder: Path) -> None:
        """Writes model and processor as float16, for plain `from_pretrained`; each file is replaced whole."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.generation_config.do_sample = False
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as saved:
            self.model.to(torch.float16).save_pretrained(saved)
            self.reader.processor.save_pretrained(saved)
            for path in sorted(Path(saved).iterdir()):
                os.replace(path, folder / path.name)
        self.model.float()

    def measure(self, folder: Path, count: int) -> None:
        """Answers questions about held-out scenes with what was exported, and writes down how often they are right."""
        loaded = load_model(str(folder), dtype="float32")
        figures: dict[str, Any] = accuracy(loaded, None, held_out_scenes(count))
        figures["gini per layer"] = gini_per_layer(loaded, held_out_scenes(25))
        figures["description perplexity"] = description_perplexity(loaded, None, held_out_scenes(count))
        content = {"scenes": count, "split": "test", "cache": "full", "decoding": "greedy", **figures}
        write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n", "metrics")
        print(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/shapes", help="folder of checkpoint and metrics")
    parser.add_argument("--export", help="folder that the trained model is written to")
    parser.add_argument("--export-only", action="store_true", help="exports the checkpoint without training")
    parser.add_argument("--vision", help="a vision.pt of another run, to start with the second phase")
    parser.add_argument("--vision-steps", type=int, default=400)
    parser.add_argument("--joint-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="images a step in the second phase")
    parser.add_argument("--questions", type=int, default=12, help="short questions an image")
    parser.add_argument("--described", type=float, default=0.15, help="share of steps with descriptions")
    parser.add_argument("--turn", type=int, default=600, help="joint step from which counting is asked most")
    parser.add_argument("--counting", type=float, default=0.6, help="share of counting from then on")
    parser.add_argument("--decay", type=float, default=0.35, help="share of a phase in which the rate falls")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--minutes", type=float, default=0, help="stops after so many minutes; 0: at the end")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes to measure the export on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = Run(options)
    if options.export_only:
        run.load(run.folder / "checkpoint.pt")
    else:
        run.train()
    if options.export:
        run.export(Path(options.export))
        run.measure(Path(options.export), options.scenes)


if __name__ == "__main__":
    main()
