"""What a compressed cache costs in quality: one function a metric, and what each reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvcompress.errors import ConfigError, MissingDependencyError
from kvcompress.policies.registry import unknown_name

PERPLEXITY = "perplexity"
_WORD = re.compile(r"-?\d+(?:[.,]\d+)*|\w+")
_WORD_OR_SIGN = re.compile(_WORD.pattern + r"|[^\w\s]")
_RUN = 4  # words of what may be repeated
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Metric:
    """How a metric is had.

    Attributes:
        score: gives a sample's value from the text with the compressed cache, the text with the full cache and the
            reference answer; None for perplexity, which reads likelihoods instead of texts.
        needs_answer: whether a sample needs a reference answer.
        higher_is_better: which end of the scale is good.
    """

    score: Callable[[str, str, str], float] | None
    needs_answer: bool
    higher_is_better: bool = True

    @property
    def reads_text(self) -> bool:
        """Whether an answer has to be generated."""
        return self.score is not None


def rouge1(text: str, full: str, answer: str) -> float:
    """ROUGE-1 (F) of the text against the full cache's own: shared words.

    Source: Lin, ROUGE, 2004, as in the package rouge-score; against the full cache's text as PrefixKV (arXiv
    2412.03409, section 4.1) does. *Deviates:* its scripts use the package rouge. Two texts that are the same score 1
    also where they hold no word of Latin letters or digits, of which alone rouge-score knows.
    """
    return _rouge("rouge1", text, full)


def rouge2(text: str, full: str, answer: str) -> float:
    """ROUGE-2 (F): shared pairs of words; otherwise like `rouge1`."""
    return _rouge("rouge2", text, full)


def rouge_l(text: str, full: str, answer: str) -> float:
    """ROUGE-L (F): the longest common subsequence of words; otherwise like `rouge1`."""
    return _rouge("rougeL", text, full)


def exact(text: str, full: str, answer: str) -> float:
    """1 if the text is the answer and nothing else, after normalisation.

    Source: SQuAD's exact match (Rajpurkar et al., arXiv 1606.05250): lower case, no articles, no punctuation.
    *Deviates:* signs and points of numbers stay, since -1 is not 1. `<AND>` and `<OR>` are read as in `contained`;
    parts joined by `<AND>` must come in their order.
    """
    words = normalised(text)
    return float(any(words == wanted for wanted in _spelled_out(answer)))


def contained(text: str, full: str, answer: str) -> float:
    """1 if the answer stands somewhere in the text, word by word, after normalisation.

    Source: MM-Vet (arXiv 2308.02490, section 3.3) for `<AND>`, all of whose parts must be there, and `<OR>`, one of
    whose parts must; `<OR>` binds tighter. *Deviates:* MM-Vet lets a model grade; this looks for words.
    """
    words = normalised(text)
    return float(all(any(_stands_in(part, words) for part in parts) for parts in _parts(answer)))


def recall(text: str, full: str, answer: str) -> float:
    """Share of the answer's parts that the text holds to the letter, upper and lower case alike.

    Source: RULER (arXiv 2404.06654) and its retrieval of needles; parts are those between `<AND>`.
    """
    parts = [part.strip().lower() for part in answer.split("<AND>")]
    return sum(part in text.lower() for part in parts) / len(parts)


def string_match(text: str, full: str, answer: str) -> float:
    """RULER's own: like `recall`, and of the choices between `<OR>` one is enough.

    Source: RULER (arXiv 2404.06654): `string_match_all` over the parts between `<AND>`, `string_match_part` over the
    choices of its questions with several answers.
    """
    parts = [[choice.strip().lower() for choice in part.split("<OR>")] for part in answer.split("<AND>")]
    return sum(any(choice in text.lower() for choice in part) for part in parts) / len(parts)


def distinct(text: str, full: str, answer: str) -> float:
    """Share of a text's runs of four words or signs that come once: 1 where nothing is said again; 1 below four.

    Source: distinct-n (Li et al., arXiv 1510.03055), and 1 - seq-rep-4 of Welleck et al. (arXiv 1908.04319).
    *Deviates:* words and signs instead of tokens, so that models with other tokenizers compare.
    """
    words = _WORD_OR_SIGN.findall(text.lower())
    runs = list(zip(*(words[start:] for start in range(_RUN)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


METRICS: dict[str, Metric] = {
    PERPLEXITY: Metric(None, needs_answer=True, higher_is_better=False),
    "rouge1": Metric(rouge1, needs_answer=False),
    "rouge2": Metric(rouge2, needs_answer=False),
    "rougeL": Metric(rouge_l, needs_answer=False),
    "exact": Metric(exact, needs_answer=True),
    "contained": Metric(contained, needs_answer=True),
    "recall": Metric(recall, needs_answer=True),
    "string_match": Metric(string_match, needs_answer=True),
    "distinct": Metric(distinct, needs_answer=False),
}


def check_metrics(names: Iterable[str]) -> list[str]:
    """The names without repeats.

    Raises:
        ConfigError: if one is unknown, or there is none.
        MissingDependencyError: if a package is missing that one needs.
    """
    found = list(dict.fromkeys(names))
    if not found:
        raise ConfigError(f"metric: give at least one of {', '.join(METRICS)}")
    for name in found:
        if name not in METRICS:
            raise ConfigError(str(unknown_name("metric", "metric", name, METRICS)))
        if name.startswith("rouge"):
            _scorer(name)
    return found


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles (unless alone); numbers keep their sign and point."""
    words = [word.replace(",", "") for word in _WORD.findall(text.lower())]
    return [word for word in words if word not in _ARTICLES] or words


def _parts(answer: str) -> list[list[list[str]]]:
    """Normalised words: all of the outer list are needed, one of each inner."""
    return [[normalised(choice) for choice in part.split("<OR>")] for part in answer.split("<AND>")]


def _spelled_out(answer: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for choices in _parts(answer):
        found = [before + choice for before in found for choice in choices]
    return found


def _stands_in(part: list[str], words: list[str]) -> bool:
    starts = range(len(words) - len(part) + 1)
    return bool(part) and any(words[start : start + len(part)] == part for start in starts)


def _rouge(kind: str, text: str, full: str) -> float:
    if text.strip() == full.strip():
        return 1.0
    return float(_scorer(kind).score(full, text)[kind].fmeasure)


@functools.cache
def _scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingDependencyError(
            f"metric {kind}: the package rouge-score measures it: pip install 'kvcompress[evaluation]'"
        ) from None
    return RougeScorer([kind], use_stemmer=False)
