"""Evidence: studies over splits, methods and controls on one split, and what these data support, in words. Only the tab
that is open is worked out."""

from functools import partial

import streamlit as st

from pages.ui.app_state import url_state
from pages.ui.evidence import lost_steps, plan_tab, published, settings_tab, splits_tab

PLANS = {"ablation": "Does the knowledge move?", "methods": "Which layers?", "transfers": "Which transfer?"}


def show_settings() -> None:
    settings_tab.tab()
    lost_steps.section()


def show_published() -> None:
    st.caption(published.SOURCE)
    st.dataframe(published.table(), hide_index=True, alt="Published perplexities and accuracies.")
    st.caption(published.DOUBTS)


PARTS = {
    "Over splits": splits_tab.tab,
    **{title: partial(plan_tab.tab, plan) for plan, title in PLANS.items()},
    "How the settings matter": show_settings,
    "Published figures": show_published,
}

url_state.title("Evidence")
part = url_state.linked("evidence-part", next(iter(PARTS)), url_state.one_of(list(PARTS)))
for tab, draw in zip(st.tabs(list(PARTS), key=part, on_change="rerun"), PARTS.values(), strict=True):
    if tab.open:
        with tab:
            draw()
