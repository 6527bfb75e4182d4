"""The shell: `python -m trsp_core COMMAND`. Reads flags, calls the library, prints. Only `run` imports torch."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trsp_core import escaping, formatting, machine, paths
from trsp_core.cli import arguments as shell
from trsp_core.data import corpora, special_tokens
from trsp_core.errors import TrspError
from trsp_core.evaluation import questions, tasks
from trsp_core.experiments import executors, grid_results, grids, plan_results, plans, runner
from trsp_core.export import checkpoint, curves_csv, hub_upload
from trsp_core.files import write_atomic
from trsp_core.models import architectures, catalog, download
from trsp_core.paths import runs_root
from trsp_core.preparation import forecast, preflight
from trsp_core.pruning import methods, validate
from trsp_core.runs import limits, process, recorder, resume, worker
from trsp_core.runs.store import Run, Store
from trsp_core.schema import config, run_state
from trsp_core.schema.codec import plain
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event, PhaseStarted
from trsp_core.schema.knobs import whole
from trsp_core.schema.run_state import RunState
from trsp_core.surgery import families

SPARSE = 30.0  # seconds between progress lines where stderr is no terminal


def main(words: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 2 bad input, 3 failed, 130 cancelled."""
    arguments = shell.parser().parse_args(words)
    try:
        return _COMMANDS[arguments.command](arguments)
    except TrspError as error:
        _refused(error)
        return 2
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: argparse.Namespace) -> int:
    """Prune. All that can be refused is refused before there is a run folder, except for a run that `queue` made."""
    if arguments.folder:
        made = _run_in(arguments.folder)
        if made is None:
            raise TrspError(f"{arguments.folder[:80]} holds no run.", "Start one with --out instead.")
        return _drive(made, arguments.json)
    settings = validate.from_values(shell.given(arguments), arguments.preset)
    if not catalog.is_ready(settings.model) and catalog.is_fetchable(settings.model):
        _fetch(settings.model, False, False)
    expected = preflight.preflight(settings)
    from trsp_core.models import loading  # torch comes in here, which the run needs anyway

    special_tokens.begun(loading.check(catalog.facts(settings.model)), settings.prompt)
    made = Store().create(settings, paths.named(arguments.out, "place") if arguments.out else None)
    roughly = " (a rough figure: nothing was timed on this machine yet)" if expected.rough else ""
    _say(f"Run {made.id} in {made.folder}")
    time_left = formatting.clock(expected.seconds)
    _say(f"About {time_left}{roughly}, {expected.peak_bytes / 1e9:.1f} GB of memory. Ctrl-C stops.")
    return _drive(made, arguments.json)


def resume_run(arguments: argparse.Namespace) -> int:
    """Go on with a run that was stopped, lost or failed."""
    found = _find(arguments.run)
    outlook = resume.outlook(found)
    resume.reopen(found)
    _say(f"Run {found.id}. {outlook} Ctrl-C stops.")
    return _drive(found, arguments.json)


def _drive(made: Run, as_json: bool) -> int:
    """Execute the config in a run folder and record it; what has broken off there goes on."""
    shown = _Progress()
    ended = worker.drive(made, shown)
    shown.close()
    figures = {"run": made.id, "folder": str(made.folder), **run_state.summary(ended)}
    if as_json:
        _print_json(figures)
    else:
        _print(shell.account(figures))
    if ended.failure:
        _say(ended.failure.message, ended.failure.remedy, *ended.failure.trace.splitlines())
    return worker.CODES[ended.ended]


class _Line:
    """Progress on stderr. What passes is one line, rewritten, on a terminal, and elsewhere a line now and then."""

    def __init__(self) -> None:
        self.live, self.last, self.width = sys.stderr.isatty(), 0.0, 0

    def say(self, line: str, passing: bool) -> None:
        if self.live:
            line = escaping.line(line)
            print("\r" + line.ljust(self.width), end="" if passing else "\n", file=sys.stderr, flush=True)
            self.width = len(line) if passing else 0
        elif not passing or time.monotonic() - self.last > SPARSE:
            _say(line)
            self.last = time.monotonic()

    def close(self) -> None:
        if self.live:
            _say("")


class _Progress(_Line):
    """Progress of a run: on a terminal one line, else a line a phase and a few in between."""

    def __call__(self, now: RunState, event: Event) -> None:
        self.say(shell.progress(now), self.live or not isinstance(event, PhaseStarted))


def list_runs(arguments: argparse.Namespace) -> int:
    """The runs, newest first."""
    rows = [_figures(found) for found in Store().runs()]
    if arguments.json:
        _print_json(rows)
    elif not rows:
        _print(f"No runs in {runs_root()} yet. Start one: python -m trsp_core run --preset quick")
    else:
        _print(formatting.table([_row(figures) for figures in rows]))
    return 0


def show(arguments: argparse.Namespace) -> int:
    """One run, by id or by folder."""
    found = _find(arguments.run)
    figures = _figures(found)
    if arguments.json:
        _print_json(figures | {"config": found.config().as_dict()})
    else:
        _print(shell.account(figures), found.config().as_command())
        if resume.can(found.state(), figures["status"]):
            _print(f"python -m trsp_core resume {found.id}: {resume.outlook(found)}")
    return 0


def export_model(arguments: argparse.Namespace) -> int:
    """A run's model to take away, with progress; the token for the hub is read here and passed on in memory alone."""
    found, token = _find(arguments.run), hub_upload.own_token() if arguments.push else ""
    target = paths.named(arguments.out, "place") if arguments.out else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for step in checkpoint.export(found, target, arguments.dtype, arguments.push, token):
        if arguments.json:
            _print(escaping.json({"message": step.message, "fraction": round(step.fraction, 3)}))
        elif step.fraction < 1:
            _say(f"[{step.fraction:4.0%}] {step.message}")
        else:
            _print(step.message)
    return 0


def write_report(arguments: argparse.Namespace) -> int:
    """A run as one HTML file."""
    from trsp_core.export import html_report  # altair and its renderer come in here

    found, target = _find(arguments.run), paths.writable(arguments.out)
    return _written(target, html_report.html(found), arguments.json)


def write_curves(arguments: argparse.Namespace) -> int:
    """A run's curves as CSV."""
    found, target = _find(arguments.run), paths.writable(arguments.out)
    return _written(target, curves_csv.table(found.config(), found.state()), arguments.json)


def _written(target: Path, text: str, as_json: bool) -> int:
    try:
        write_atomic(target, text)
    except OSError as error:
        raise TrspError(f"{target} cannot be written: {error.strerror}.", "Choose another place.") from error
    if as_json:
        _print_json({"file": str(target), "bytes": target.stat().st_size})
    else:
        _print(str(target))
    return 0


def _find(name: str) -> Run:
    """A run, by id or by folder.

    Raises:
        TrspError: there is none.
    """
    return _run_in(name) or Store().get(name)


def _run_in(name: str) -> Run | None:
    """The run in the folder `name`; None where there is no such folder, or no config in it."""
    folder = paths.folder(name)
    return Run(folder) if folder and (folder / "config.json").is_file() else None


def list_methods(arguments: argparse.Namespace) -> int:
    """The ways to choose layers."""
    rows = [
        {"name": m.name, "title": m.title, "summary": m.summary, "paper": m.paper}
        for m in methods.all_methods().values()
    ]
    return _listing(rows, arguments.json)


def list_families(arguments: argparse.Namespace) -> int:
    """Which architectures can be pruned, as swept, and the families with something particular to them."""
    rows = [
        {"name": f.name, "model_types": list(f.model_types), "refused": f.refused, "note": f.note}
        for f in families.all_families().values()
    ]
    found = architectures.recorded()
    if arguments.json:
        outcomes = [vars(o) for o in found.outcomes]
        _print_json({"families": rows, "sweep": {"transformers": found.transformers, "outcomes": outcomes}})
        return 0
    _print(formatting.table(shell.swept(found)), "")
    return _listing(rows, False)


def compare(arguments: argparse.Namespace) -> int:
    """Run what is missing of a plan, one after the other, each in a process of its own; then the table."""
    plan, store, done = plans.read(arguments.plan), Store(), {}
    out = paths.writable(arguments.out) if arguments.out else None
    for number, variation in enumerate(plan.variations, 1):
        settings = plans.config_of(plan, variation, done)
        made = plans.find(store, plan, variation, settings)
        while made and made.held():  # another shell is at it
            time.sleep(0.5)
        there = made is not None and made.status() == "finished"
        _say(f"[{number}/{len(plan.variations)}] {variation.title}: {'already there' if there else 'running'}")
        if not there or made is None:
            preflight.preflight(settings)
            if made is None or not resume.take_up(made):
                if made:
                    store.delete(made.id)
                made = plans.create(store, plan, variation, settings)
            process.finish(made)
        done[variation.name] = made.state()
        if made.status() != "finished":
            failure = done[variation.name].failure
            _say(*([failure.message, failure.remedy] if failure else [f"Run {made.id} did not finish."]))
            return worker.CODES.get(made.status(), 3)
    found = plan_results.gather(plan.name, store.runs(), plan)
    if out:
        write_atomic(out, plan_results.to_json(found))
    if arguments.json:
        _print(escaping.written_json(plan_results.to_json(found)))
    else:
        _print(formatting.table(plan_results.cells(found)))
    return 0


def sweep_grid(arguments: argparse.Namespace) -> int:
    """Run what is missing of a grid; after each point its record is written anew."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    grid, store, finished, bad = grids.read(arguments.grid), Store(), {}, 0
    total, shown = len(grid.plan.variations), _Line()
    out = [paths.writable(arguments.out, makes_folders=True)] if arguments.out else []
    places = [grid_results.local(store.root) / f"{grid.plan.name}.json", *out]
    with executors.DaskExecutor(arguments.scheduler) if arguments.scheduler else executors.LocalExecutor() as workers:
        for told in runner.work(grid.plan, store, workers):
            shown.say(shell.point(told, total), told.kind == "going")
            bad += told.kind in runner.BAD
            if told.kind in ("found", "finished") and told.run and told.state:
                finished[told.variation.name] = (told.run, told.state)
                if told.kind == "finished" or len(finished) == total:
                    _write(grid_results.gather(grid, finished), places)
    _say(f"{len(finished)} of {total} points are done" + (f", {bad} did not finish." if bad else "."))
    found = grid_results.gather(grid, finished) if finished else None
    if found:
        _write(found, places)
        as_json = arguments.json
        _print(
            escaping.written_json(grid_results.to_json(found))
            if as_json
            else formatting.table(grid_results.cells(found))
        )
    return 3 if bad else 0


def _write(found: grid_results.Sweep, places: list[Path]) -> None:
    for place in places:
        grid_results.write(found, place)


def evaluate(arguments: argparse.Namespace) -> int:
    """Zero-shot tasks on one model."""
    name = _model_of(arguments.model)
    limit = None if arguments.limit is None else whole("--limit", arguments.limit)
    sets = {
        task: tasks.read(task, limit) if task in tasks.TASKS else questions.read(task, arguments.text, limit)
        for task in arguments.task
    }
    from trsp_core.evaluation import multiple_choice  # torch comes in here
    from trsp_core.models import loading

    model, tokenizer = loading.load(name)
    text_config = model.config.get_text_config(decoder=True)
    longest = families.context(text_config) or 2048
    for asked in sets.values():
        multiple_choice.refuse(tokenizer, asked, text_config.vocab_size)
    rows = []
    for task, asked in sets.items():
        answers = []
        for answered in multiple_choice.answer(model, tokenizer, asked, longest):
            answers.append(answered)
            if len(answers) % 50 == 0:
                _say(f"{task}: {len(answers)} of {len(asked)}")
        plain_, by_bytes = multiple_choice.accuracy(answers)
        rows.append({"task": Path(task).stem, "questions": len(answers), "accuracy": vars(plain_)})
        rows[-1] |= {"accuracy_by_bytes": vars(by_bytes), "chosen": [a.chosen for a in answers]}
    if arguments.json:
        _print_json(rows)
    else:
        _print(formatting.table(shell.accuracies(rows)))
    return 0


def _model_of(name: str) -> str:
    """The folder of the model of a run, which is named by its id or its folder; or the name itself.

    Raises:
        TrspError: the run kept no model.
    """
    try:
        run = _find(name)
        run.config()  # a model's folder has a config.json too, of another kind
    except TrspError:
        return name
    if not run.model_folder.is_dir():
        raise TrspError(f"Run {name} kept no model.", "Run it again with --save-model true.")
    return str(run.model_folder)


def doctor(arguments: argparse.Namespace) -> int:
    """What is here, without touching anything."""
    versions = recorder.environment()
    report: dict[str, Any] = {
        "versions": versions,
        "models": {name: "ready" if catalog.is_ready(name) else "not fetched" for name in catalog.CATALOGUE},
        "texts": {name: _text_state(name, versions) for name in config.TEXTS},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "gpu": forecast.on_gpu(RunConfig()),
            "free_memory_gb": round(machine.available_memory() / 1e9, 1),
            "gflops": machine.read_rate(),
        },
        "folders": {"runs": str(runs_root()), "cache": str(paths.home())},
    }
    if arguments.json:
        _print_json(report)
        return 0
    report["machine"]["gflops"] = report["machine"]["gflops"] or "not measured yet"
    for part, values in report.items():
        _print(part, *(f"  {name}: {value}" for name, value in values.items()))
    return 0


def list_models(arguments: argparse.Namespace) -> int:
    """The models that are there; or a search of the hub; or one of its models."""
    words = arguments.words
    if len(words) == 1 and catalog.is_hub_id(words[0]):
        card = download.look(words[0], limits.current())
        needed = forecast.peak_bytes(validate.from_values({}, "quick"), card.facts)
        shown, text = asdict(card), shell.looked_up(card, needed, machine.available_memory())
    elif words:
        found = download.search(" ".join(words), limits.current())
        shown, text = [asdict(one) for one in found], formatting.table(shell.models_found(found))
    else:
        shown = _models_here()
        text = formatting.table(shell.models_here(shown))
    if arguments.json:
        _print_json(shown)
    else:
        _print(text)
    return 0


def _models_here() -> list[dict[str, Any]]:
    """The models that could be loaded now, and the rest of the catalogue."""
    rows = {name: _catalogued(source) for name, source in catalog.CATALOGUE.items()}
    for facts in catalog.here(filter(paths.folder, Store().models())):
        found = {"here": True, "n_layers": facts.n_layers, "parameters": facts.parameters, "bytes": facts.bytes}
        rows[facts.name] = rows.get(facts.name, {"name": facts.name, "licence": None, "download_bytes": 0}) | found
    return list(rows.values())


def _catalogued(source: catalog.Source) -> dict[str, Any]:
    unknown = {"here": False, "n_layers": None, "parameters": None, "bytes": 0}
    return {"name": source.name, "licence": source.licence, "download_bytes": source.size_bytes, **unknown}


def fetch(arguments: argparse.Namespace) -> int:
    """Get a model onto this machine."""
    _fetch(arguments.model, arguments.accept_terms, arguments.json)
    return 0


def _fetch(name: str, accepted: bool, as_json: bool) -> None:
    last = None
    for step in download.fetch(name, limits.current(), accepted):
        if step == last:
            continue
        last = step
        if as_json:
            _print(escaping.json({"message": step.message, "fraction": round(step.fraction, 3)}))
        else:
            _say(f"[{step.fraction:4.0%}] {step.message}")


def serve_workbench(arguments: argparse.Namespace) -> int:
    """The child process of `workbench`."""
    second = limits.current().stands_back
    if second:
        stand_back()
    from trsp_core.workbench import worker as bench

    return bench.serve(second)


def stand_back() -> None:
    """Take only what other processes leave of the cores, and of those one. A kernel that groups processes by their
    session ("autogroup") heeds this within a session alone, so the server starts no session for its children."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif hasattr(os, "nice"):
        os.nice(19)


def _figures(found: Run) -> dict[str, Any]:
    """The summary of a run, with its id and status."""
    return {"run": found.id, "folder": str(found.folder), "status": found.status(), **found.summary()}


def _row(figures: dict[str, Any]) -> list[str]:
    by_state = figures["perplexity"].get("calibration", {})
    ppl = ", ".join(f"{s} {formatting.number(v)}" for s, v in by_state.items())
    count = f"{len(figures['removed'])} of {figures['n_layers']}" if figures["removed"] else ""
    count = "all narrower" if figures.get("narrowed") else count
    return [figures["run"], figures["status"], figures["model"] or "", count, ppl]


def _listing(rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        _print_json(rows)
    else:
        cells = [[row["name"], " ".join(_plain(v) for k, v in row.items() if k != "name" and v)] for row in rows]
        _print(formatting.table(cells))
    return 0


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value).rstrip(".") + "."


def _text_state(name: str, versions: dict[str, str]) -> str:
    package = "datasets" if name in corpora.FROM_HUB else "gensim"
    if versions[package] == "not installed":
        return f"{package} is not installed"
    return "needs the hub" if package == "datasets" else "ready"


def _refused(error: TrspError) -> None:
    for problem in error.problems or (error,):
        _say(f"{problem.message} {problem.remedy}")


def _print_json(values: Any) -> None:
    _print(escaping.json(plain(values), 1))


def _print(*blocks: str) -> None:
    """Blocks of lines on stdout, each letter visible."""
    for block in blocks:
        print(escaping.lines(block), flush=True)


def _say(*lines: str) -> None:
    for line in lines:
        print(escaping.line(line), file=sys.stderr, flush=True)


_COMMANDS = {
    "run": run,
    "resume": resume_run,
    "list": list_runs,
    "show": show,
    "methods": list_methods,
    "families": list_families,
    "compare": compare,
    "sweep": sweep_grid,
    "eval": evaluate,
    "export": export_model,
    "report": write_report,
    "curves": write_curves,
    "doctor": doctor,
    "models": list_models,
    "fetch": fetch,
    "workbench": serve_workbench,
}

if __name__ == "__main__":
    sys.exit(main())
