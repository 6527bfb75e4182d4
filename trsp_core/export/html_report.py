"""A run as one HTML file: words, figures, and the page's charts as pictures. It opens offline, without scripts.

`python -m trsp_core.export.html_report` is the child process of a page (`export_queue`): the renderer stays out of the
server. No torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from trsp_core import escaping, formatting, subprocesses
from trsp_core.charts import frames, specs
from trsp_core.errors import TrspError
from trsp_core.export import model_card
from trsp_core.files import write_atomic
from trsp_core.pruning import methods
from trsp_core.runs.store import Run
from trsp_core.schema.codec import plain
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState
from trsp_core.subprocesses import Progress

VEGA_LITE, WIDTH = "5.20", 720
SHADE = "light"  # a report is printed, too
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1D2329;background:#FCFCFB;max-width:820px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}figure{margin:1.2rem 0}figcaption,small{color:#5F6B76}
svg{max-width:100%;height:auto}table{border-collapse:collapse}th,td{text-align:left;padding:.3rem .8rem .3rem 0;
border-bottom:1px solid #D5DADF;vertical-align:top}pre{background:#F1F2F3;padding:.8rem;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.85rem}
"""


def html(run: Run) -> str:
    """The report.

    Raises:
        TrspError: the run's settings cannot be read.
    """
    config, state, status = run.config(), run.state(), run.status()
    method = methods.all_methods().get(config.method)
    shared = model_card.published(config)
    title = f"{method.title if method else config.method} on {shared.model}"
    parts = [
        f"<h1>{escaping.html(title)}</h1>",
        _said(f"Run {run.id}, {status}. {model_card.how(config)}"),
        _said(model_card.gone(state)) if state.removed else "",
        _failure(state),
        _section("Before and after", _table(model_card.rows(state)), _said(model_card.against_dense(state)))
        if state.measured
        else "",
        f"<p><small>{escaping.html(model_card.protocol(config, state))}</small></p>" if state.measured else "",
        *(_figure(*chart) for chart in charts(config, state)),
        _samples(state),
        _section("Notes", *(_said(note) for note in state.notes)) if state.notes else "",
        _section(
            "Repeat it", _code(shared.as_command()), _said("The same from Python:"), _code(model_card.script(shared))
        ),
        _section("Every setting", _table([["setting", "value"], *([k, str(v)] for k, v in shared.as_dict().items())])),
        _section("Machine", _code(_environment(run))),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escaping.html(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n"
        "<p><small>Made by TRSP Explorer, after Two-Stage Regularization-Based Structured Pruning for LLMs, "
        "arXiv:2505.18232.</small></p>\n</body></html>\n"
    )


def charts(config: RunConfig, state: RunState) -> list[tuple[str, str, str, specs.Spec, Any]]:
    """Those charts of the run's page that have data: title, description, caption, spec, frame."""
    found = []
    if state.weight_steps:
        frame = frames.weights(state, frames.planned_steps(state, config, 1))
        found.append(("Stage 1: the layer weights", "weights", specs.weights(SHADE), frame))
        found.append(("The stack in the end", "stack", specs.stack(SHADE), frames.stack(state)))
        frame = frames.losses(state, config, 1)
        found.append(("Stage 1: what was minimised", "loss-1", specs.losses(SHADE, frames.PULLS[1]), frame))
    elif state.scores:
        found.append(("The method's scores", "scores", specs.scores(SHADE), frames.scores(state)))
    if state.gap_steps:
        found.append(("Stage 2: if deleted now", "probes", specs.probes(SHADE), frames.probes(state, config)))
        if any(step.gaps for step in state.gap_steps):
            found.append(("Stage 2: the gaps", "gaps", specs.gaps(SHADE), frames.gaps(state, config)))
        frame = frames.losses(state, config, 2)
        found.append(("Stage 2: what was minimised", "loss-2", specs.losses(SHADE, frames.PULLS[2]), frame))
    return [
        (title, specs.ALT[name], frames.caption(name, state, config) or specs.ALT[name], spec, frame)
        for title, name, spec, frame in found
        if len(frame)
    ]


def _figure(title: str, description: str, caption: str, spec: specs.Spec, frame: Any) -> str:
    rows = [{name: _shown(value) for name, value in plain(row).items()} for row in frame.to_dict("records")]
    whole = {**spec, "data": {"values": rows}, "width": WIDTH, "background": "transparent"}
    picture = vl_convert.vegalite_to_svg(json.loads(json.dumps(whole, default=float)), vl_version=VEGA_LITE)
    title, description = escaping.html(title), escaping.html(description)
    return (
        f'<h2>{title}</h2><figure><div role="img" aria-label="{description}">{picture}</div>'
        f"<figcaption>{escaping.html(caption)}</figcaption></figure>"
    )


def _measured(config: RunConfig, state: RunState) -> str:
    protocol = f"<p><small>{escaping.html(model_card.protocol(config, state))}</small></p>"
    return _section(
        "Before and after", _table(model_card.rows(state)), _said(model_card.against_dense(state)), protocol
    )


def _samples(state: RunState) -> str:
    shown = [s for s in ("dense", "direct", "pruned") if s in state.samples]
    texts = {s: state.samples[s].text for s in shown}
    if texts.get("direct") == texts.get("pruned"):
        shown = [s for s in shown if s != "direct"]
    if not shown:
        return ""
    table = _table([["model", "text"], *([model_card.TITLES[s], texts[s]] for s in shown)])
    return _section("The same prompt, continued", _code(state.samples[shown[0]].prompt), table)


def _failure(state: RunState) -> str:
    return _said(f"It failed: {state.failure.message} {state.failure.remedy}") if state.failure else ""


def _environment(run: Run) -> str:
    try:
        found = json.loads((run.folder / "env.json").read_text("utf-8"))
        return formatting.table([[name, str(value)] for name, value in found.items()])
    except (OSError, ValueError, AttributeError):
        return "not recorded"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escaping.html(title)}</h2>" + "".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<{tag}>{escaping.html(cell)}</{tag}>" for cell in row) for row, tag in
                   zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)]  # fmt: skip
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _said(text: str) -> str:
    return f"<p>{escaping.html(text)}</p>" if text else ""


def _code(text: str) -> str:
    return f"<pre>{escaping.html(text)}</pre>"


def _shown(value: Any) -> Any:
    """A value of a chart: the renderer escapes markup, and no more."""
    return escaping.line(value) if isinstance(value, str) else value


def _asked(run: str, target: str) -> Iterator[Progress]:
    yield Progress("Drawing the charts", 0.1)
    try:
        with Run(Path(run)).exporting():
            write_atomic(Path(target), html(Run(Path(run))))
    except OSError as error:
        raise TrspError(f"The report could not be written: {error.strerror or error}.", "Free some space.") from error
    yield Progress("Done", 1.0)


if __name__ == "__main__":
    sys.exit(subprocesses.serve(_asked))
