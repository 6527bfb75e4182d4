"""The method's equations in the paper's symbols, and for each the knobs it has, where a run shows it, and the code that
computes it. What is said of a knob comes from its declaration."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from pages.ui.style import words
from trsp_core import formatting
from trsp_core.schema.config import KNOBS

PAPER = "Two-Stage Regularization-Based Structured Pruning for LLMs"
ADDRESS = "https://arxiv.org/abs/2505.18232"
SYMBOLS = (
    ("L", "number of decoder layers, counted from 0 at the input"),
    ("X_{in}^i,\\; X_{out}^i", "hidden states before and after layer i: B blocks of T tokens, D numbers each"),
    ("W", "the weights of the model"),
    ("s_i", "the weight of layer i, 1 at the start"),
    ("P", "the chosen layers; K of them in the end"),
    ("\\mathcal{L}_{LM}", "the language-modelling loss: nats a token of the next token"),
)


@dataclass(frozen=True)
class PaperEquation:
    """One equation.

    Attributes:
        latex: its lines. `text`: what it says, in plain words.
        knobs: names in `KNOBS`.
        on_page: where a run's page shows it.
        code: files of the core, each with a function or class in it.
    """

    title: str
    latex: tuple[str, ...]
    text: str
    knobs: tuple[str, ...]
    on_page: str
    code: tuple[tuple[str, str], ...]


EQUATIONS = (
    PaperEquation(
        "How many layers go",
        (r"K = \lfloor \rho L + \tfrac{1}{2} \rfloor",),
        "The share ρ of the L layers, rounded to whole ones.",
        ("ratio",),
        "“Layers chosen”, among the figures at the top",
        (("schema/config.py", "layers_to_remove"),),
    ),
    PaperEquation(
        "The gate: where a layer's weight enters",
        (
            r"\text{here: } X_{in}^{i+1} = X_{in}^i + s_i \,(X_{out}^i - X_{in}^i)",
            r"\text{in the paper: } X_{in}^{i+1} = s_i \, X_{out}^i",
        ),
        "At 1 the model is untouched in both. At 0 our gate removes exactly the layer; the paper's removes all that "
        "came before it too.",
        ("gate", "protect_first", "protect_last"),
        "“Stage 1”: the stack beside the weights",
        (("surgery/hooks.py", "gated"),),
    ),
    PaperEquation(
        "Stage 1: learn the layer weights",
        (r"\min_{W,\, s}\; \mathcal{L}_{LM}(W, s) + \lambda_1 \sum_{i \notin P} |s_i|",),
        "The penalty pulls every weight to 0, and the text pulls back where it needs the layer. Here only s learns, "
        "unless you let W learn too.",
        ("lambda_1", "stage1_steps", "stage1_lr", "l1", "learn_weights"),
        "“Stage 1”: a line a layer; and “What is being minimised”, on the left",
        (("pruning/methods/trsp.py", "choose"), ("pruning/methods/trsp.py", "soft_threshold")),
    ),
    PaperEquation(
        "Choose, again and again",
        (r"P \leftarrow P \cup \{\arg\min_{i \notin P} |s_i|\} \qquad K \text{ times}",),
        "After some steps the layer of the smallest weight of those left is chosen and skipped from then on, so that "
        "the others feel its absence before the next one goes. They sink on: the last one chosen may lie far below the "
        "first, and a layer that stays below both.",
        ("one_shot", "no_neighbours", "stage1_average", "stage1_stretch"),
        "“Stage 1”: the dots, and the sentence with the margin to the runner-up",
        (("pruning/methods/trsp.py", "_taken"),),
    ),
    PaperEquation(
        "Stage 2: move the knowledge",
        (r"\min_{W}\; \mathcal{L}_{LM}(W) + \lambda_2 \sum_{i \in P} R(X_{out}^i - X_{in}^i)",),
        "All layers run again, with weight 1. The chosen ones are taught to change nothing, while the loss teaches the "
        "others to do without them. Where a gate fades the chosen ones out, λ₂ acts until it is shut.",
        (
            *("lambda_2", "penalty", "penalty_reach", "lambda_2_schedule"),
            *("stage2_steps", "stage2_lr", "output_rate", "anneal"),
        ),
        "“Stage 2”: the gap of each chosen layer, and the perplexity if they were deleted now",
        (("pruning/stage2.py", "Equation"), ("pruning/stage2.py", "penalty"), ("training/trainer.py", "PlainTrainer")),
    ),
    PaperEquation(
        "Delete",
        (r"L \;\rightarrow\; L - K \text{ layers}", r"\text{speed} \le \frac{L}{L-K} \text{ times}"),
        "The chosen layers are taken out for real. What stays keeps its weights; no training follows. Reading and "
        "writing cannot get faster than the share of layers that is left allows.",
        ("save_model",),
        "the result: parameters, perplexity and speed beside the ceiling",
        (("surgery/removal.py", "removed"), ("evaluation/perplexity.py", "time_once")),
    ),
)


def symbols() -> None:
    """The letters, folded away."""
    with st.expander("The letters", icon=":material/function:"):
        for letter, meaning in SYMBOLS:
            st.markdown(f"${letter}$ : {meaning}")


def draw(equation: PaperEquation, run_id: str | None) -> None:
    """One equation with its knobs, where it is on a run's page and its code."""
    with st.container(border=True, key=f"equation-{EQUATIONS.index(equation)}"):
        left_column, right_column = st.columns([2, 3], gap="small", vertical_alignment="center")
        with left_column:
            st.markdown(f"#### {equation.title}")
            st.markdown(equation.text)
        with right_column:
            for line in equation.latex:
                st.markdown(f"$\\displaystyle {line}$", text_alignment="center")
        with st.container(horizontal=True, gap="xsmall"):
            for name in equation.knobs:
                knob(name)
        code = words.plain(", ".join(f"{call} in trsp_core/{file}" for file, call in equation.code))
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(
                f":material/visibility: On a run's page: {equation.on_page}  \n:material/code: In the code: {code}",
                width="stretch",
            )
            _way(run_id)


def knob(name: str) -> None:
    """A knob in words, to open: what it does, its default, its flag."""
    declared = KNOBS[name]
    with st.popover(f"{words.plain(declared.label)}: {words.plain(_in_words(declared.default))}"):
        st.markdown(words.plain(declared.help))
        unit = f" {declared.unit}" if declared.unit else ""
        allowed = ", ".join(declared.choices) or ("on or off" if declared.kind is bool else declared.bounds)
        paper = f" In the paper: {declared.paper}." if declared.paper else ""
        st.caption(
            f"Default: {words.plain(_in_words(declared.default))}{unit}. Allowed: {words.plain(allowed)}."
            f"{words.plain(paper)} Flag: {words.plain(declared.flag)}"
        )


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{formatting.setting(value)}" if isinstance(value, float) else str(value)


def _way(run_id: str | None) -> None:
    """To a run, or to the form where there is none."""
    label = "See it in the newest run" if run_id else "Set it in a new run"
    query = {"run": run_id} if run_id else {}
    st.page_link("pages/views/run.py", label=label, icon=":material/arrow_forward:", query_params=query)
