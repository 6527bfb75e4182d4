"""One-shot perplexity: leaves each layer out alone, and removes the K whose absence costs least.

    score_i = L_LM(W without layer i; X)

This is the PPL criterion of Shortened LLaMA (arXiv:2402.02834), with the loss for the perplexity: the order is the
same. It does not see that two layers may stand in for each other; SLEB (`sleb`) does.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, PassCounts, pick_all, progressed


def choose(lab, config, count):
    """The K layers without which, each alone, the loss is lowest."""
    free, scores = lab.unprotected(config), [0.0] * lab.n_layers
    for done, (layer, loss) in enumerate(lab.search(lab.sample(config)).losses(free, []), 1):
        scores[layer] = loss
        yield progressed(done, len(free))
    return (yield from pick_all(lab, config, "oneshot_ppl", scores, count))


METHOD = Method(
    name="oneshot_ppl",
    title="Perplexity without the layer, at once",
    paper="Shortened LLaMA, arXiv:2402.02834",
    summary="The layers whose absence alone raises the loss least, all decided at once.",
    choose=choose,
    pass_counts=PassCounts(once=1, each_layer=0.6),
)
