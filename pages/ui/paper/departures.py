"""Where this app departs from the paper and why, what the paper's public code does not do, and runs that show the
difference at a click."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import streamlit as st

from pages.ui.app_state import session
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.pruning import methods
from trsp_core.schema.config import KNOBS, PRESETS

ROWS = (  # what, knob, in the paper, why
    (
        "Gate",
        "gate",
        "on a layer's whole output",
        "there it rescales all that came before; on the branch, 0 is exactly removal",
    ),
    ("What learns in stage 1", "learn_weights", "W too", "faster, less memory; the dense model stays the measure"),
    ("Reach of the penalty", "penalty_reach", "the whole model", "it would bend the layers that are to stay"),
    (
        "Size of the penalty",
        "penalty",
        "a plain sum (its preset: the mean)",
        "relative to the input, one λ₂ serves many models and depths",
    ),
    ("λ₂ over the steps", "lambda_2_schedule", "constant", "the loss can settle before the pull is at its full"),
    ("Output projections", "output_rate", "as fast as the rest", "the gap closes sooner"),
    ("Beside the penalty", "anneal", "nothing", "a gate that fades the chosen layers out came out better"),
)
PUBLIC_CODE = (
    "It does not run as published: two lists are used whose definitions are commented out, and a debugger stop stands "
    "in every training step.",
    "λ₁ is read from the command line and not used; both strengths are fixed numbers in the code, other ones than "
    "in the paper.",
    "In stage 1 the layer's weight is declared and never multiplied in, so only the penalty acts on it: all weights "
    "sink alike, and the smallest is a tie.",
    "In stage 2 the chosen layers are still switched off, and the penalty is added only where a layer is on: it is "
    "always 0.",
    "The learning rate has run out by the time stage 2 begins, and each of its epochs ends after the first update.",
    "The loss is taken on the last token of each block alone.",
    "Layers are switched off, not deleted; perplexity and accuracy are commented out; one model family is wired up.",
)
SOURCE = "Read in the repository fmk345/TRSP, commit 9fb3435 of April 2026."
_TWO_STAGE = PRESETS["two-stage"] | {"stage2_steps": 0}
RUNS: dict[str, Mapping[str, object]] = {
    "The gate as drawn": _TWO_STAGE | {"gate": "output"},
    "As drawn, ends protected": _TWO_STAGE | {"gate": "output", "protect_first": 3, "protect_last": 4},
    "Our gate": _TWO_STAGE,
}


def table() -> pd.DataFrame:
    """A row a departure, ours being the default of the knob or what the presets set."""
    rows = [(theirs, _ours(name), why) for _, name, theirs, why in ROWS]
    index = pd.Index([what for what, *_ in ROWS])
    return pd.DataFrame(rows, index=index, columns=["In the paper", "Here", "Why"])


def markdown() -> str:
    """The same table for the docs, with the flag of each knob."""
    rows = [(what, f"`{KNOBS[name].flag}`", theirs, _ours(name), why) for what, name, theirs, why in ROWS]
    head = ("", "flag", "the paper", "here", "why"), ("---",) * 5
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def of_others() -> list[str]:
    """A line a method whose code here differs from its authors', as the method says itself."""
    return [f"**{m.title}**: {words.plain(m.differences)}" for m in methods.all_methods().values() if m.differences]


def _ours(name: str) -> str:
    value = PRESETS["two-stage"].get(name, KNOBS[name].default)
    if isinstance(value, bool):
        return "on" if value else "off"
    unit = f" {KNOBS[name].unit}" if KNOBS[name].unit else ""
    return f"{formatting.setting(value)}{unit}" if isinstance(value, float) else str(value)


def literal_runs() -> None:
    """Links that set the knobs; Start is left to the visitor."""
    with st.container(horizontal=True):
        for label, settings in RUNS.items():
            query = session.as_parameters(dict(session.START) | dict(settings))
            st.page_link("pages/views/run.py", label=label, icon=":material/tune:", query_params=query)
