"""One-shot perplexity: leave each layer out alone; the K whose absence costs least go together.

    score_i = L_LM(W without layer i; X)

The PPL criterion of Shortened LLaMA (arXiv:2402.02834), as a loss; the order is the same. It does not see that two
layers may stand in for each other: SLEB does.
"""

from __future__ import annotations

from trsp_core.methods import Method, Passes, pick_all, progressed


def choose(lab, config, count):
    """The K layers of lowest loss when left out alone."""
    free, batches = lab.unprotected(config), lab.sample(config)
    tokens, scores, done = sum(ids.numel() for ids in batches), [0.0] * lab.n_layers, 0
    for ids in batches:
        for layer, loss in lab.losses_without_each(free, [], ids):
            scores[layer] += loss * ids.numel() / tokens
            done += 1
            yield progressed(done, len(free) * len(batches))
    return (yield from pick_all(lab, config, "oneshot_ppl", scores, count))


METHOD = Method(
    name="oneshot_ppl",
    title="Perplexity without the layer, at once",
    paper="Shortened LLaMA, arXiv:2402.02834",
    summary="The layers whose absence alone raises the loss least, all decided at once.",
    choose=choose,
    passes=Passes(once=1, each_layer=0.6),
)
