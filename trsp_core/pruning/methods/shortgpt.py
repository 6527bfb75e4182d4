"""ShortGPT: removes the layers that change the direction of their input least (arXiv:2403.03853).

    BI_i = 1 - E over tokens of  cos(X_in_i, X_out_i)

The block influence BI_i is near 0 for a layer that hands on its input nearly as it is. All K layers are chosen from the
dense model at once; nothing is scored again after a removal.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, PassCounts, pick_all, progressed


def choose(lab, config, count):
    """The K layers of lowest block influence."""
    from trsp_core.evaluation.losses import similarity

    batches = lab.sample(config)
    tokens, scores = sum(ids.numel() for ids in batches), [0.0] * lab.n_layers
    for n, ids in enumerate(batches, 1):
        states = lab.states(ids)
        for i in range(lab.n_layers):
            scores[i] += (1 - similarity(states[i], states[i + 1])) * ids.numel() / tokens
        yield progressed(n, len(batches))
    return (yield from pick_all(lab, config, "shortgpt", scores, count))


METHOD = Method(
    name="shortgpt",
    title="ShortGPT, block influence",
    paper="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, arXiv:2403.03853",
    summary="The layers whose output points most nearly where their input does.",
    differences="Its authors score the last layer by what leaves the final norm behind it; here by what leaves the "
    "layer.",
    choose=choose,
    pass_counts=PassCounts(once=1),
)
