"""Angular distance: the run of K neighbouring layers that turns the last token least (arXiv:2403.17887).

    d(l) = 1/pi * arccos( cos(X_in_l, X_in_(l+K)) ),  on the last token of each block, in the mean over blocks

The whole run from layer l to l + K - 1 goes at once. `protect_first` and `protect_last` keep the ends. The paper also
has a simpler variant, the deepest layers but the very last: here the method `last` with `protect_last` 1.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method, PassCounts, pick_run, progressed


def choose(lab, config, count):
    """The K neighbouring layers across which the angular distance is smallest, from the bottom up."""
    batches, starts = lab.sample(config), lab.spans(config, count)
    blocks, scores = sum(len(ids) for ids in batches), dict.fromkeys(starts, 0.0)
    for n, ids in enumerate(batches, 1):
        states = lab.states(ids)
        for i in starts:
            scores[i] += distance(states[i], states[i + count]) * len(ids) / blocks
        yield progressed(n, len(batches))
    return (yield from pick_run("angular", scores, lab.n_layers, count))


def distance(a, b):
    """Angular distance of the last token's hidden states in a and b (B, T, D), in the mean over B: 0 for the same
    direction, 1 for the opposite one."""
    import torch

    with torch.inference_mode():
        cosine = torch.cosine_similarity(a[:, -1].double(), b[:, -1].double(), dim=-1).clamp(-1, 1)
        return (cosine.arccos() / torch.pi).mean().item()


METHOD = Method(
    name="angular",
    title="Angular distance",
    paper="The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887",
    summary="The run of neighbouring layers across which the last token's direction changes least.",
    choose=choose,
    pass_counts=PassCounts(once=1),
    contiguous=True,
)
