"""A run as one HTML file: words, figures, and the charts of its page as SVG. It opens offline and has no scripts.

`python -m trsp_core.export.html_report` is the child process of a page (`export_queue`): the renderer stays out of the
server. No torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from trsp_core import escaping, formatting, subprocesses
from trsp_core.charts import frames, specs
from trsp_core.errors import TrspError
from trsp_core.export import model_card
from trsp_core.files import write_atomic
from trsp_core.pruning import methods
from trsp_core.runs.store import Run
from trsp_core.schema import turns
from trsp_core.schema.codec import plain
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState
from trsp_core.subprocesses import Progress

VEGA_LITE, WIDTH = "5.20", 720
SHADE = "light"  # a report is printed, too


def html(run: Run) -> str:
    """The report.

    Raises:
        TrspError: the run's settings cannot be read.
    """
    config, state, status = run.config(), run.state(), run.status()
    method = methods.all_methods().get(config.method)
    public_config = model_card.public_config(config)
    failure = f"It failed: {state.failure.message} {state.failure.remedy}" if state.failure else ""
    now = turns.applied(config, turns.values(state.turns))
    summary = [
        f"Run {run.id}, {formatting.status(status)}. {model_card.procedure(now)}",
        state.removed and model_card.removal(state),
        turns.account(state.turns),
        failure,
    ]
    return _template().render(
        title=f"{method.title if method else config.method} on {public_config.model}",
        summary=filter(None, summary),
        perplexity=model_card.rows(state) if state.measured else [],
        against_dense=model_card.against_dense(state),
        protocol=model_card.protocol(config, state),
        charts=(
            {"title": title, "description": description, "caption": caption, "picture": _picture(spec, frame)}
            for title, description, caption, spec, frame in charts(config, state)
        ),
        prompt=next((sample.prompt for sample in state.samples.values()), ""),
        samples=_samples(state),
        notes=state.notes,
        command=turns.command(public_config, state.turns),
        script=model_card.script(public_config, state.turns),
        settings=public_config.as_dict().items(),
        environment=_environment(run),
    )


def _template() -> jinja2.Template:
    """The page, into which every value goes with each letter visible and its markup escaped; charts go in as SVG."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.finalize = lambda value: value if hasattr(value, "__html__") else escaping.lines(value)
    return environment.get_template("report.html.jinja")


def charts(config: RunConfig, state: RunState) -> list[tuple[str, str, str, specs.Spec, Any]]:
    """Those charts of the run's page that have data: title, description, caption, spec, frame."""
    drawings = []
    if state.weight_steps:
        frame = frames.weights(state, frames.expected_steps(state, config, 1))
        drawings.append(("Stage 1: the layer weights", "weights", specs.weights(SHADE), frame))
        drawings.append(("The stack in the end", "stack", specs.stack(SHADE), frames.stack(state)))
        frame = frames.losses(state, config, 1)
        drawings.append(("Stage 1: what was minimised", "loss-1", specs.losses(SHADE, frames.PULLS[1]), frame))
    elif state.scores:
        drawings.append(("The method's scores", "scores", specs.scores(SHADE), frames.scores(state)))
    if state.refits:
        drawings.append(("The kept layers, solved for", "refits", specs.refits(SHADE), frames.refits(state, config)))
    if state.repair_probes:
        frame = frames.repair_probes(state, config)
        drawings.append(("The repair: if it stopped here", "repair-probes", specs.repair_probes(SHADE), frame))
    if state.gap_steps:
        drawings.append(("Stage 2: if deleted now", "probes", specs.probes(SHADE), frames.probes(state, config)))
        if any(step.gaps for step in state.gap_steps):
            drawings.append(("Stage 2: the gaps", "gaps", specs.gaps(SHADE), frames.gaps(state, config)))
        frame = frames.losses(state, config, 2)
        drawings.append(("Stage 2: what was minimised", "loss-2", specs.losses(SHADE, frames.PULLS[2]), frame))
    return [
        (title, specs.ALT[name], frames.caption(name, state, config) or specs.ALT[name], spec, frame)
        for title, name, spec, frame in drawings
        if len(frame)
    ]


def _picture(spec: specs.Spec, frame: Any) -> str:
    """A chart as SVG. The renderer escapes markup, and no more."""

    def visible(value: Any) -> Any:
        return escaping.line(value) if isinstance(value, str) else value

    rows = [{name: visible(value) for name, value in plain(row).items()} for row in frame.to_dict("records")]
    chart = {**spec, "data": {"values": rows}, "width": WIDTH, "background": "transparent"}
    return vl_convert.vegalite_to_svg(json.loads(json.dumps(chart, default=float)), vl_version=VEGA_LITE)


def _samples(state: RunState) -> list[list[str]]:
    """How each model continues the prompt: its title and its text."""
    samples = [(name, state.samples[name].text) for name in ("dense", "direct", "pruned") if name in state.samples]
    texts = dict(samples)
    if texts.get("direct") == texts.get("pruned"):
        texts.pop("direct", None)
    return [[model_card.TITLES[name], text] for name, text in texts.items()]


def _environment(run: Run) -> str:
    try:
        versions = json.loads((run.folder / "env.json").read_text("utf-8"))
        return formatting.table([[name, str(value)] for name, value in versions.items()])
    except (OSError, ValueError, AttributeError):
        return "not recorded"


def write(run: str, target: str) -> Iterator[Progress]:
    """Write the report of the run in folder `run` to the file `target`.

    Raises:
        TrspError: it could not be written, or the run's settings cannot be read.
    """
    yield Progress("Drawing the charts", 0.1)
    try:
        with Run(Path(run)).exporting():
            write_atomic(Path(target), html(Run(Path(run))))
    except OSError as error:
        raise TrspError(f"The report could not be written: {error.strerror or error}.", "Free some space.") from error
    yield Progress("Done", 1.0)


if __name__ == "__main__":
    sys.exit(subprocesses.serve(write))
