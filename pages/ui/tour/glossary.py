"""The words of this field, explained where they are met."""

from __future__ import annotations

import streamlit as st

TERMS = {
    "Layer, block": (
        "One storey of the stack. It reads the numbers that stand for each word, computes something, and adds it to "
        "them. A block of text is something else: a fixed number of tokens, 256 for instance."
    ),
    "Token": "A word or a piece of one: what a model reads and writes, one by one.",  # nosec B105 - no password
    "Perplexity": (
        "How many tokens the model wavers between on average, at each token of a text. Lower is better; 1 would be "
        "certainty. It is e to the power of the mean loss per token."
    ),
    "Calibration": "The text that a method may learn from, to choose layers and to train. No measured block is in it.",
    "Held out": "Text of another kind that a run never learns from. A gain that shows here too is no mere memory.",
    "Pruning": "Taking parts out of a trained network. Here: whole layers, so that what is left is an ordinary model.",
    "Gate": (
        "A number on a layer's branch, its weight s. At 1 the layer works as it came; at 0 it adds nothing, which is "
        "the same as its removal."
    ),
    "λ₁ (lambda 1)": (
        "How hard stage 1 pulls the layer weights down. At 0 nothing pulls; if it is large, the text has no say."
    ),
    "λ₂ (lambda 2)": (
        "How hard stage 2 presses the chosen layers to change nothing. Higher: their gap closes sooner, and the rest "
        "has less time to learn to do without them."
    ),
    "Repair": (
        "Finds new weights for the layers that stay, one after the other from below: each is to hand on what the whole "
        "model had there. Most repairs solve for them, without any training."
    ),
    "Dense": "The model as it came, with all its layers.",
    "Gap": (
        "How much a layer still changes what passes through it: the length of its change beside the length of what "
        "came in. At 0 its removal costs nothing."
    ),
    "KL": (
        "How far the pruned model's predictions are from those of the model as it came, in nats a token. At 0 they are "
        "the same."
    ),
    "Distillation": (
        "Training that copies a teacher: the loss asks for the predictions of the model as it came, beside the text."
    ),
}


def button(key: str) -> None:
    """A button that opens the glossary in place."""
    with st.popover("Words", icon=":material/menu_book:", key=key, help="The words of this field, explained."):
        for term, meaning in TERMS.items():
            st.markdown(f"**{term}.** {meaning}")
