"""Weight magnitude: the layer whose weights are smallest goes first. TRSP's paper calls it direct elimination.

    score_i = sum over the weight matrices W of layer i, and their entries, of |W|

This is the Magnitude criterion of Shortened LLaMA (arXiv:2402.02834). For its variant Magnitude+, which protects the
first four and the last two layers, set `protect_first` 4 and `protect_last` 2.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, pick_all


def choose(lab, config, count):
    """The K layers of lowest score. No data is read."""
    scores = [sum(w.detach().double().abs().sum().item() for w in lab.matrices(i)) for i in range(lab.n_layers)]
    return (yield from pick_all(lab, config, "magnitude", scores, count))


METHOD = Method(
    name="magnitude",
    title="Weight magnitude",
    paper="Shortened LLaMA, arXiv:2402.02834",
    summary="The layers with the smallest weights, whatever the text.",
    differences="Its authors count the weights of the norms too; here matrices alone.",
    choose=choose,
    reads_weights=True,
)
