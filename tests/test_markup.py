"""What notebooks show: well-formed, complete, and nothing but our own markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from kvcompress import CompressedCache, CompressionConfig, markup
from kvcompress.config.presets import PRESETS
from tests import tiny


class Reader(HTMLParser):
    """Texts of a page, all of whose tags must close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in ("table", "caption", "tr", "th", "td", "span"), tag
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_shows_the_policy_of_every_stage(name: str) -> None:
    config = CompressionConfig.preset(name)
    texts = " ".join(Reader(config._repr_html_()).texts)
    for stage in ("scorer", "allocator", "evictor", "merger", "quantizer", "reducer"):
        policy = getattr(config, stage)
        assert stage in texts and (policy is None or policy.name in texts)


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in PRESETS), ("auto", {"budget": 64, "merger": "none"}), ("prefixkv", {"budget": "64MiB"})],
)
def test_a_configuration_prints_what_differs_from_the_defaults_and_reads_back(
    name: str, fields: dict[str, Any]
) -> None:
    config = CompressionConfig.preset(name, **fields)
    known = {type(value).__name__: type(value) for value in (config, *dict(config).values())}
    assert eval(repr(config), known) == config and str(config) == repr(config)
    assert len(repr(config)) < 300
    told = repr(CompressionConfig(budget=0.3, scorer="attention"))
    assert told == "CompressionConfig(budget=Budget(fraction=0.3), scorer=Attention())"


def test_a_report_shows_a_bar_for_what_each_layer_keeps() -> None:
    cache = CompressedCache(tiny.model("llama"), "prefixkv", budget=0.4)
    assert Reader(cache.report()._repr_html_()).texts
    tiny.model("llama").generate(
        **tiny.inputs("llama", 40, seed=1, batch=2), **tiny.with_cache(cache), max_new_tokens=3
    )
    report = cache.report()
    page = report._repr_html_()
    Reader(page)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", page)]
    expected = [100 * sum(rows) / (2 * report.tokens_seen) for rows in report.layer_lengths]
    assert widths == pytest.approx(expected, abs=0.01)
    assert f"{report.retention:.1%}" in page and f"{report.retention:.1%}" in repr(report) and len(repr(report)) < 120


def test_texts_are_shown_and_never_read_as_markup() -> None:
    evil = "<script>alert('x')</script> & \"more\""
    for page in (markup.table(evil, {evil: evil}), markup.bars(evil, [0.5], [evil])):
        assert evil in Reader(page).texts and "<script>" not in page
