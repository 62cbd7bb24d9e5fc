"""Turns a results file of `kvcompress evaluate` into tables of docs/evaluation.md: perplexity, and paired differences.

    python tools/evaluation.py grid.jsonl

`tools/pictures.py evaluation-shapes evaluation-smollm2` draws the pictures from the tables on that page.
"""

import sys
from collections import defaultdict
from pathlib import Path

from kvcompress.evaluation import read_results, read_samples
from kvcompress.evaluation.bootstrap import ratio_interval

METRIC, BASE = "perplexity", "uniform"
Samples = dict[tuple[str, float], dict[str, tuple[float, int]]]  # nats and tokens of each, by preset and budget


def main() -> None:
    """Prints the tables."""
    (path,) = sys.argv[1:]
    rows = read_results(Path(path))
    print(table(rows))
    samples = by_cell(rows, read_samples(Path(path)))
    print(paired(samples, {budget: (BASE, budget) for _, budget in samples if (BASE, budget) in samples}))
    best = {
        budget: min((key for key in samples if key[1] == budget), key=lambda key: nats(samples[key]))
        for _, budget in samples
    }
    print(paired(samples, best))


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
        figures = " | ".join(figure(cells.get((policy, budget))) for budget in budgets)
        lines.append(f"| `{policy}` | {figures} |")
    whole = {policy: metric for (policy, budget), metric in cells.items() if budget == 1}
    named = [
        f"{policy}: {figure(metric)}" for policy, metric in {full["policy"]: full["metrics"][METRIC], **whole}.items()
    ]
    return "\n".join([f"{'; '.join(named)}; {full['samples']} samples", "", *lines])


def by_cell(rows: list[dict], samples: list[dict]) -> Samples:
    """What every preset that evicts lost on each sample."""
    cells = {row["cell"]: (row["policy"], row["budget"]) for row in rows[1:] if row["budget"] < 1}
    found: Samples = defaultdict(dict)
    for sample in samples:
        if sample.get("cell") in cells and "nll" in sample:
            found[cells[sample["cell"]]][sample["sample"]] = (sample["nll"], sample["answer_tokens"])
    return dict(found)


def nats(cell: dict[str, tuple[float, int]]) -> float:
    """Mean negative log-likelihood of a token."""
    return sum(nll for nll, _ in cell.values()) / sum(tokens for _, tokens in cell.values())


def paired(samples: Samples, others: dict[float, tuple[str, float]]) -> str:
    """Nats a token more than another preset at each budget, on the same samples; in bold beyond the bounds."""
    budgets = sorted(others)
    policies = sorted({policy for policy, _ in samples}, key=lambda policy: nats(samples[policy, 0.2]))
    named = " | ".join(f"{budget:g}, `{others[budget][0]}`" for budget in budgets)
    lines = ["", f"| nats a token more than | {named} |", f"|---|{'---|' * len(budgets)}"]
    for policy in policies:
        cells = [difference(samples.get((policy, budget)), samples[others[budget]]) for budget in budgets]
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(own: dict[str, tuple[float, int]] | None, other: dict[str, tuple[float, int]]) -> str:
    """How many nats a token more, with bounds over samples; in bold where they leave out zero."""
    if own is None or own is other:
        return "-"
    both = sorted(own.keys() & other.keys())
    more, tokens = [own[name][0] - other[name][0] for name in both], [own[name][1] for name in both]
    one, low, high = ratio_interval(more, tokens)
    text = f"{one:+.2f} ({low:+.2f}..{high:+.2f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def figure(metric: dict | None) -> str:
    """A value and its bounds; a line where nobody measured."""
    return "-" if metric is None else f"{metric['value']:.2f} ({metric['ci_low']:.2f}-{metric['ci_high']:.2f})"


if __name__ == "__main__":
    main()
