"""The form of Compare: which models, what prompt, how tokens are drawn; and keeping what came out."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from pages.ui.app_state import session, url_state, workbench
from pages.ui.compare import model_choice
from pages.ui.compare.prompts import IN_TEMPLATE, PROMPTS
from pages.ui.run.subjects import Subject
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.runs.store import Run
from trsp_core.schema import messages as an
from trsp_core.schema.knobs import number, whole
from trsp_core.schema.messages import Answer, Generate, Request, Variant
from trsp_core.workbench import transcript
from trsp_core.workbench.transcript import Comparison

HOW = ["Likeliest token", "Drawn"]
FIRST = {  # each control's value in a new tab, and how a link's is read
    "compare-kind": ("Story", url_state.one_of(list(PROMPTS))),
    "compare-prompt": (PROMPTS["Story"], url_state.text(an.MAX_PROMPT)),
    "compare-chat": (False, url_state.one_of([True, False])),
    "compare-drawn": (HOW[0], url_state.one_of(HOW)),
    "compare-temperature": (0.8, url_state.within(0.1, 2.0)),
    "compare-top-p": (0.95, url_state.within(0.05, 1.0)),
    "compare-seed": (0, url_state.within(0, 2**31 - 1, int)),
    "compare-length": (64, url_state.within(8, an.MAX_NEW_TOKENS, int)),
}


def form(subject: Subject, live: str | None) -> None:
    """The controls and the buttons that ask and stop; `live` is the ticket of what is being written."""
    offered = model_choice.variants(subject)
    if session.knows("compare-seed"):
        session.put("compare-seed", session.whole(session.get("compare-seed")))
    for key, (value, read) in FIRST.items():
        url_state.linked(key, value, read)
    usual = [name for name in ("Dense", "Deleted at once", "Pruned") if name in offered]
    usual = usual if "Pruned" not in usual else ["Dense", "Pruned"]
    url_state.linked("compare-models", usual, url_state.some_of(list(offered), an.MAX_COLUMNS))
    chosen = [m for m in session.get("compare-models") if m in offered][: an.MAX_COLUMNS]
    session.put("compare-models", chosen or ["Dense"])
    left_column, right_column = st.columns([3, 2], gap="large")
    with left_column:
        st.pills("Prompt", list(PROMPTS), key="compare-kind", on_change=_fill_prompt, persist_state="session")
        st.text_area(
            "Prompt text", key="compare-prompt", height=110, max_chars=an.MAX_PROMPT, label_visibility="collapsed"
        )
    with right_column:
        st.multiselect("Models, up to three", list(offered), key="compare-models", max_selections=an.MAX_COLUMNS)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            st.toggle(
                "Chat template", key="compare-chat", help="Put the prompt into the model's chat form, where it has one."
            )
            _sampling()
        if note := model_choice.missing(subject):
            st.caption(note)
    ready = bool(session.get("compare-models")) and bool((session.get("compare-prompt") or "").strip())
    with st.container(horizontal=True):
        label, cancel = "Writing" if live else "Write", workbench.client().cancel
        blocked = bool(live) or not ready
        icon = ":material/edit:"
        st.button(label, type="primary", icon=icon, key="write", disabled=blocked, on_click=_ask, args=(offered,))
        st.button("Stop", icon=":material/stop:", key="stop-writing", disabled=not live, on_click=cancel, args=(live,))
    if error := session.get("compare-error"):
        st.warning(words.plain(error), icon=":material/block:")


def _sampling() -> None:
    how = session.get("compare-drawn")
    with st.popover(f"{how}, {session.get('compare-length')} tokens", icon=":material/tune:"):
        st.segmented_control("Each token is", HOW, key="compare-drawn", required=True)
        off = session.get("compare-drawn") != "Drawn"
        st.slider("Temperature", 0.1, 2.0, step=0.1, key="compare-temperature", disabled=off)
        st.slider("Top-p", 0.05, 1.0, step=0.05, key="compare-top-p", disabled=off)
        st.number_input("Seed", step=1.0, format=formatting.C_WHOLE, key="compare-seed", disabled=off)
        st.slider("Length, tokens", 8, an.MAX_NEW_TOKENS, step=8, key="compare-length")


def _fill_prompt() -> None:
    """A callback: the ready prompt of the chosen kind."""
    kind = session.get("compare-kind")
    if kind:
        session.put("compare-prompt", PROMPTS[kind])
        session.put("compare-chat", kind in IN_TEMPLATE)


def _ask(offered: dict[str, Variant]) -> None:
    """A callback: send the form to the workbench."""
    get = session.get
    session.put("compare-error", "")
    try:
        request = Generate(
            columns=[offered[name] for name in get("compare-models") if name in offered],
            prompt=get("compare-prompt") or "",
            chat=bool(get("compare-chat")),
            temperature=number("Temperature", get("compare-temperature")) if get("compare-drawn") == "Drawn" else 0.0,
            top_p=number("Top-p", get("compare-top-p")),
            seed=whole("Seed", get("compare-seed")),
            new_tokens=whole("Length", get("compare-length")),
        )
        session.show_ticket(workbench.ask(request))
        session.put("compare-restored", session.ticket())
    except TrspError as error:
        session.put("compare-error", str(error))


def restore(request: Request) -> None:
    """After a refresh or by a link: the form as it was when the answers in the address were asked for."""
    ticket = session.ticket()
    if not isinstance(request, Generate) or session.get("compare-restored") == ticket:
        return
    session.put("compare-restored", ticket)
    session.put("compare-prompt", request.prompt)
    session.put("compare-kind", next((kind for kind, text in PROMPTS.items() if text == request.prompt), None))
    session.put("compare-chat", request.chat)
    session.put("compare-drawn", "Drawn" if request.temperature else "Likeliest token")
    if request.temperature:
        session.put("compare-temperature", request.temperature)
    session.put("compare-top-p", request.top_p)
    session.put("compare-seed", request.seed)
    session.put("compare-length", request.new_tokens)
    session.put("compare-models", [variant.label for variant in request.columns])


def keep(run: Run, request: Request, answers: Sequence[Answer], comparison: Comparison) -> None:
    """Buttons under a finished comparison."""
    with st.container(horizontal=True):
        keeping = st.button("Keep with this run", icon=":material/bookmark_add:", key="keep")
        copy(comparison)
    if keeping and isinstance(request, Generate):
        try:
            session.show_kept(transcript.keep(run, request, answers))
        except TrspError as error:
            session.put("compare-error", str(error))
        st.rerun()  # the whole page: its address and its list have changed


def copy(comparison: Comparison) -> None:
    """The comparison as Markdown, with the copy button of a code block."""
    with st.popover("As Markdown", icon=":material/content_copy:"):
        st.code(transcript.markdown(comparison), language="markdown", wrap_lines=True)


def kept_list(run: Run, now: str | None) -> None:
    """Links to what was kept with the run."""
    names = transcript.comparisons(run)
    if not names:
        return
    st.markdown("#### Kept with this run")
    for name in names[:10]:
        try:
            request, _ = transcript.read(run, name)
        except TrspError:
            continue
        labels = ", ".join(variant.label for variant in request.columns)
        opening = words.plain(request.prompt[:70])
        st.button(
            f"{opening} · {words.plain(labels)}",
            key=f"kept-{name}",
            icon=":material/bookmark:",
            type="tertiary",
            disabled=name == now,
            on_click=session.show_kept,
            args=(name,),
        )
