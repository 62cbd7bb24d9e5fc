"""Turns a results file of `kvcompress evaluate` on RULER's records into the table of docs/evaluation.md.

    python tools/ruler.py ruler-1k-grid.jsonl

prints a row for each task that the full cache does to at least a fifth, with its score and every cache's, in percent
and with 95 % bootstrap bounds; a row for all these tasks' samples; and a row of what a cache has more than the full one
on the same samples. The other tasks are named.
"""

import sys
from collections import defaultdict
from pathlib import Path

from kvcompress.evaluation import read_results, read_samples
from kvcompress.evaluation.bootstrap import ratio_interval

METRIC, LEAST = "string_match", 0.2
Found = dict[str, dict[str, float]]  # by sample, of each cell


def main() -> None:
    """Prints the table of each file."""
    for path in map(Path, sys.argv[1:]):
        print(table(read_results(path), read_samples(path)))


def table(rows: list[dict], samples: list[dict]) -> str:
    """Tasks by caches, all of them together, and what was left out."""
    full, *others = rows
    tasks = full.get("by_kind") or {"all": {"samples": full["samples"], **full["metrics"]}}
    heads = [f"`{row['policy']}` {row['budget']:g}" for row in others]
    lines = [
        f"{full['model']} in {full['dtype']}, question {full['question']}, seed {full['seed']}, {full['versions']}",
        "",
    ]
    lines += [f"| task | samples | {' | '.join(['full cache', *heads])} |", f"|---|{'---|' * (len(rows) + 1)}"]
    left, found = [], by_cell(samples, {task for task, score in tasks.items() if score[METRIC]["value"] >= LEAST})
    for task, score in tasks.items():
        if score[METRIC]["value"] < LEAST:
            left.append(f"{task} ({100 * score[METRIC]['value']:.0f})")
            continue
        cells = [(row.get("by_kind") or {task: row["metrics"]})[task][METRIC] for row in rows]
        figures = [figure(cell["value"], cell["ci_low"], cell["ci_high"]) for cell in cells]
        lines.append(f"| `{task}` | {score['samples']} | {' | '.join(figures)} |")
    known = found[full["cell"]]
    everything = [mean(list(found[row["cell"]].values())) for row in rows]
    lines.append(f"| all of these | {len(known)} | {' | '.join(everything)} |")
    more = [more_than(found[row["cell"]], known) for row in others]
    lines.append(f"| more than the full cache | {len(known)} | - | {' | '.join(more)} |")
    return "\n".join([*lines, "", f"Left out, the full cache being below 20 %: {', '.join(left) or 'none'}."])


def by_cell(samples: list[dict], tasks: set[str]) -> Found:
    """Every cell's score of each sample of some tasks."""
    found: Found = defaultdict(dict)
    for sample in samples:
        if METRIC in sample and (tasks == {"all"} or sample.get("kind") in tasks):
            found[sample["cell"]][sample["sample"]] = sample[METRIC]
    return found


def more_than(own: dict[str, float], other: dict[str, float]) -> str:
    """Points more on the same samples, in bold where the bounds leave out zero."""
    both = sorted(own.keys() & other.keys())
    more, low, high = ratio_interval([own[name] - other[name] for name in both], [1.0] * len(both))
    text = f"{100 * more:+.0f} ({100 * low:+.0f}..{100 * high:+.0f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def mean(scores: list[float]) -> str:
    """The mean of samples and its bounds in percent."""
    return figure(*ratio_interval(scores, [1.0] * len(scores)))


def figure(value: float, low: float, high: float) -> str:
    """A value and its bounds in percent."""
    return f"{100 * value:.0f} ({100 * low:.0f}-{100 * high:.0f})"


if __name__ == "__main__":
    main()
