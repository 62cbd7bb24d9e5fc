"""Writes the pages of the documentation that follow from the code: `python tools/composition.py`."""

from pathlib import Path

from kvcompress.config.composition import as_markdown, presets_as_markdown
from kvcompress.files import write_text

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {DOCS / "composition.md": as_markdown, DOCS / "policies" / "presets.md": presets_as_markdown}

if __name__ == "__main__":
    for page, write in PAGES.items():
        write_text(page, write(), "page")
