"""The form of a run, made from the knobs: each declaration gives its control, so a new knob needs no line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.uploaded_file_manager import DeletedFile

from pages.ui.app_state import server, session, uploads
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import Problem, TrspError
from trsp_core.models import catalog
from trsp_core.pruning import methods, transfers
from trsp_core.runs import limits
from trsp_core.schema.config import GROUPS, KNOBS, PRESETS, TEXTS
from trsp_core.schema.knobs import Knob

PRESET_HELP = {
    "quick": "Quick: stage 1 with a shortlist, then the layers that stay are refitted, and trained for some steps; "
    "about 4 minutes on two cores with the default model.",
    "standard": "Standard: the same on twice the text, with four times the training; about 10 minutes.",
    "two-stage": "Two-stage: TRSP as in its equations, a few steps of each stage; λ₂ acts here. About 3 minutes.",
    "4-bit": "4-bit: Two-stage on weights packed into four bits, with LoRA adapters in stage 2; a third of the memory.",
    "paper": "Paper: the settings of the paper, long blocks and all weights learning; made for a GPU.",
}


def presets() -> None:
    """One click for a whole setting."""
    session.put("preset", session.preset())
    st.segmented_control(
        "Preset",
        list(PRESETS),
        key="preset",
        format_func=str.capitalize,
        on_change=_preset_chosen,
        help="  \n".join(PRESET_HELP.values()) + "  \nModel, texts, ratio, prompt and seed stay as they are.",
    )


def _preset_chosen() -> None:
    if session.get("preset"):
        session.apply_preset(session.get("preset"))


def first(problems: Sequence[Problem], below_model: Callable[[], None], below_ratio: str, below_lambda_2: str) -> None:
    """The five knobs that matter first; `below_model` draws what helps to find one, `below_ratio` says in words what
    the ratio comes to, `below_lambda_2` in how many steps it acts."""
    left_column, right_column = st.columns(2, gap="large")
    with left_column:
        _control(KNOBS["model"], problems)
        below_model()
        _control(KNOBS["text"], problems)
        _upload()
    with right_column:
        _control(KNOBS["ratio"], problems)
        st.markdown(below_ratio)
        for name in ("lambda_1", "lambda_2"):
            _control(KNOBS[name], problems)
        st.caption(below_lambda_2)


def more(problems: Sequence[Problem]) -> None:
    """All other knobs, a fold for each group; a group with a problem is open."""
    for group, title in GROUPS.items():
        knobs = [k for k in KNOBS.values() if k.group == group]
        if group == "first":
            continue
        wrong = {p.knob for p in problems} & {k.name for k in knobs}
        changed = sum(session.form()[k.name] != k.default for k in knobs)
        label = f"{title} ({changed} changed)" if changed else title
        with st.expander(label, expanded=bool(wrong), icon=":material/error:" if wrong else None, key=f"group-{group}"):
            columns = st.columns(2, gap="large")
            for i, knob in enumerate(knobs):
                with columns[i % 2]:
                    _control(knob, problems)


def _control(knob: Knob, problems: Sequence[Problem]) -> None:
    """Draw the control of `knob`, put its value into the form, and say below it what is wrong with it."""
    draw = {bool: _switch, int: _number, float: _number, str: _text}[knob.kind]
    if knob.name == "ratio":
        draw = _ratio
    elif knob.choices:
        draw = _choice
    elif knob.name in ("model", "text", "heldout"):
        draw = _name
    session.form()[knob.name] = draw(knob, session.seed_widget(knob.name))
    for problem in problems:
        if problem.knob == knob.name:
            st.caption(f":red[:material/error: {words.in_form(problem.message)} {words.in_form(problem.remedy)}]")


def _label(knob: Knob) -> str:
    return f"{knob.label}, {knob.unit}" if knob.unit else knob.label


def _help(knob: Knob) -> str:
    paper = f" In the paper: {knob.paper}." if knob.paper else ""
    return words.plain(f"{knob.help}{paper} Flag: {knob.flag}")


def _switch(knob: Knob, key: str) -> bool:
    return st.toggle(_label(knob), key=key, help=_help(knob))


def _number(knob: Knob, key: str) -> Any:
    """No bounds in the browser: the check speaks about all knobs at once, and nothing typed is changed on the way. A
    whole number stands in a field for any number: one for whole numbers ends the page where a client sends infinity."""
    if knob.kind is int:
        return session.whole(
            st.number_input(_label(knob), step=1.0, format=formatting.C_WHOLE, key=key, help=_help(knob))
        )
    increment = 10.0 ** math.floor(math.log10(float(knob.default))) if knob.default else 0.1
    return st.number_input(_label(knob), step=increment, format=formatting.C_SETTING, key=key, help=_help(knob))


def _ratio(knob: Knob, key: str) -> float:
    return st.slider(_label(knob), 0.0, 1.0, step=0.01, format=formatting.C_FIGURE, key=key, help=_help(knob))


def _text(knob: Knob, key: str) -> str:
    return st.text_input(_label(knob), key=key, help=_help(knob), max_chars=4000)


def _choice(knob: Knob, key: str) -> str:
    registries = {"method": methods.all_methods, "transfer": transfers.all_transfers}
    titles = {choice: choice for choice in knob.choices}
    titles |= {name: one.title for name, one in registries.get(knob.name, dict)().items()}
    return st.selectbox(_label(knob), knob.choices, key=key, help=_help(knob), format_func=titles.__getitem__)


def _name(knob: Knob, key: str) -> str:
    """A known name, or anything typed: a hub id, a path."""
    known = list(dict.fromkeys([*catalog.CATALOGUE, *server.models_here()])) if knob.name == "model" else list(TEXTS)
    value = session.form()[knob.name]
    options = known if value in known else [*known, value]
    name = st.selectbox(_label(knob), options, key=key, help=_help(knob), format_func=title_of, accept_new_options=True)
    return name or ""


def title_of(name: str) -> str:
    """What people call a model or a text of ours; other names as they are."""
    if name in catalog.CATALOGUE:
        return catalog.CATALOGUE[name].title
    if uploads.is_upload(name, server.store().root):
        return f"Your file, {uploads.title(Path(name))}"
    return TEXTS.get(name, name)


def _upload() -> None:
    """A text of one's own."""
    with st.popover("Use your own text", icon=":material/upload_file:"):
        st.caption(
            "A .txt file with an empty line between articles, or a .jsonl file with a “text”, a “content” or chat "
            "“messages” in each line. "
            "Or type the path of a file into the field above."
        )
        st.file_uploader(
            "Text file",
            type=[s[1:] for s in uploads.SUFFIXES],
            max_upload_size=limits.current().upload_bytes // 1_000_000,
            key="upload",
            on_change=_uploaded,
        )
        if session.get("upload_error"):
            st.error(words.plain(session.get("upload_error")))
        if session.get("upload_note"):
            st.info(words.plain(session.get("upload_note")))


def _uploaded() -> None:
    file = session.get("upload")
    if isinstance(file, DeletedFile):
        return  # what was stored before, and let go
    session.put("upload_error", "")
    session.put("upload_note", "")
    if file is None:
        return
    try:
        content = file.getvalue()
        note = uploads.how_read(content, file.name)
        session.put("upload_note", f"{note} {uploads.in_words(content, file.name)}".strip())
        session.fill({"text": str(uploads.keep(content, file.name, server.store().root, session.visitor()))})
    except TrspError as error:
        session.put("upload_error", str(error))
    session.let_go(file)
