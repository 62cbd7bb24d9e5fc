"""PagesLLaVA: SmolLM2 behind a vision tower that reads drawn pages, and the pages that it is asked about."""

from kvcompress.evaluation.pages.contents import KINDS, Cell, Fact, Page, page_seed, sample_page
from kvcompress.evaluation.pages.drawing import draw_page
from kvcompress.evaluation.pages.questions import ASKED, Question, question

__all__ = [
    "ASKED",
    "KINDS",
    "Cell",
    "Fact",
    "Page",
    "Question",
    "draw_page",
    "page_seed",
    "question",
    "sample_page",
]
