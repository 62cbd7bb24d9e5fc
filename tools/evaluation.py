"""Turns a results file of `kvcompress evaluate` into a table of docs/evaluation.md: perplexity and its bounds.

    python tools/evaluation.py grid.jsonl

`tools/pictures.py evaluation-shapes evaluation-smollm2` draws the pictures from the tables on that page.
"""

import sys
from pathlib import Path

from kvcompress.evaluation import read_results

METRIC = "perplexity"


def main() -> None:
    """Prints the table."""
    (path,) = sys.argv[1:]
    print(table(read_results(Path(path))))


def table(rows: list[dict]) -> str:
    """Rows of presets, best first at a fifth of the tokens; columns of budgets."""
    full, cells = rows[0], {(row["policy"], row["budget"]): row["metrics"][METRIC] for row in rows[1:]}
    budgets = sorted({budget for _, budget in cells if budget < 1})
    policies = sorted({p for p, budget in cells if budget < 1}, key=lambda policy: cells[policy, 0.2]["value"])
    lines = [
        f"| preset | {' | '.join(f'{budget:g}' for budget in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for policy in policies:
        figures = " | ".join(figure(cells[policy, budget]) for budget in budgets)
        lines.append(f"| `{policy}` | {figures} |")
    whole = {policy: metric for (policy, budget), metric in cells.items() if budget == 1}
    named = [
        f"{policy}: {figure(metric)}" for policy, metric in {full["policy"]: full["metrics"][METRIC], **whole}.items()
    ]
    return "\n".join([f"{'; '.join(named)}; {full['samples']} samples", "", *lines])


def figure(metric: dict) -> str:
    """A value and its bounds."""
    return f"{metric['value']:.2f} ({metric['ci_low']:.2f}-{metric['ci_high']:.2f})"


if __name__ == "__main__":
    main()
