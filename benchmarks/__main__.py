"""Run benchmarks: `python -m benchmarks [NAME ...] [--json]`. One line a row; with `--json` each is a JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import os
import pkgutil
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import Row
from trsp_core.errors import TrspError
from trsp_core.runs.recorder import environment


def names() -> list[str]:
    """Every module of this folder but the runner; `recording` makes what ships, and is called by itself."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(m.name for m in modules if not m.name.startswith("_") and not m.ispkg)


def main(words: list[str] | None = None) -> int:
    """Run what is named; all, where nothing is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names()))
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--minutes", type=float, help="how long the sessions of `load` stay")
    parser.add_argument("--watchers", type=int, help="sessions of `load` that watch a run")
    parser.add_argument("--togglers", type=int, help="sessions of `load` that toggle layers")
    arguments = parser.parse_args(words)
    how = {k: v for k, v in vars(arguments).items() if k in ("minutes", "watchers", "togglers") and v is not None}
    wrong = [name for name in arguments.names if name not in names()]
    if wrong:
        parser.error(f"there is no benchmark {wrong[0]}; there are {', '.join(names())}")
    code = 0
    for name in arguments.names or names():
        try:
            for found in importlib.import_module(f"benchmarks.{name}").run(**(how if name == "load" else {})):
                tell(found, arguments.json)
        except TrspError as error:  # a machine without a GPU, or without a browser
            print(f"{name}: {error.message} {error.remedy}", file=sys.stderr)
            code = 2 if arguments.names else code
    return code


def tell(found: Row, as_json: bool) -> None:
    """Print one row."""
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "day": str(datetime.date.today()), **machine()}), flush=True)
        return
    sign = "at most" if found.better == "lower" else "at least"
    aim = f"aim {sign} {found.aim}, " if found.aim is not None else ""
    print(f"{found.benchmark}: {found.ratio} ({aim}spread {found.spread})", flush=True)
    for fact, value in found.facts.items():
        print(f"    {fact}: {value}", flush=True)


@functools.cache
def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"machine": {"processor": models[0] if models else platform.processor(), "cores": os.cpu_count()}} | {
        "versions": environment()
    }


if __name__ == "__main__":
    sys.exit(main())
