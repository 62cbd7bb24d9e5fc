"""Turns a results file of `kvcompress evaluate` into the table and the picture of docs/evaluation.md.

    python tools/evaluation.py grid.jsonl shapes

prints the table (perplexity and its bounds for each preset and budget) and writes docs/images/evaluation-shapes.png,
which shows the presets that are named after these two, or all of them.
"""

import sys
from pathlib import Path

from pictures import save_small

from kvcompress.evaluation import read_results
from kvcompress.evaluation.plots import quality

METRIC = "perplexity"


def main() -> None:
    """Prints the table and draws the picture."""
    path, name, *shown = sys.argv[1:]
    rows = read_results(Path(path))
    print(table(rows))
    wanted = [row for row in rows if not shown or row["policy"] in (*shown, rows[0]["policy"])]
    save_small(f"evaluation-{name}", quality(wanted, METRIC))


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
