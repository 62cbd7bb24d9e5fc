"""Scenes with dialogues on disk, in the format that `kvcompress.evaluation.conversations` reads."""

from __future__ import annotations

from pathlib import Path

from kvcompress.evaluation.conversations import Conversation, write_conversations
from kvcompress.evaluation.shapes.questions import ask_several, describe_question
from kvcompress.evaluation.shapes.scenes import draw_scene, sample_scene, scene_seed
from kvcompress.files import make_folder, replacing


def write_dataset(folder: Path, split: str, count: int, questions: int = 8) -> Path:
    """Draws scenes and writes them with dialogues: a description first, then short questions.

    Args:
        folder: gets `<split>.json` and the images in `<split>/`.
        split: "train", "validation" or "test"; no scene of one is in another.
        count: of scenes.
        questions: short ones, of each scene.

    Returns:
        The JSON file.
    """
    images = folder / split
    make_folder(images, "pictures")
    conversations = []
    for index in range(count):
        scene = sample_scene(scene_seed(split, index))
        image = images / f"{index:06}.png"
        with replacing(image, "picture") as file:
            draw_scene(scene).save(file, format="PNG")
        asked = [describe_question(scene), *ask_several(scene, questions)]
        turns = tuple((question.text, question.answer) for question in asked)
        conversations.append(Conversation(f"{split}-{index:06}", image, turns))
    path = folder / f"{split}.json"
    write_conversations(path, conversations)
    return path
