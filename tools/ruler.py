"""Turns a results file of `kvcompress evaluate` on RULER's records into the table of docs/evaluation.md.

    python tools/ruler.py ruler-1k-grid.jsonl

prints a row for each task that the full cache does to at least a fifth, with its score and every cache's, in percent
and with 95 % bootstrap bounds, and names the others.
"""

import sys
from pathlib import Path

from kvcompress.evaluation import read_results

METRIC, LEAST = "string_match", 0.2


def main() -> None:
    """Prints the table of each file."""
    for path in map(Path, sys.argv[1:]):
        print(table(read_results(path)))


def table(rows: list[dict]) -> str:
    """Tasks by caches, and what was left out."""
    full, *others = rows
    tasks = full.get("by_kind") or {"all": {"samples": full["samples"], **full["metrics"]}}
    heads = [f"`{row['policy']}` {row['budget']:g}" for row in others]
    lines = [
        f"{full['model']} in {full['dtype']}, question {full['question']}, seed {full['seed']}, {full['versions']}",
        "",
    ]
    lines += [f"| task | samples | {' | '.join(['full cache', *heads])} |", f"|---|{'---|' * (len(rows) + 1)}"]
    left = []
    for task, found in tasks.items():
        if found[METRIC]["value"] < LEAST:
            left.append(f"{task} ({100 * found[METRIC]['value']:.0f})")
            continue
        cells = [figure((row.get("by_kind") or {task: row["metrics"]})[task][METRIC]) for row in rows]
        lines.append(f"| `{task}` | {found['samples']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Left out, the full cache being below 20 %: {', '.join(left) or 'none'}."])


def figure(metric: dict) -> str:
    """A value and its bounds in percent."""
    return f"{100 * metric['value']:.0f} ({100 * metric['ci_low']:.0f}-{100 * metric['ci_high']:.0f})"


if __name__ == "__main__":
    main()
