"""Before a run starts: what the form asks for, in words and figures; starting."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from trsp_core import escaping
from trsp_core.errors import Problem, TrspError, refuse
from trsp_core.export import model_card
from trsp_core.models import catalog, inspection
from trsp_core.models.catalog import Facts, HubModel
from trsp_core.preparation import forecast, preflight
from trsp_core.pruning import methods, validate
from trsp_core.schema import config as configs
from trsp_core.schema import schedules
from trsp_core.schema.config import KNOBS, PACKED, RunConfig


@dataclass
class Plan:
    """What the form amounts to: a config or its problems, and the facts of its model where they are known.

    Attributes:
        missing: the model to be fetched first, where it is not here. The hub may have told its facts all the same.
    """

    config: RunConfig | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: Facts | None = None
    missing: str | None = None


def plan() -> Plan:
    """Check the form without touching a model: every problem of every knob at once."""
    made = Plan()
    try:
        made.config = validate.from_values(session.form())
    except TrspError as error:
        made.problems = list(error.problems)
    name, limits = session.form()["model"], server.jobs().limits
    if refused := limits.check_model(name):
        made.problems += refused if made.config is None else []
    elif fetchable(name):
        made.missing, card = name, server.card(name)
        made.facts = card.facts if isinstance(card, HubModel) else None
    elif name.strip():
        found = server.facts(name)
        if isinstance(found, TrspError):
            made.problems.append(Problem("model", found.message, found.remedy))
        else:
            made.facts = found
    if made.config and made.facts:
        made.problems += validate.check(made.config, made.facts.n_layers, made.facts.max_length)
    if made.config:
        made.problems += limits.check_run(made.config, server.store().root)
    return made


def fetchable(name: str) -> bool:
    """Whether the model is one that can be fetched, and is not here."""
    try:
        catalog.locate(name)
    except TrspError:
        return name in catalog.CATALOGUE or catalog.is_hub_id(name)
    return False


def ratio_in_words(made: Plan) -> str:
    """`8 of 30 layers, 18 % fewer parameters`."""
    if not made.facts:
        return "How many layers that is will be known once the model is looked up or on this machine."
    facts, values, depth = made.facts, session.form(), made.facts.n_layers
    try:
        manual, narrow = values["method"] == "manual", methods.get(values["method"]).narrow
        count = (
            len(configs.parse_layers(values["layers"])) if manual else configs.layers_to_remove(values["ratio"], depth)
        )
    except TrspError:
        return ""
    mean = sum(facts.layer_parameters) / len(facts.layer_parameters)
    fewer = words.share(count * mean, facts.parameters)
    if narrow:
        return f"**No layer goes; {fewer} fewer parameters in all of them**, as many as {count} of {depth} layers hold"
    return (
        f"**{count} of {facts.n_layers} layers, {fewer} fewer parameters** ({words.parameters(facts.parameters)} now)"
    )


def lambda_2_in_words(made: Plan) -> str:
    """For how many steps it acts."""
    return schedules.told(made.config) if made.config else ""


def forecast_and_start(made: Plan) -> None:
    """Minutes and memory before the start, every reason against it, and the button."""
    refusal = _problems(made)
    with st.container(border=True, key="start-box"):
        if made.config and made.facts and not made.problems:
            expected = forecast.forecast(made.config, made.facts)
            st.markdown(
                f":material/schedule: **About {words.duration(expected.seconds)}**, "
                f"**{words.size(expected.peak_bytes)} of memory** at the peak on this machine."
                + (" A rough figure: nothing like it was timed here yet." if expected.rough else "")
            )
            _phases(expected.phases)
            if made.config.precision in PACKED:
                st.caption(_packed(made.config, made.facts, expected))
            refusal = refusal or _refused(made.config, expected)
        if made.missing:
            where = "looked up" if catalog.is_hub_id(made.missing) else "on this machine"
            ahead = "Start is possible once the model is on this machine."
            st.caption(ahead if made.facts else f"The forecast comes once the model is {where}.")
        if refusal:
            st.error(refusal, icon=":material/block:")
        blocked = bool(refusal or made.missing) or made.facts is None
        with st.container(horizontal=True):
            icon = ":material/play_arrow:"
            clicked = st.button("Start", type="primary", icon=icon, disabled=blocked, key="start")
            if made.config:
                command(made.config, "The same run from a shell. The address of this page holds the same settings.")
        if clicked and made.config:
            start(made.config)


def command(config: RunConfig, caption: str = "The same run from a shell:") -> None:
    """The run as a shell command, to copy."""
    with st.popover("Command", icon=":material/terminal:"):
        st.caption(caption)
        st.code(escaping.lines(config.as_command()), language="bash", wrap_lines=True)
        st.caption("The same from Python:")
        st.code(model_card.script(config), language="python", wrap_lines=True)


def _problems(made: Plan) -> str:
    """All problems of the form as one list, or nothing."""
    if not made.problems:
        return ""
    lines = [f"- {words.plain(p.message)} {words.plain(p.remedy)}" for p in made.problems]
    count = len(lines)
    return (
        f"{'One setting needs' if count == 1 else f'{count} settings need'} a change before the start:\n\n"
        + "\n".join(lines)
    )


def _packed(config: RunConfig, facts: Facts, expected: forecast.Forecast) -> str:
    """What packed weights buy here, and what they cost."""
    whole = forecast.forecast(replace(config, precision="float32"), facts)
    bits = "four" if config.precision == "nf4" else "eight"
    sizes = [inspection.weight_bytes(facts, p, config.compute_dtype) for p in (config.precision, "float32")]
    return (
        f"The layers' weights are packed into {bits} bits: all weights take {words.size(sizes[0])} instead of "
        f"{words.size(sizes[1])}, the run {words.size(expected.peak_bytes)} instead of {words.size(whole.peak_bytes)}. "
        f"It costs time, since they are spelled out for every pass (about {words.duration(expected.seconds)} instead "
        f"of {words.duration(whole.seconds)}), and a dense model that is a little worse to begin with."
    )


def _phases(phases: list[dict]) -> None:
    """Where the time goes."""
    total = sum(p["seconds"] for p in phases)
    parts = [f"{words.phase(p['name'])} {words.duration(p['seconds'])}" for p in phases if p["seconds"] >= 0.05 * total]
    st.caption(" · ".join(parts))


def _refused(config: RunConfig, expected: forecast.Forecast) -> str:
    """Why this machine cannot do it now, or nothing."""
    try:
        if not forecast.on_gpu(config):
            forecast.check_memory(expected)
    except TrspError as error:
        return f"{words.plain(error.message)} {words.plain(error.remedy)}"
    return ""


def start(config: RunConfig) -> None:
    """Look at the texts and the memory once more, queue the run and show it; say why where it cannot be."""
    try:
        refuse(server.jobs().limits.check_run(config, server.store().root))
        with st.spinner("Looking at the texts"):
            preflight.preflight(config)
        run = server.jobs().submit(config, mine=session.mine(), visitor=session.visitor())
    except TrspError as error:
        st.error(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/error:")
        return
    session.show_run(run.id)
    st.rerun()


def change(config: RunConfig) -> None:
    """Fill the form with a run's settings and show the form; a callback."""
    session.fill({name: getattr(config, name) for name in KNOBS})
    session.leave_run()
