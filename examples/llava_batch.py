"""Several images with a question each, of different lengths, in one batch on one compressed cache.

    python examples/llava_batch.py [--model FOLDER] [--budget 0.3] [--question TEXT] [IMAGE...]

Without images it asks ShapesLLaVA, a small LLaVA that ships with the package (pip install '.[demo]'), about
scenes that it was not trained on, and prints the right answers too. `--model` takes any LLaVA in a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcompress import CompressedCache
from kvcompress.evaluation.shapes import describe_question, draw_scene, sample_scene, scene_seed
from kvcompress.evaluation.shapes.pretrained import weights_folder
from kvcompress.files import open_picture


def drawn_scenes() -> list[tuple[Image.Image, str, str]]:
    """Three scenes, each with a question and its right answer."""
    scenes = [sample_scene(scene_seed("test", number)) for number in range(3)]
    first = str(scenes[0].at(1, 2) or "nothing")
    asked = [
        ("what is in row 1 column 2?", first),
        ("how many objects?", str(len(scenes[1].things))),
        ("describe the image.", describe_question(scenes[2]).answer),
    ]
    return [(draw_scene(scene), *pair) for scene, pair in zip(scenes, asked, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="files; drawn scenes if left out")
    parser.add_argument("--model", default=str(weights_folder()))
    parser.add_argument("--question", default="describe the image.", help="asked about each of the files")
    parser.add_argument("--budget", type=float, default=0.3, help="share of the tokens that the cache may keep")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"  # so that every answer begins where its prompt ends
    files = [(open_picture(Path(path)), options.question, "") for path in options.images]
    images, questions, right = zip(*files or drawn_scenes(), strict=True)

    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    inputs = processor(images=list(images), text=prompts, padding=True, return_tensors="pt").to(model.device)

    cache = CompressedCache(model, budget=options.budget)
    output = model.generate(**inputs, cache=cache, max_new_tokens=80, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer, expected in zip(questions, answers, right, strict=True):
        print(f"{question} {answer.strip()}" + (f"\n  right: {expected}" if expected else ""))
    print(cache.report(), *cache.report().notes, sep="\n")


if __name__ == "__main__":
    main()
