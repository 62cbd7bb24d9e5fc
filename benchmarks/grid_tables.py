"""Tables of what `benchmarks.grid` measured, with intervals over prompts: `python -m benchmarks.grid_tables FOLDER`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.evaluation.bootstrap import ratio_interval
from kvcompress.evaluation.pages import KINDS

Outcome = tuple[float, int, int]  # nats, tokens, 1 if all of them were the likeliest
Key = tuple[str, str, str, float]  # what follows, method, way, budget
FULL = ("full", "", 1.0)


def outcomes(file: Path) -> dict[Key, dict[str, list[Outcome]]]:
    """What each way gave for every prompt, by "task name" and prompt; rows of a batch are prompts of their own.

    Many questions on one document belong to that document, so that bounds are over documents. Questions of every kind
    about scenes, and about pages, are one task.
    """
    found: dict[Key, dict[str, list[Outcome]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        for name, rows in row["found"].items():
            asked = name in KINDS or (row["task"] == "image" and name != "description")
            named = "question" if asked else name
            key = (f"{row['task']} {named}", row["method"], row["way"], row["budget"])
            own = found.setdefault(key, {})
            for number, (nats, tokens, right) in enumerate(rows):
                prompt = f"{row['prompt']} {number}" if row["task"] in ("seen", "unseen") else row["prompt"].split()[0]
                own.setdefault(prompt, []).append((nats, tokens, right))
    return found


def figures(prompts: dict[str, list[Outcome]], kind: str) -> tuple[list[float], list[float]]:
    """Sums over each prompt: right answers and their number, or nats and tokens."""
    above, below = [], []
    for name in sorted(prompts):
        rows = prompts[name]
        above.append(float(sum(row[2] if kind == "right" else row[0] for row in rows)))
        below.append(float(len(rows) if kind == "right" else sum(row[1] for row in rows)))
    return above, below


def value(prompts: dict[str, list[Outcome]], kind: str) -> str:
    """Share of right answers in percent, or nats a token, with bounds."""
    scale = 100 if kind == "right" else 1
    one, low, high = (scale * figure for figure in ratio_interval(*figures(prompts, kind)))
    return f"{one:.0f} ({low:.0f}-{high:.0f})" if kind == "right" else f"{one:.2f} ({low:.2f}-{high:.2f})"


def difference(prompts: dict[str, list[Outcome]], other: dict[str, list[Outcome]], kind: str) -> str:
    """How much more than another on the same prompts, with bounds; in bold where they leave out zero."""
    both = sorted(set(prompts) & set(other))
    (own, below), (theirs, _) = (figures({name: one[name] for name in both}, kind) for one in (prompts, other))
    scale = 100 if kind == "right" else 1
    less = [a - b for a, b in zip(own, theirs, strict=True)]
    one, low, high = (scale * figure for figure in ratio_interval(less, below))
    digits = 0 if kind == "right" else 2
    text = f"{one:+.{digits}f} ({low:+.{digits}f}..{high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(found: dict[Key, dict[str, list[Outcome]]], task: str, kind: str, ways: Sequence[str]) -> list[str]:
    """One task: for every method and budget the first way, and how the others differ from it."""
    every = [key for key in found if key[0] == task and key[2] in ways]
    whole: Key = (task, *FULL)
    what = "right answers, %" if kind == "right" else "nats a token, lower is better"
    lines = [f"{task}, {what}; full cache {value(found[whole], kind)}, {len(found[whole])} prompts", ""]
    lines += [f"| scorer | budget | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    for method, budget in sorted({(key[1], key[3]) for key in every}):
        own = {key[2]: found[key] for key in every if (key[1], key[3]) == (method, budget)}
        base = own.get(ways[0])
        cells = ["-" if base is None else value(base, kind)]
        for name in ways[1:]:
            if name not in own:
                cells.append("-")
            else:
                cells.append(value(own[name], kind) if base is None else difference(own[name], base, kind))
        lines.append(f"| {method} | {budget} | {' | '.join(cells)} |")
    return [*lines, ""]


def main(
    file: Annotated[Path, typer.Argument(help="A suite's lines of JSON.")],
    ways: Annotated[str, typer.Option(help="The first is what the others are compared with; all if left out.")] = "",
    task: Annotated[str, typer.Option(help="Beginning of a task's name; all if left out.")] = "",
    kind: Annotated[str, typer.Option(help="right, nats, or both if left out.")] = "",
) -> None:
    """Prints a table for each task and figure."""
    found = outcomes(file)
    for name in dict.fromkeys(key[0] for key in found):
        if not name.startswith(task):
            continue
        known = [key[2] for key in found if key[0] == name and key[1:] != FULL]
        chosen = [way for way in (ways.split(";") if ways else dict.fromkeys(["uniform", *known])) if way in known]
        for one in [kind] if kind else ["nats"] if name.endswith("text") else ["right", "nats"]:
            print("\n".join(table(found, name, one, chosen)))


if __name__ == "__main__":
    typer.run(main)
