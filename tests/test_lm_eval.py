"""Continuations of a compressed context, and EleutherAI's harness over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress import CompressionConfig
from kvcompress.errors import MissingDependencyError
from kvcompress.evaluation import LoadedModel
from kvcompress.evaluation.likelihood import read_answer, read_continuations
from kvcompress.testing import models
from tests import checkpoints, tiny

CONTEXT = tiny.token_ids(1, 40, seed=1)[0].tolist()
CONTINUATIONS = [tiny.token_ids(1, length, seed=length)[0].tolist() for length in (3, 1, 6)]


def test_with_everything_kept_a_likelihood_is_that_of_the_whole_text() -> None:
    model = tiny.model("llama")
    found = read_continuations(model, CONTEXT, CONTINUATIONS, CompressionConfig.preset("full"))
    for continuation, (likelihood, greedy) in zip(CONTINUATIONS, found, strict=True):
        with torch.no_grad():
            logits = tiny.untouched("llama")(torch.tensor([CONTEXT + continuation])).logits[0, len(CONTEXT) - 1 : -1]
        wanted = torch.tensor(continuation)
        expected = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
        assert likelihood == pytest.approx(float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("name", ["prefixkv", "h2o", "streaming"])
def test_continuations_read_together_are_those_read_alone(name: str) -> None:
    model, config = tiny.model("llama"), CompressionConfig.preset(name, budget=0.4)
    loaded = LoadedModel("tiny", model, checkpoints.text_tokenizer())
    together = read_continuations(model, CONTEXT, CONTINUATIONS, config)
    for continuation, (likelihood, _) in zip(CONTINUATIONS, together, strict=True):
        alone = read_answer(loaded, {"input_ids": torch.tensor([CONTEXT])}, torch.tensor([continuation]), config)
        assert likelihood == pytest.approx(-alone.nll, abs=1e-4)


def test_the_greedy_continuation_is_greedy() -> None:
    model = tiny.model("llama")
    output = model.generate(torch.tensor([CONTEXT]), max_new_tokens=4, do_sample=False)[0, len(CONTEXT) :].tolist()
    other = [*output[:3], (output[3] + 1) % models.VOCABULARY]
    found = read_continuations(model, CONTEXT, [output, other], CompressionConfig.preset("full"))
    assert [greedy for _, greedy in found] == [True, False]


# -- with the harness --------------------------------------------------------------------------------------------------

TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICE = 'doc_to_choice: ["yes", "no", "perhaps"]\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
WRITE = (
    "doc_to_target: word\ngeneration_kwargs: {until: [zzz], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n"
)


def evaluated(folder: Path, kind: str, model: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    lines = [{"text": f"The cat number {n} sat on a mat. Did it?", "answer": n % 3, "word": "x"} for n in range(6)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TASK.format(data=json.dumps(str(data)), kind=kind) + (CHOICE if kind == "multiple_choice" else WRITE)
    (folder / "local.yaml").write_text(task)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=["local"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return {sample["doc_id"]: sample["resps"] for sample in found["samples"]["local"]}


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_the_harness_gets_what_a_compressed_model_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install 'kvcompress[lm-eval]'")
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    from kvcompress.evaluation.lm_eval import CompressedLM

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = checkpoints.save_text(tmp_path / "model", chat_template=None)
    assert get_model("kvcompress") is CompressedLM
    given = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 2}
    plain = evaluated(tmp_path, kind, HFLM(**given))
    whole = evaluated(tmp_path, kind, CompressedLM(**given, preset="full"))
    less = evaluated(tmp_path, kind, CompressedLM(**given, preset="streaming", budget="30%"))
    if kind == "generate_until":
        assert whole == plain
    else:
        numbers = [[[float(one[0][0]) for one in resps] for resps in found.values()] for found in (whole, plain)]
        torch.testing.assert_close(*map(torch.tensor, numbers), rtol=0, atol=1e-3)
    assert less != whole


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "kvcompress.evaluation.lm_eval", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvcompress\[lm-eval\]'"):
        __import__("kvcompress.evaluation.lm_eval")
