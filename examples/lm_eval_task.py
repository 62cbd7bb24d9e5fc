"""EleutherAI's lm-evaluation-harness with a compressed cache, on a task of one's own.

    pip install 'kvcompress[lm-eval,demo]'
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
doc_to_text: "{{{{text}}}} Question: where is the {{{{thing}}}}? Answer: in the"
doc_to_choice: ["garden", "cellar", "kitchen"]
doc_to_target: place
metric_list:
  - metric: acc
"""
PLACES = ["garden", "cellar", "kitchen"]
THINGS = ["red box", "blue key", "old dog", "green mat", "tall vase", "small lamp"]


def write_task(folder: Path) -> None:
    data = folder / "whereabouts.jsonl"
    lines = []
    for number, thing in enumerate(THINGS):
        placed = {other: PLACES[(number + 2 * index) % 3] for index, other in enumerate(THINGS)}
        text = " ".join(f"The {other} is in the {place}." for other, place in placed.items())
        lines.append({"text": text, "thing": thing, "place": PLACES.index(placed[thing])})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "whereabouts.yaml").write_text(TASK.format(data=json.dumps(str(data))))


def main() -> None:
    loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        for budget in (1.0, 0.5, 0.2):
            model = CompressedLM(loaded.model, tokenizer=loaded.tokenizer, preset="text", budget=budget, batch_size=3)
            tasks = TaskManager(include_path=folder, include_defaults=False)
            results = lm_eval.simple_evaluate(model, tasks=["whereabouts"], task_manager=tasks, bootstrap_iters=0)
            print(f"budget {budget:.0%}: accuracy {results['results']['whereabouts']['acc,none']:.2f}")


if __name__ == "__main__":
    main()
