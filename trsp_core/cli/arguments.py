"""What the command line takes and how it speaks: its parser, made from the knobs, and the words for people. Prints
nothing itself."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from trsp_core import __version__, escaping
from trsp_core.evaluation import intervals, tasks
from trsp_core.experiments.runner import PlanEvent
from trsp_core.formatting import clock, millions, number
from trsp_core.models.architectures import FamilyRecord
from trsp_core.models.catalog import HubModel, SearchResult
from trsp_core.schema.config import GROUPS, KNOBS, PRESETS
from trsp_core.schema.events import DOMAINS, LayersNarrowed
from trsp_core.schema.knobs import Knob
from trsp_core.schema.run_state import RunState

EPILOG = "Exit codes: 0 done, 2 bad input, 3 failed, 130 cancelled."
COMMANDS = {
    "run": "prune a model, and write all that happens into a run folder",
    "resume": "go on with a run that was stopped, lost or failed, to the end that it would have had",
    "list": "the runs, newest first",
    "show": "the figures of one run",
    "methods": "the ways to choose layers",
    "families": "which architectures can be pruned, and the families with something particular to them",
    "compare": "run a plan: a base and its variations, each once, and print them in one table",
    "sweep": "run a grid: every point of it once, here or on a cluster, and write one small record of them",
    "eval": "let a model answer questions by likelihood: multiple choice, or the last word of a passage",
    "export": "a run's model to take away: a checkpoint folder with a card, proved by a fresh process",
    "report": "a run as one HTML file, charts inside, that opens offline",
    "curves": "a run's curves as CSV",
    "doctor": "what is installed, which models and texts are there, what the machine can do",
    "models": "the models that are there; with words, those of the hub; with owner/name, what the hub says of it",
    "fetch": "get a model onto this machine",
}


class _Parser(argparse.ArgumentParser):
    """Its refusals quote what was typed, file names that a shell has filled in among it."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments:.*?(--[\w-]+)|invalid choice: '([\w-]+)'", message)
        flags = [knob.flag for knob in KNOBS.values()]
        meant = unknown and difflib.get_close_matches(unknown[1] or unknown[2], [*flags, *COMMANDS], 1)
        super().error(escaping.line(message) + (f" (did you mean {meant[0]}?)" if meant else ""))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="python -m trsp_core",
        description="Prune whole layers out of a language model by TRSP, and watch it happen.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"trsp-explorer {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, text in COMMANDS.items():
        made[name] = commands.add_parser(
            name, allow_abbrev=False, help=text, description=text.capitalize() + ".", epilog=EPILOG
        )
    commands.add_parser("workbench")  # the server's child process for what-if and generation; not for people
    for name, command in made.items():
        command.add_argument("--json", action="store_true", help="print JSON on stdout" + _JSON.get(name, ""))
    for name in ("resume", "show", "export", "report", "curves"):
        made[name].add_argument("run", metavar="RUN", help="a run's id, or its folder")
    for name in ("report", "curves"):
        made[name].add_argument("--out", required=True, metavar="FILE", help="where it is written")
    _add_export_flags(made["export"])
    made["fetch"].add_argument("model", metavar="MODEL", help="a name of the catalogue, or a hub id (owner/name)")
    made["fetch"].add_argument("--accept-terms", action="store_true", help="of a model that has some; read them first")
    made["models"].add_argument("words", nargs="*", metavar="WORD", help="to search for, or a hub id (owner/name)")
    made["compare"].add_argument(
        "--plan", required=True, metavar="FILE", help="a JSON file, or a built-in plan: ablation, methods"
    )
    made["compare"].add_argument("--out", metavar="FILE", help="also write the record here, as JSON")
    made["sweep"].add_argument("--grid", required=True, metavar="FILE", help="a JSON file: base, axes, arms")
    made["sweep"].add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask scheduler whose workers share the folder of runs"
    )
    made["sweep"].add_argument("--out", metavar="FILE", help="also write the record here, as JSON")
    _add_eval_flags(made["eval"])
    _add_run_flags(made["run"])
    return top


_JSON = {
    "run": ": the summary, at the end",
    "resume": ": the summary, at the end",
    "fetch": ": one object a line, as it goes",
    "export": ": one object a line, as it goes",
}


def _add_export_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="a new folder, or a file that ends in .zip; default a folder in the run's exports",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="convert the weights; default as the run saved them",
    )
    command.add_argument(
        "--push",
        metavar="OWNER/NAME",
        default="",
        help="also upload it to the hub, to a repository that is made private, with the token in HF_TOKEN or of the "
        "hub's own login",
    )


def _add_eval_flags(command: argparse.ArgumentParser) -> None:
    text = KNOBS["heldout"]
    command.add_argument("model", metavar="RUN|MODEL", help="a run whose model was kept, or a model as for run")
    command.add_argument(
        "--task",
        required=True,
        nargs="+",
        metavar="TASK",
        help=f"JSONL files of questions, last_word, or from the hub {', '.join(tasks.TASKS)}",
    )
    command.add_argument("--limit", metavar="N", help="only the first N questions of each task, 1 or more")
    command.add_argument("--text", default=text.default, help=f"where last words are taken from ({text.default})")


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=tuple(PRESETS), help="start from these settings; flags change them")
    command.add_argument("--out", metavar="FOLDER", help="the run's folder; default a new one under runs/")
    command.add_argument("--folder", help=argparse.SUPPRESS)  # execute the config.json that is there: `queue`
    for group, title in GROUPS.items():
        section = command.add_argument_group(title)
        for knob in KNOBS.values():
            if knob.group == group:
                _add_flag(section, knob)


def _add_flag(section: argparse._ArgumentGroup, knob: Knob) -> None:
    """One flag. Values stay text here: `validate.from_values` reads them, as it does for the page."""
    facts = [f"paper: {knob.paper}"] if knob.paper else []
    if knob.low is not None or knob.high is not None:
        facts.append(knob.bounds)
    facts.append(f"default {knob.default!r}" if knob.kind is str else f"default {str(knob.default).lower()}")
    how: dict[str, Any] = {"metavar": "|".join(knob.choices) if knob.choices else knob.kind.__name__.upper()}
    if knob.kind is bool:
        how = {"nargs": "?", "const": "true", "metavar": "true|false"}
    text = f"{knob.label}. {knob.help} ({'; '.join(facts)})".replace("%", "%%")
    section.add_argument(knob.flag, dest=knob.name, default=argparse.SUPPRESS, help=text, **how)


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """The knobs that were named on the command line, as text."""
    return {name: value for name, value in vars(arguments).items() if name in KNOBS}


def progress(state: RunState) -> str:
    """Where a run is, in one line: `[ 42%] choose 23/80, about 1:32 left`."""
    left = state.seconds_left
    count = f" {state.done}/{state.units}" if state.units else ""
    return f"[{state.fraction:4.0%}] {escaping.line(state.phase or 'start')}{count}" + (
        f", about {clock(left)} left" if left is not None else ""
    )


def point(told: PlanEvent, total: int) -> str:
    """A point of a sweep in one line: `[ 3/24] TRSP, steps 60: finished, perplexity 61.2 and 74.6; about 9:30 left`."""
    line = f"[{told.number:>{len(str(total))}}/{total}] {told.variation.title}: {_POINT.get(told.kind, told.kind)}"
    if told.state and told.state.failure:
        line += f". {told.state.failure.message} {told.state.failure.remedy}"
    elif told.state and told.kind == "going":
        line += f" {progress(told.state).partition(', about')[0]}"
    elif told.state and "pruned" in told.state.perplexity:
        by = told.state.perplexity["pruned"]
        line += ", perplexity " + " and ".join(f"{number(by[d])} ({d})" for d in DOMAINS if d in by)
    return escaping.line(line) + (
        f"; about {clock(told.seconds_left)} left for all" if told.seconds_left and told.kind != "found" else ""
    )


_POINT = {"found": "already there", "begun": "running", "going": "", "left out": "left out: what it needs has failed"}


def account(figures: dict[str, Any]) -> str:
    """A run's summary (`state.summary`, with `run` and `status`) for people."""
    lines = [f"Run {figures['run']}: {figures.get('status') or figures['ended'] or 'unfinished'}"]
    if figures["model"]:
        lines.append(f"model {figures['model']}, {figures['n_layers']} layers")
    if figures["parameters"]:
        before, after = figures["parameters"]["dense"], figures["parameters"]["pruned"]
        narrowed = figures.get("narrowed")
        gone = f"removed layers {', '.join(map(str, figures['removed']))}"
        lines.append(f"no layer removed, all narrowed: {LayersNarrowed(**narrowed).told}" if narrowed else gone)
        lines.append(f"parameters {before:,} to {after:,} ({after / max(before, 1) - 1:+.0%})")
    elif figures["chosen"]:
        lines.append(f"chosen so far {', '.join(map(str, figures['chosen']))}")
    for domain, by_state in figures["perplexity"].items():
        if by_state:
            lines.append(f"perplexity, {domain}: " + ", ".join(f"{s} {number(v)}" for s, v in by_state.items()))
    for kind in ("prefill", "decode"):
        speeds = {s: v[kind] for s, v in figures["speed"].items() if s != "ceiling"}
        if speeds:
            lines.append(f"{kind}, tokens/s: " + ", ".join(f"{s} {number(v)}" for s, v in speeds.items()))
    lines.append(f"seconds {figures['seconds']['total']:g}")
    if missing := figures.get("missing_events"):
        lines.append(f"{missing} events cannot be read, so that figures may be missing: events.jsonl is damaged")
    if figures["failure"]:
        lines += [f"failed: {figures['failure']['message']}", figures["failure"]["remedy"]]
    return "\n".join(map(escaping.line, lines))


def models_here(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Models as cells, those of the catalogue that are not here among them."""
    cells = [["model", "here", "layers", "parameters", "licence"]]
    for row in rows:
        here = f"{row['bytes'] / 1e6:,.0f} MB" if row["here"] else f"no, {row['download_bytes'] / 1e6:,.0f} MB to fetch"
        cells.append([row["name"], here, str(row["n_layers"] or ""), millions(row["parameters"]), row["licence"] or ""])
    return cells


def models_found(found: Sequence[SearchResult]) -> list[list[str]]:
    """What a search came upon, as cells."""
    cells = [["model", "parameters", "downloads", "licence"]]
    for one in found:
        licence = f"{one.licence or 'not given'}{', gated' if one.gated else ''}"
        cells.append([one.id, millions(one.parameters), f"{one.downloads or 0:,}", licence])
    return cells


def looked_up(card: HubModel, needed: int, free: int) -> str:
    """A model of the hub in lines; `needed` and `free` are bytes of memory."""
    facts = card.facts
    lines = [
        f"{card.id}: {facts.architecture}, {facts.n_layers} layers, {millions(facts.parameters)} parameters",
        f"licence {card.licence or 'not given'}{', gated' if card.gated else ''}; {card.downloads or 0:,} downloads",
        f"download {card.bytes / 1e6:,.0f} MB, safetensors",
        f"a Quick run needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
        f"Fetch it: python -m trsp_core fetch {card.id}",
    ]
    return "\n".join(map(escaping.line, lines))


def swept(found: FamilyRecord) -> list[list[str]]:
    """What became of each architecture, as cells: outcome, and model types with the reason."""
    rows = [["supported", ", ".join(o.model_type for o in found.of("supported"))]]
    for outcome in ("refused", "no decoder", "not built", "failed"):
        rows += [[outcome, f"{', '.join(types)}: {reason}."] for reason, types in found.groups(outcome).items()]
    return rows


def accuracies(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Shares of right answers with their 95 % intervals, as cells."""

    def cell(found: dict[str, float]) -> str:
        return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"

    head = ["task", "questions", f"right ({intervals.direction('accuracy')})", "right, by bytes"]
    return [head, *([r["task"], str(r["questions"]), cell(r["accuracy"]), cell(r["accuracy_by_bytes"])] for r in rows)]
