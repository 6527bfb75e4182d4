"""`python -m benchmarks._table` writes the tables that are made from records into README.md and docs/, each between two
marks. With `--check` it writes nothing, and fails where a file says something else than its records.

The records are `benchmarks/results.jsonl` and `benchmarks/gpu.jsonl`, where the last row of each name counts, so that a
benchmark that was run again can be appended; and those in `assets/evidence/`. A sweep that was recorded on several
splits has its tables in docs/results.md, without a mark of its own.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results, lost_steps, plan_results, studies
from trsp_core.schema.events import DOMAINS

ROOT = Path(__file__).parent.parent
FILES = "gpu.jsonl", "results.jsonl"  # `make bench` on a machine with a GPU has its rows in the second
END = {"benchmarks": "<!-- end of benchmarks -->", "evidence": "<!-- end of evidence -->"}
HEADLINE = "dense", "direct", "trsp", "fade", "delete_first"
RATIOS = (  # what, record of a sweep, seed, arm, its control with the same loss
    ("fade out", "length", 0, "fade", "control"),
    ("fade out, seed 1", "seeds", 1, "fade", "control"),
    ("fade out, half distilled", "length", 0, "fade_distil", "control_distil"),
    ("fade out, half distilled", "long", 0, "fade_distil", "control_distil"),
    ("fade out, half distilled", "longest", 0, "fade_distil", "control_distil"),
    ("TRSP's penalty alone", "length", 0, "trsp", "control"),
)
Rows = dict[str, dict[str, Any]]


def table(rows: Rows) -> list[str]:
    """Markdown, a line a benchmark that has an aim."""
    lines = ["| benchmark | ratio | spread | aim | reached |", "|---|---|---|---|---|"]
    return lines + [f"| {name} | {_figures(row)} |" for name, row in rows.items() if row["aim"] is not None]


def gpu_table(rows: Rows) -> list[str]:
    """The same of a GPU, with tokens a second, and memory over that of the weights."""
    heads = "model and step | share | spread | aim | reached | tokens/s | peak, GB | over the weights"
    lines = [f"| {heads} |", "|---" * 8 + "|"]
    for name, row in rows.items():
        facts = row["facts"]
        peak, held = facts["peak_gb"], facts["weights_gb"]
        seen = f"{facts['tokens_per_second']:,} | {peak:.1f} | {peak / held:.1f}"
        lines.append(f"| {name.removesuffix(': share of the matrix rate')} | {_figures(row)} | {seen} |")
    return lines


def evidence_table(plan: str) -> list[str]:
    """The rows of the recorded plan, with intervals, KL to the dense model, and the layers that went."""
    heads, *rows = plan_results.cells(plan_results.load(plan_results.shipped(plan)))
    heads[heads.index("KL")] = "KL, nats a token"
    return markdown([heads, *([*row[:-1], re.sub(r",(?=[0-9])", ", ", row[-1])] for row in rows)])


def markdown(cells: list[list[str]]) -> list[str]:
    """A table whose first row is its head."""
    heads, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [heads, "|---" * len(cells[0]) + "|", *rows]


def study_tables() -> list[str]:
    """Of each recorded study a heading and its tables: the means over splits, or of a study of ratios where each
    treatment breaks; and how far each choice depends on the split. Those of the most splits come first."""
    records = (grid_results.load(file) for file in sorted(grid_results.shipped().glob("*.json")))
    recorded = sorted(filter(None, map(studies.read, records)), key=lambda study: -len(study.splits))
    lines: list[str] = []
    for study in recorded:
        by_ratio = any(row.ratio is not None for row in study.rows)
        tables = [studies.ratio_cells(study) if by_ratio else studies.cells(study), studies.spread_cells(study)]
        lines += ["", f"### {study.sweep.title}", "", f"Splits: {len(study.splits)}. Made {study.sweep.made}."]
        for cells in tables:
            lines += ["", *markdown(cells)] if len(cells) > 1 else []
    return [*lines[1:], ""]


def headline_table() -> list[str]:
    """A few rows of the plan `ablation`, perplexities alone."""
    record = plan_results.load(plan_results.shipped("ablation"))
    kept = [[title, *figures[1:3]] for title, *figures in plan_results.cells(record)]
    chosen = [cells for row, cells in zip(record.rows, kept[1:], strict=True) if row.name in HEADLINE]
    return [f"| {' | '.join(kept[0])} |", "|---|---|---|", *(f"| {' | '.join(cells)} |" for cells in chosen)]


def ratio_table() -> list[str]:
    """Perplexity of arms of the recorded sweeps as multiples of their control's at the same number of steps."""
    lines = ["| | steps | calibration domain | held-out domain |", "|---|---|---|---|"]
    for what, name, seed, arm, other in RATIOS:
        sweep = grid_results.load(ROOT / "assets" / "evidence" / "sweeps" / f"{name}.json")
        controls = {p.steps: p for p in sweep.of(other) if p.seed == seed}
        for point in sorted((p for p in sweep.of(arm) if p.seed == seed), key=lambda p: p.steps):
            pairs = [(point.losses[d], controls[point.steps].losses[d]) for d in DOMAINS]
            cells = [f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (intervals.factor(*pair) for pair in pairs)]
            lines.append(f"| {what} | {point.steps} | {' | '.join(cells)} |")
    return lines


def lost_steps_table() -> list[str]:
    """What a step of fading is worth, by the recorded sweeps, in both domains; and in sentences."""
    sweep, (first, *heads) = lost_steps.recorded(), lost_steps.HEADS
    lines = [f"| {' | '.join([first, 'domain', *heads])} |", "|---" * (len(heads) + 2) + "|"]
    laws = {domain: lost_steps.of_sweep(sweep, domain) for domain in DOMAINS}
    for domain, arms in laws.items():
        for arm, *cells in lost_steps.table(arms):
            lines.append(f"| {' | '.join([arm, lost_steps.DOMAIN_NAMES[domain], *cells])} |")
    return [*lines, "", *textwrap.wrap(" ".join(lost_steps.sentences(laws)), 120)]


def _figures(row: dict[str, Any]) -> str:
    lower = row["better"] == "lower"
    reached = row["ratio"] <= row["aim"] if lower else row["ratio"] >= row["aim"]
    low, high = row["spread"]
    aim = f"{'at most' if lower else 'at least'} {row['aim']}"
    return f"{row['ratio']} | {low} to {high} | {aim} | {'yes' if reached else '**no**'}"


def tables() -> dict[str, dict[str, list[str]]]:
    """Every table, by the file that it stands in and the mark before it."""
    lines = [line for name in FILES for line in (ROOT / "benchmarks" / name).read_text("utf-8").splitlines()]
    rows: Rows = {row["benchmark"]: row for row in map(json.loads, lines)}
    of_gpu = {name: row for name, row in rows.items() if "device" in row["facts"]}
    others = {name: row for name, row in rows.items() if name not in of_gpu}
    made = "made by `python -m benchmarks._table`"
    return {
        "README.md": {f"<!-- evidence: headline, {made} -->": headline_table()},
        "docs/benchmarks.md": {
            "<!-- benchmarks: made by `make bench` -->": table(others),
            "<!-- benchmarks: made by `python -m benchmarks gpu` -->": gpu_table(of_gpu),
        },
        "docs/results.md": {
            f"<!-- evidence: ablation, {made} -->": evidence_table("ablation"),
            f"<!-- evidence: methods, {made} -->": evidence_table("methods"),
            f"<!-- evidence: transfers, {made} -->": evidence_table("transfers"),
            f"<!-- evidence: against the control, {made} -->": ratio_table(),
            f"<!-- evidence: over splits, {made} -->": study_tables(),
            f"<!-- evidence: lost steps, {made} -->": lost_steps_table(),
        },
    }


def with_tables(text: str, by_mark: dict[str, list[str]]) -> str:
    """`text` with each table between its mark and the next end.

    Raises:
        ValueError: a mark or its end is missing, or stands there twice.
    """
    for mark, lines in by_mark.items():
        end = END[mark.split()[1].rstrip(":")]
        if text.count(mark) != 1 or end not in text.split(mark)[1]:
            raise ValueError(f"{mark} has to stand there once, and {end} behind it")
        before, rest = text.split(mark)
        text = "\n".join([f"{before}{mark}", *lines, f"{end}{rest.split(end, 1)[1]}"])
    return text


def main(check: bool) -> int:
    """Write the tables, or say which files differ from their records; then the exit code is 1."""
    code = 0
    for name, by_mark in tables().items():
        now = (ROOT / name).read_text("utf-8")
        wanted = with_tables(now, by_mark)
        if not check:
            (ROOT / name).write_text(wanted, "utf-8")
        elif now != wanted:
            print(f"{name}: a table is not what its records say. Run: python -m benchmarks._table", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
