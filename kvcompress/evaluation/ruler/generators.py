"""One task of RULER, from a generator of nvidia-long-context-eval: `python generators.py JOB.json` prints JSON lines.

A generator reads arguments, seeds Python's random state and loads a tokenizer while it is imported, so each runs in a
process of its own. This program imports nothing of kvcompress, and copies nothing of theirs: it calls their functions.
"""

from __future__ import annotations

import contextlib
import json
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# What parts context, question and the beginning of the answer in a generator's template; characters of no text.
CONTEXT_END, QUESTION_END = "\ue000", "\ue001"
Made = tuple[str, list[str]]  # the text of a sample and its answers
_LONG = 4096  # tokens from which on texts grow by larger steps
_EXAMPLE, _SLACK = 500, 50  # tokens of the example before variables to track; by how much such texts differ
_TRIES = 50  # questions that are looked at for each that is wanted


class Generator:
    """A generator's functions, and what a sample may be."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Runs the module of a generator up to its functions."""
        self.job, self.length = job, int(job["length"])
        self.count = _replace_modules(job["tokenizer"])
        if job["generator"] == "niah":
            _thin_words()
        folder = Path(job["folder"])
        sys.path.insert(0, str(folder))
        import constants  # type: ignore[import-not-found]

        task = constants.TASKS[job["generator"]]
        self.answer_tokens = int(task["tokens_to_generate"])
        task["template"] = task["template"].replace("{context}", "{context}" + CONTEXT_END)
        task["answer_prefix"] = QUESTION_END + task["answer_prefix"]
        arguments = {
            "save_dir": ".",
            "save_name": "ruler",
            "tokenizer_path": job["tokenizer"],
            "tokenizer_type": "hf",
            "max_seq_length": self.length,
            "tokens_to_generate": self.answer_tokens,
            "num_samples": job["samples"],
            "random_seed": job["seed"],
            "template": task["template"] + task["answer_prefix"],
            **job["arguments"],
        }
        script = str(folder / f"{job['generator']}.py")
        sys.argv = [script, *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))]
        self.functions = runpy.run_path(script, run_name="generator")

    def fits(self, made: Made) -> bool:
        """Whether a text and its answer stay within the length."""
        return self.count(made[0]) + self.answer_tokens <= self.length

    def filled(self, make: Callable[[int], Made], step: int, least: int = 0, most: int = 10**9) -> Made | None:
        """The text of the largest size, a multiple of a step above the least, that fits; None if none does."""
        size, best = least or step, None
        while size <= most and self.fits(made := make(size)):
            best, size = made, size + step
        return best

    def samples(self) -> Iterator[Made]:
        """As many samples as are asked for, or fewer where no more fit."""
        made = {
            "niah": self._needles,
            "variable_tracking": self._variables,
            "common_words_extraction": self._common_words,
            "freq_words_extraction": self._frequent_words,
            "qa": self._questions,
        }[self.job["generator"]]()
        for _, one in zip(range(self.job["samples"]), made, strict=False):
            if one is None:
                return
            yield one

    def _needles(self) -> Iterator[Made | None]:
        essay = self.job["arguments"]["type_haystack"] == "essay"
        step = (100 if essay else 5) * (4 if self.length >= _LONG else 1)
        most = len(self.functions["haystack"]) if essay else 10**9
        while True:
            yield self.filled(self.functions["generate_input_output"], step, most=most)

    def _variables(self) -> Iterator[Made | None]:
        make, wanted = self.functions["sys_vartrack_w_noise_random"], self.job["arguments"]
        least, shortest = (self._variables_size(size, example) for size, example in ((5, True), (10, False)))
        room = max(_EXAMPLE, least + _SLACK)
        if room + shortest + _SLACK > self.length:
            return  # theirs would try for ever
        example = make(num_samples=1, max_seq_length=room, incremental=5, **wanted)[0]
        while True:
            made = make(num_samples=1, max_seq_length=self.length, icl_example=example, **wanted)[0]
            yield made["input"], made["outputs"]

    def _variables_size(self, noises: int, example: bool) -> int:
        text, answers = self.functions["generate_input_output"](noises, **self.job["arguments"], is_icl=example)
        return self.count(f"{text} {answers}") + self.answer_tokens

    def _common_words(self) -> Iterator[Made | None]:
        while True:
            yield self.filled(self.functions["generate_input_output"], 10, 20, len(self.functions["words"]))

    def _frequent_words(self) -> Iterator[Made | None]:
        sizes = {"num_words": self.length, "vocab_size": self.length // 50, "incremental": max(1, self.length // 64)}
        while True:
            room = self.length - self.answer_tokens
            text, answers, _ = self.functions["generate_input_output"](room, **sizes, **self.job["arguments"])
            yield text, answers

    def _questions(self) -> Iterator[Made | None]:
        known, step = self.functions["QAS"], 5 if self.length >= _LONG else 1
        tries = min(len(known), _TRIES * self.job["samples"])
        for index in random.Random(f"ruler {self.job['seed']}").sample(range(len(known)), tries):

            def make(documents: int, index: int = index) -> Made:
                made: Made = self.functions["generate_input_output"](index, documents)
                return made

            found = self.filled(make, step, len(known[index]["context"]), len(self.functions["DOCS"]))
            if found is not None:
                yield found


def _replace_modules(tokenizer_file: str) -> Callable[[str], int]:
    """Puts modules of our own where theirs would ask for more than the tokenizer at hand; returns what counts tokens.

    Sentences are parted by NLTK's rules alone, since its trained model is a download.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)

    class Counter:
        def text_to_tokens(self, text: str) -> list[str]:
            return list(tokenizer.encode(text, add_special_tokens=False).tokens)

    def select_tokenizer(*_: str) -> Counter:
        return Counter()

    def replace(name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module

    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        replace(name, select_tokenizer=select_tokenizer)
    replace("long_context_eval.pred.nemo_utils", write_manifest=None)
    with contextlib.suppress(ModuleNotFoundError):  # of what a generator needs, its own import tells
        import nltk.tokenize

        nltk.tokenize.sent_tokenize = nltk.tokenize.PunktSentenceTokenizer().tokenize
    return lambda text: len(Counter().text_to_tokens(text))


def _thin_words() -> None:
    """Makes needles' names, an adjective and a noun, of every tenth word: all pairs would be six million."""
    with contextlib.suppress(ModuleNotFoundError):
        from wonderwords import random_word

        read = random_word._get_words_from_text_file
        random_word._get_words_from_text_file = lambda name: read(name)[::10]


def parted(text: str) -> tuple[str, str, str]:
    """Context, question and the beginning of the answer of a text; examples before them lose their marks."""
    context, _, rest = text.rpartition(CONTEXT_END)
    question, _, prefix = rest.partition(QUESTION_END)
    plain = context.replace(CONTEXT_END, "").replace(QUESTION_END, "")
    return plain.strip(), question.strip(), prefix.strip()


def main() -> None:
    """Makes the samples of a job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(sys.stderr):  # generators print how far they are
        generator = Generator(job)
        made = list(generator.samples())
    for text, answers in made:
        fields = (*parted(text), list(dict.fromkeys(answers)), generator.answer_tokens)
        print(json.dumps(dict(zip(("context", "question", "answer_prefix", "answers", "tokens"), fields, strict=True))))


if __name__ == "__main__":
    main()
