"""What a page shows is in its address: each control under its own name, and the whole as a link to copy."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from pages.ui.app_state import session
from pages.ui.style import words

Read = Callable[[list[str]], Any]


def linked(key: str, default: Any, read: Read) -> str:
    """Make sure that the control about to be drawn has a value, and that the address holds it unless it is `default`.

    Args:
        key: of the control, and its name in the address.
        read: the control's value from the words in the address; raises ValueError where they mean none. Then the
            control stands at its default, and a line above it says so until it is changed.

    Returns:
        `key`.
    """
    entries, refusal_key = st.query_params.get_all(key), f"refused-{key}"
    if not session.knows(key):
        session.put(refusal_key, "")
        try:
            session.put(key, read(entries) if entries else default)
        except ValueError:
            session.put(key, default)
            session.put(refusal_key, ", ".join(entries)[:60])
    now = session.get(key)
    if now != default:
        session.put(refusal_key, "")
    elif refusal := session.get(refusal_key):
        st.caption(f":orange[:material/link_off: Left out of the address: {words.plain(f'{key}={refusal}')}]")
    new_entries = (
        [] if now == default or now is None else [session.write(v) for v in (now if isinstance(now, list) else [now])]
    )
    if new_entries and new_entries != entries:
        st.query_params[key] = new_entries
    elif entries and not new_entries:
        st.query_params.pop(key, None)
    return key


def one_of(options: Sequence[Any]) -> Read:
    """One of these, by what it is written as."""
    by_word = {session.write(option): option for option in options}

    def read(entries: list[str]) -> Any:
        if entries[-1] not in by_word:
            raise ValueError(entries[-1])
        return by_word[entries[-1]]

    return read


def some_of(options: Sequence[str], most: int) -> Read:
    """Up to `most` of these, in the address's order; what is not among them is left out."""

    def read(entries: list[str]) -> list[str]:
        selection = [word for word in dict.fromkeys(entries) if word in options][:most]
        if not selection:
            raise ValueError(entries)
        return selection

    return read


def within(low: float, high: float, kind: type = float) -> Read:
    """A number within these bounds."""

    def read(entries: list[str]) -> Any:
        value = kind(entries[-1])
        if not low <= value <= high:
            raise ValueError(entries[-1])
        return value

    return read


def text(most: int) -> Read:
    """Up to `most` letters."""

    def read(entries: list[str]) -> str:
        if len(entries[-1]) > most or "\x00" in entries[-1]:
            raise ValueError(entries[-1])
        return entries[-1]

    return read


def left_out() -> None:
    """What the form could not take from the address."""
    for problem in session.left_out():
        message = f"Left out of the address: {words.in_form(problem.message)} {words.in_form(problem.remedy)}"
        st.warning(message, icon=":material/link_off:")


def link() -> str:
    """The whole address of what this tab shows now."""
    parameters = {k: st.query_params.get_all(k) for k in st.query_params}
    base = st.context.url or ""
    return base + ("?" + urllib.parse.urlencode(parameters, doseq=True) if parameters else "")


def title(text: str) -> None:
    """The title of a page, with the link to what it shows beside it."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="page-title"):
        st.header(text, width="content")
        copy()


def copy(label: str = "Copy link") -> None:
    """The link, in a box that has a button to copy it."""
    with st.container(width="content"):  # else it would take a line of its own among buttons
        st.fragment(_copy)(label)


def _copy(label: str) -> None:
    """The link as it is when the box is opened: other fragments may have changed the address meanwhile."""
    popover = st.popover(
        label,
        icon=":material/link:",
        key="copy-link",
        on_change="rerun",
        help="A link to this page as it is set.",
    )
    if popover.open:
        with popover:
            st.caption("Whoever opens this link sees this page with these settings. The button at its end copies it.")
            st.code(link(), language=None, wrap_lines=True)
