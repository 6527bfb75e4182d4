"""Weight magnitude: the layer whose weights are smallest goes first. TRSP's paper calls it direct elimination.

    score_i = sum over the weight matrices W of layer i, and their entries, of |W|

The Magnitude criterion of Shortened LLaMA (arXiv:2402.02834), plain. Its `+` form also protects the first four and the
last two layers: set `protect_first` and `protect_last`.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, pick_all


def choose(lab, config, count):
    """The K lowest. No data is read."""
    scores = [sum(w.detach().double().abs().sum().item() for w in lab.matrices(i)) for i in range(lab.n_layers)]
    return (yield from pick_all(lab, config, "magnitude", scores, count))


METHOD = Method(
    name="magnitude",
    title="Weight magnitude",
    paper="Shortened LLaMA, arXiv:2402.02834",
    summary="The layers with the smallest weights, whatever the text.",
    choose=choose,
    reads_weights=True,
)
