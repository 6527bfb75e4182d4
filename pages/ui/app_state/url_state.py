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
    given, refused = st.query_params.get_all(key), f"refused-{key}"
    if not session.knows(key):
        session.put(refused, "")
        try:
            session.put(key, read(given) if given else default)
        except ValueError:
            session.put(key, default)
            session.put(refused, ", ".join(given)[:60])
    now = session.get(key)
    if now != default:
        session.put(refused, "")
    elif said := session.get(refused):
        st.caption(f":orange[:material/link_off: Left out of the address: {words.plain(f'{key}={said}')}]")
    wanted = (
        [] if now == default or now is None else [session.write(v) for v in (now if isinstance(now, list) else [now])]
    )
    if wanted and wanted != given:
        st.query_params[key] = wanted
    elif given and not wanted:
        st.query_params.pop(key, None)
    return key


def one_of(options: Sequence[Any]) -> Read:
    """One of these, by what it is written as."""
    by_word = {session.write(option): option for option in options}

    def read(given: list[str]) -> Any:
        if given[-1] not in by_word:
            raise ValueError(given[-1])
        return by_word[given[-1]]

    return read


def some_of(options: Sequence[str], most: int) -> Read:
    """Up to `most` of these, in the address's order; what is not among them is left out."""

    def read(given: list[str]) -> list[str]:
        found = [word for word in dict.fromkeys(given) if word in options][:most]
        if not found:
            raise ValueError(given)
        return found

    return read


def within(low: float, high: float, kind: type = float) -> Read:
    """A number within these bounds."""

    def read(given: list[str]) -> Any:
        value = kind(given[-1])
        if not low <= value <= high:
            raise ValueError(given[-1])
        return value

    return read


def text(most: int) -> Read:
    """Up to `most` letters."""

    def read(given: list[str]) -> str:
        if len(given[-1]) > most or "\x00" in given[-1]:
            raise ValueError(given[-1])
        return given[-1]

    return read


def left_out() -> None:
    """What the form could not take from the address."""
    for problem in session.left_out():
        said = f"Left out of the address: {words.plain(problem.message)} {words.plain(problem.remedy)}"
        st.warning(said, icon=":material/link_off:")


def link() -> str:
    """The whole address of what this tab shows now."""
    given = {k: st.query_params.get_all(k) for k in st.query_params}
    base = st.context.url or ""
    return base + ("?" + urllib.parse.urlencode(given, doseq=True) if given else "")


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
    """Looked up when it is opened: other fragments may have changed the address meanwhile."""
    opened = st.popover(
        label,
        icon=":material/link:",
        key="copy-link",
        on_change="rerun",
        help="A link to this page as it is set.",
    )
    if opened.open:
        with opened:
            st.caption("Whoever opens this link sees this page with these settings. The button at its end copies it.")
            st.code(link(), language=None, wrap_lines=True)
