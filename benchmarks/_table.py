"""`python -m benchmarks._table`: writes the rows of `benchmarks/results.jsonl`, and those of a GPU in
`benchmarks/gpu.jsonl`, into the README, each between two marks.

The last row of each name counts, so that a benchmark that was run again can be appended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
END = "<!-- end of benchmarks -->"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, a line a benchmark that has an aim."""
    told = ["| benchmark | ratio | spread | aim | reached |", "|---|---|---|---|---|"]
    return told + [f"| {name} | {_figures(row)} |" for name, row in rows.items() if row["aim"] is not None]


def gpu_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The same of a GPU, with tokens a second, and memory over that of the weights."""
    heads = "model and step | share | spread | aim | reached | tokens/s | peak, GB | over the weights"
    told = [f"| {heads} |", "|---" * 8 + "|"]
    for name, row in rows.items():
        facts = row["facts"]
        peak, held = facts["peak_gb"], facts["weights_gb"]
        seen = f"{facts['tokens_per_second']:,} | {peak:.1f} | {peak / held:.1f}"
        told.append(f"| {name.removesuffix(': share of the matrix rate')} | {_figures(row)} | {seen} |")
    return told


def _figures(row: dict[str, Any]) -> str:
    lower = row["better"] == "lower"
    reached = row["ratio"] <= row["aim"] if lower else row["ratio"] >= row["aim"]
    low, high = row["spread"]
    aim = f"{'at most' if lower else 'at least'} {row['aim']}"
    return f"{row['ratio']} | {low} to {high} | {aim} | {'yes' if reached else '**no**'}"


FILES = "gpu.jsonl", "results.jsonl"  # `make bench` on a machine with a GPU has its rows in the second
TABLES: dict[str, Callable[[dict[str, dict[str, Any]]], list[str]]] = {
    "<!-- benchmarks: made by `make bench` -->": table,
    "<!-- benchmarks: made by `python -m benchmarks gpu` -->": gpu_table,
}


def main() -> None:
    """Put the tables into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    lines = [line for name in FILES for line in (ROOT / "benchmarks" / name).read_text("utf-8").splitlines()]
    rows = {row["benchmark"]: row for row in map(json.loads, lines)}
    for mark, make in TABLES.items():
        own = {name: row for name, row in rows.items() if ("device" in row["facts"]) == (make is gpu_table)}
        inside = "\n".join([mark, *make(own), END])
        pattern = re.escape(mark) + ".*?" + re.escape(END)
        text = re.sub(pattern, lambda _, inside=inside: inside, text, flags=re.S)
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
