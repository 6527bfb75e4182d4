"""Taylor: removes the layers whose weights the loss would miss least, to first order.

    score_i = sum over the weight matrices of layer i, and their entries, of  |w * dL_LM/dw|

This is the Taylor criterion of Shortened LLaMA (arXiv:2402.02834): how much the loss changes when a weight is set to
zero, added up over weights without signs. For its variant Taylor+, which protects the first four and the last two
layers since their scores mislead, set `protect_first` 4 and `protect_last` 2.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, PassCounts, pick_all, progressed


def choose(lab, config, count):
    """The K layers of lowest score. The gradient is that of the mean loss over the scored blocks."""
    batches = lab.sample(config)
    tokens = sum(ids.numel() for ids in batches)
    weights = [lab.matrices(i) for i in range(lab.n_layers)]
    with lab.learning([w for matrices in weights for w in matrices]):
        for n, ids in enumerate(batches, 1):
            lab.add_gradient(ids, ids.numel() / tokens)
            yield progressed(n, len(batches))
        scores = [sum((w * w.grad).detach().double().abs().sum().item() for w in matrices) for matrices in weights]
    return (yield from pick_all(lab, config, "taylor", scores, count))


METHOD = Method(
    name="taylor",
    title="Taylor, first order",
    paper="Shortened LLaMA, arXiv:2402.02834",
    summary="The layers whose weights times their gradients add up to least.",
    differences="Its authors count the weights of the norms too; here matrices alone.",
    choose=choose,
    pass_counts=PassCounts(once=3, slopes=True),
    reads_weights=True,
)
