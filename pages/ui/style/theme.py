"""How things look on a page: badges and icons of a run's status, and what the configured theme cannot say."""

from __future__ import annotations

from typing import Literal

import streamlit as st

# Badge colours, for texts beside the charts.
STATUS_COLOURS: dict[str, Literal["gray", "blue", "green", "red", "orange"]] = {
    "queued": "gray",
    "running": "blue",
    "finished": "green",
    "cancelled": "gray",
    "failed": "red",
    "lost": "orange",
    "damaged": "orange",
}

STATUS_ICONS = {
    "queued": ":material/schedule:",
    "running": ":material/play_circle:",
    "finished": ":material/check_circle:",
    "cancelled": ":material/stop_circle:",
    "failed": ":material/error:",
    "lost": ":material/link_off:",
    "damaged": ":material/heart_broken:",
}


ON_LIGHT_BLUE = (  # white letters, which Streamlit puts there, could not be read on the dark theme's light blue
    "[data-testid=stBaseButton-primary]:not(:disabled),[data-testid=stMultiSelect] [data-tag],"
    "[data-testid=stMultiSelect] [data-tag] button {color:#14181D}"
)

STILL = (  # a page that is drawn again each second or so would fade, and its bar glide, most of the time
    "[data-stale] {transition:none !important;opacity:1 !important} [data-testid=stProgress] * {transition:none}"
)


def dress() -> None:
    """What the configured theme cannot say."""
    if mode() == "dark":
        st.html(f"<style>{ON_LIGHT_BLUE}</style>")


def keep_still() -> None:
    """Nothing on this page moves but what is redrawn: each frame of a fade costs a run a part of its cores."""
    st.html(f"<style>{STILL}</style>")


def mode() -> str:
    """`light` or `dark`: what this tab shows now."""
    return "dark" if st.context.theme.type == "dark" else "light"
