"""Before a run starts: what the form asks for, in words and figures; and its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.style import words
from trsp_core import escaping, formatting, paths
from trsp_core.data import blocks, corpora, text_check
from trsp_core.errors import Problem, TrspError, refuse
from trsp_core.export import model_card
from trsp_core.models import catalog, inspection
from trsp_core.models.catalog import Facts, HubModel
from trsp_core.preparation import forecast, preflight
from trsp_core.pruning import methods, validate
from trsp_core.schema import config as configs
from trsp_core.schema import schedules, turns
from trsp_core.schema.config import KNOBS, PACKED, RunConfig
from trsp_core.schema.events import KnobTurned


@dataclass
class Draft:
    """What the form amounts to: a config or its problems, and the facts of its model where they are known.

    Attributes:
        missing: the model to be fetched first, where it is not here. The hub may have told its facts all the same.
    """

    config: RunConfig | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: Facts | None = None
    missing: str | None = None


def read_form() -> Draft:
    """The form as it stands, checked without loading a model; every problem of every knob at once."""
    draft = Draft()
    try:
        draft.config = validate.from_values(session.form())
    except TrspError as error:
        draft.problems = list(error.problems)
    name, limits = session.form()["model"], server.run_queue().limits
    if refusal := limits.check_model(name):
        draft.problems += refusal if draft.config is None else []
    elif fetchable(name):
        draft.missing, model = name, server.hub_model(name)
        draft.facts = model.facts if isinstance(model, HubModel) else None
    elif name.strip():
        facts = server.facts(name)
        if isinstance(facts, TrspError):
            draft.problems.append(Problem("model", facts.message, facts.remedy))
        else:
            draft.facts = facts
    if draft.config and draft.facts:
        draft.problems += validate.check(draft.config, draft.facts.n_layers, draft.facts.max_length)
    if draft.config:
        draft.problems += limits.check_run(draft.config, server.store().root)
    if draft.config and not draft.problems:
        draft.problems += text_problems(draft.config, None if draft.missing else draft.facts)
    return draft


OF_TEXTS = (
    "model",
    "text",
    "heldout",
    "block_length",
    "measure_length",
    "measure_blocks",
    "calibration_blocks",
    "seed",
)


def text_problems(config: RunConfig, facts: Facts | None) -> list[Problem]:
    """What is wrong with texts of the person's own, which are read for it, once for the same files and settings. With
    the `facts` of a model that is here, they are cut by its tokenizer, in a child process."""
    own_texts = [name for name in ("text", "heldout") if not corpora.is_named(getattr(config, name))]
    if not own_texts:
        return []
    marks = [paths.mark(getattr(config, name)) for name in own_texts]
    settings = tuple((name, getattr(config, name)) for name in ("model", *OF_TEXTS))
    refusal = _text_refusal(settings, tuple(marks), facts)
    return [Problem(own_texts[0], refusal.message, refusal.remedy)] if refusal else []


@st.cache_resource(
    show_spinner="Reading your text", max_entries=64, hash_funcs={Facts: lambda facts: str(facts.folder)}
)
def _text_refusal(
    settings: tuple[tuple[str, str | int], ...], marks: tuple[tuple[int, int], ...], facts: Facts | None
) -> TrspError | None:
    """Why the texts of these settings cannot be used; `marks` are the files' sizes and times of change."""
    config = configs.parse(dict(settings))
    try:
        blocks.check(config)
        if facts:
            text_check.check(facts, config)
    except TrspError as error:
        return error
    return None


def fetchable(name: str) -> bool:
    """Whether the model is one that can be fetched, and is not here."""
    try:
        catalog.locate(name)
    except TrspError:
        return name in catalog.CATALOGUE or catalog.is_hub_id(name)
    return False


def ratio_in_words(draft: Draft) -> str:
    """`8 of 30 layers, 18 % fewer parameters`."""
    if not draft.facts:
        return "How many layers that is will be known once the model is looked up or on this machine."
    facts, values, depth = draft.facts, session.form(), draft.facts.n_layers
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
        f"**{count} of {facts.n_layers} layers, {fewer} fewer parameters** "
        f"({formatting.parameters(facts.parameters)} now)"
    )


def lambda_2_in_words(draft: Draft) -> str:
    """For how many steps it acts, and where it would."""
    if not draft.config:
        return ""
    remedy = " Take the preset Two-stage to see it act." if draft.config.transfer != "penalty" else ""
    return schedules.lambda_2_in_words(draft.config) + remedy


def forecast_and_start(draft: Draft) -> None:
    """Minutes and memory before the start, every reason against it, and the button."""
    refusal = _problems(draft)
    with st.container(border=True, key="start-box"):
        if draft.config and draft.facts and not draft.problems:
            expected = forecast.forecast(draft.config, draft.facts)
            st.markdown(
                f":material/schedule: **About {formatting.duration(expected.seconds)}**, "
                f"**{formatting.size(expected.peak_bytes)} of memory** at the peak on this machine."
                + (" A rough figure: nothing like it was timed here yet." if expected.rough else "")
            )
            _phases(expected.phases)
            if draft.config.precision in PACKED:
                st.caption(_packed(draft.config, draft.facts, expected))
            refusal = refusal or _memory_refusal(draft.config, expected)
        if draft.missing:
            where = "looked up" if catalog.is_hub_id(draft.missing) else "on this machine"
            ahead = "Start is possible once the model is on this machine."
            st.caption(ahead if draft.facts else f"The forecast comes once the model is {where}.")
        if refusal:
            st.error(refusal, icon=":material/block:")
        blocked = bool(refusal or draft.missing) or draft.facts is None
        with st.container(horizontal=True):
            icon = ":material/play_arrow:"
            clicked = st.button("Start", type="primary", icon=icon, disabled=blocked, key="start")
            if draft.config:
                command(draft.config, "The same run from a shell. The address of this page holds the same settings.")
        if clicked and draft.config:
            start(draft.config)


def command(config: RunConfig, caption: str = "The same run from a shell:", history: Sequence[KnobTurned] = ()) -> None:
    """The run as a shell command, to copy; with the knobs that were turned in it."""
    with st.popover("Command", icon=":material/terminal:"):
        st.caption(caption)
        st.code(escaping.lines(turns.command(config, history)), language="bash", wrap_lines=True)
        st.caption("The same from Python:")
        st.code(model_card.script(config, history), language="python", wrap_lines=True)


def _problems(draft: Draft) -> str:
    """All problems of the form as one list, or nothing."""
    if not draft.problems:
        return ""
    lines = [f"- {words.in_form(p.message)} {words.in_form(p.remedy)}" for p in draft.problems]
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
        f"The layers' weights are packed into {bits} bits: all weights take {formatting.size(sizes[0])} instead of "
        f"{formatting.size(sizes[1])}, the run {formatting.size(expected.peak_bytes)} instead of "
        f"{formatting.size(whole.peak_bytes)}. "
        "It costs time, since they are spelled out for every pass (about "
        f"{formatting.duration(expected.seconds)} instead "
        f"of {formatting.duration(whole.seconds)}), and a dense model that is a little worse to begin with."
    )


def _phases(phases: list[dict]) -> None:
    """Where the time goes."""
    total = sum(p["seconds"] for p in phases)
    parts = [
        f"{words.phase(p['name'])} {formatting.duration(p['seconds'])}" for p in phases if p["seconds"] >= 0.05 * total
    ]
    st.caption(" · ".join(parts))


def _memory_refusal(config: RunConfig, expected: forecast.Forecast) -> str:
    """Why this machine cannot do it now, or nothing."""
    try:
        if not forecast.on_gpu(config):
            forecast.check_memory(expected)
    except TrspError as error:
        return f"{words.plain(error.message)} {words.plain(error.remedy)}"
    return ""


def start(config: RunConfig) -> None:
    """Check the texts and the memory once more, queue the run and show it; if it is refused, say why."""
    try:
        refuse(server.run_queue().limits.check_run(config, server.store().root))
        with st.spinner("Looking at the texts"):
            preflight.preflight(config)
        run = server.run_queue().submit(config, own_ids=session.mine(), visitor=session.visitor())
    except TrspError as error:
        st.error(f"{words.plain(error.message)} {words.plain(error.remedy)}", icon=":material/error:")
        return
    session.show_run(run.id)
    st.rerun()


def change(config: RunConfig) -> None:
    """Fill the form with a run's settings and show the form; a callback."""
    session.fill({name: getattr(config, name) for name in KNOBS})
    session.leave_run()
