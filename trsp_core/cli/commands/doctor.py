"""`doctor`: what is here, without touching anything."""

import os
import platform
from typing import Any

from trsp_core import machine, paths
from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.data import corpora
from trsp_core.models import catalog
from trsp_core.preparation import forecast
from trsp_core.runs import recorder
from trsp_core.schema.config import TEXTS, RunConfig


@command("doctor")
def main(as_json: bool) -> None:
    versions = recorder.environment()
    report: dict[str, dict[str, Any]] = {
        "versions": versions,
        "models": {name: "ready" if catalog.is_ready(name) else "not fetched" for name in catalog.CATALOGUE},
        "texts": {name: _text_state(name, versions) for name in TEXTS},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "gpu": forecast.on_gpu(RunConfig()),
            "free_memory_gb": round(machine.available_memory() / 1e9, 1),
            "gflops": machine.read_rate(),
        },
        "folders": {"runs": str(paths.runs_root()), "cache": str(paths.home())},
    }
    lines = [line for part, values in report.items() for line in (part, *map(_line, values.items()))]
    output.show_either(report, "\n".join(lines), as_json)


def _line(entry: tuple[str, Any]) -> str:
    name, value = entry
    return f"  {name}: {'not measured yet' if name == 'gflops' and value is None else value}"


def _text_state(name: str, versions: dict[str, str]) -> str:
    package = "datasets" if name in corpora.FROM_HUB else "gensim"
    if versions[package] == "not installed":
        return f"{package} is not installed"
    return "needs the hub" if package == "datasets" else "ready"
