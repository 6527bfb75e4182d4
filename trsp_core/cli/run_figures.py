"""A run on the command line: found by its name, its figures in words, and how far it is."""

from typing import Any

import click

from trsp_core import escaping, formatting, paths
from trsp_core.runs.store import Run, Store
from trsp_core.schema import codec, turns
from trsp_core.schema.events import KnobTurned, LayersNarrowed
from trsp_core.schema.run_state import RunState


def find(name: str) -> Run:
    """A run, by id or by folder.

    Raises:
        TrspError: there is none.
    """
    folder = paths.folder(name)
    return Run(folder) if folder and (folder / "config.json").is_file() else Store().get(name)


run_argument = click.argument("run", type=find, metavar="RUN", help="a run's id, or its folder")


def figures(run: Run) -> dict[str, Any]:
    """The summary of a run, with its id, folder and status."""
    return {"run": run.id, "folder": str(run.folder), "status": run.status(), **run.summary()}


def account(figures: dict[str, Any]) -> str:
    """The figures of a run (see `figures`; `status` may be missing) in lines for people."""
    status = formatting.status(figures.get("status") or figures["ended"] or "unfinished")
    lines = [f"Run {figures['run']}: {status}"]
    if figures["model"]:
        lines.append(f"model {figures['model']}, {figures['n_layers']} layers")
    if figures["parameters"]:
        before, after = figures["parameters"]["dense"], figures["parameters"]["pruned"]
        narrowed = figures.get("narrowed")
        removal = f"removed layers {', '.join(map(str, figures['removed']))}"
        lines.append(f"no layer removed, all narrowed: {LayersNarrowed(**narrowed).sentence}" if narrowed else removal)
        change = formatting.signed_percent(after / max(before, 1) - 1)
        lines.append(f"parameters {formatting.count(before)} to {formatting.count(after)} ({change})")
    elif figures["chosen"]:
        lines.append(f"chosen so far {', '.join(map(str, figures['chosen']))}")
    for domain, by_state in figures["perplexity"].items():
        if by_state:
            perplexities = ", ".join(f"{state} {formatting.perplexity(v)}" for state, v in by_state.items())
            lines.append(f"perplexity, {domain}: {perplexities}")
    if sentence := turns.account([codec.build(KnobTurned, turn) for turn in figures.get("turns", [])]):
        lines.append(sentence)
    for kind in ("prefill", "decode"):
        speeds = {s: v[kind] for s, v in figures["speed"].items() if s != "ceiling"}
        if speeds:
            lines.append(f"{kind}, tokens/s: " + ", ".join(f"{s} {formatting.rate(v)}" for s, v in speeds.items()))
    lines.append(f"{formatting.duration(figures['seconds']['total'])} in all")
    if missing := figures.get("missing_events"):
        lines.append(f"{missing} events cannot be read, so that figures may be missing: events.jsonl is damaged")
    if figures["failure"]:
        lines += [f"failed: {figures['failure']['message']}", figures["failure"]["remedy"]]
    return "\n".join(map(escaping.line, lines))


def progress(state: RunState) -> str:
    """Where a run is, in one line: `[ 42%] choose 23/80, about 1:32 left`."""
    seconds_left = state.seconds_left
    count = f" {state.done}/{state.units}" if state.units else ""
    if state.paused:
        return f"[{formatting.progress(state.fraction)}] {escaping.line(state.phase or 'start')}{count}, paused"
    return f"[{formatting.progress(state.fraction)}] {escaping.line(state.phase or 'start')}{count}" + (
        f", about {formatting.clock(seconds_left)} left" if seconds_left is not None else ""
    )
