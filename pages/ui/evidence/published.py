"""Figures that others have published, as they stand there: their models, their data, their protocol, not ours."""

from __future__ import annotations

import pandas as pd

SOURCE = (
    "TRSP's paper (arXiv:2505.18232, v4) and the README of its code: 25 % of the layers removed, WikiText-2 perplexity "
    "and the mean accuracy of PIQA, WinoGrande, HellaSwag, ARC-e and ARC-c in percent. Calibrated on WikiText-2 too: "
    "a gain there mixes transfer with training in the measured domain; the baselines were retrained with LoRA on 1,000 "
    "of its samples. The last two rows come from BlockPruner's table (arXiv:2406.10594) at 21 % and 24 % without any "
    "training: the same ShortGPT is two to three times worse there."
)
DOUBTS = (
    "Not all of it fits together: README and paper differ for LLaMA3-8B and LLaMA2-13B (the norm is not named), and a "
    "measured speed-up of 1.35 for 30 of 40 layers is above its ceiling of 1.33."
)
_ROWS = (
    ("LLaMA2-7B", "dense", 5.47, 69.00, "TRSP paper"),
    ("LLaMA2-7B", "SLEB", 9.63, 54.79, "TRSP paper"),
    ("LLaMA2-7B", "ShortGPT", 8.89, 57.10, "TRSP paper"),
    ("LLaMA2-7B", "TRSP", 7.08, 60.57, "TRSP paper"),
    ("LLaMA2-7B", "TRSP, all chosen at once (w/o W)", 9.26, 56.19, "TRSP paper"),
    ("LLaMA2-7B", "TRSP without stage 2 (w/o R)", 10.15, 54.36, "TRSP paper"),
    ("LLaMA2-13B", "dense", 4.88, 71.76, "TRSP paper"),
    ("LLaMA2-13B", "SLEB", 7.08, 58.59, "TRSP paper"),
    ("LLaMA2-13B", "ShortGPT", 6.79, 62.96, "TRSP paper"),
    ("LLaMA2-13B", "TRSP", 5.82, 65.11, "TRSP paper"),
    ("LLaMA3-8B", "dense", 5.76, 75.62, "TRSP paper"),
    ("LLaMA3-8B", "SLEB", 10.38, 63.12, "TRSP paper"),
    ("LLaMA3-8B", "ShortGPT", 9.26, 66.17, "TRSP paper"),
    ("LLaMA3-8B", "TRSP", 7.68, 68.38, "TRSP README"),
    ("LLaMA2-7B", "ShortGPT, no training", 18.45, 58.18, "BlockPruner"),
    ("LLaMA2-13B", "ShortGPT, no training", 20.06, 62.60, "BlockPruner"),
)


def table() -> pd.DataFrame:
    return pd.DataFrame(_ROWS, columns=["Model", "Method", "Perplexity, WikiText-2", "Mean accuracy, %", "Source"])
