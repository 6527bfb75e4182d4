"""`python -m benchmarks._table`: writes the rows of `benchmarks/results.jsonl` into the README, between two marks.

The last row of each name counts, so that a benchmark that was run again can be appended.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
MARKS = "<!-- benchmarks: made by `make bench` -->", "<!-- end of benchmarks -->"


def table(lines: list[str]) -> str:
    """Markdown, a line a benchmark that has an aim."""
    rows = {row["benchmark"]: row for row in map(json.loads, lines)}
    told = ["| benchmark | ratio | spread | aim | reached |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if row["aim"] is None:
            continue
        lower = row["better"] == "lower"
        reached = row["ratio"] <= row["aim"] if lower else row["ratio"] >= row["aim"]
        low, high = row["spread"]
        aim = f"{'at most' if lower else 'at least'} {row['aim']}"
        told.append(f"| {name} | {row['ratio']} | {low} to {high} | {aim} | {'yes' if reached else '**no**'} |")
    return "\n".join(told)


def main() -> None:
    """Put the table into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    inside = table(RESULTS.read_text("utf-8").splitlines())
    new = re.sub(
        re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]),
        lambda _: f"{MARKS[0]}\n{inside}\n{MARKS[1]}",
        text,
        flags=re.S,
    )
    readme.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
