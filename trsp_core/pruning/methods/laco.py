"""LaCo: layers are merged into the one below instead of deleted (arXiv:2402.11187).

    theta*_l = theta_l + sum over k = 1..m of (theta_(l+k) - theta_l),   layers l+1 to l+m go

The paper walks down from the top and merges wherever the model's output stays similar enough, so that a threshold
decides how many layers go. Here K is given. Each of K rounds tries to merge away every layer that is left, and merges
the one after which the last hidden state stays most similar (mean cosine) to the dense model's. Merging a single layer
(m = 1) amounts to deleting the one below it: theta*_l is then theta_(l+1). Layer 0 has none below it, and stays.
"""

from __future__ import annotations

from trsp_core.errors import TrspError
from trsp_core.pruning.methods import Method, PassCounts, pick, progressed, tell


def choose(lab, config, count):
    """The layers to merge away, in order of choice; the scores are 1 - similarity in the first round.

    Raises:
        TrspError: no layer is left, or layers to be merged are not built alike.
    """
    from trsp_core.evaluation.losses import similarity

    batches, chosen, done = lab.sample(config), [], 0
    dense = [lab.states(ids)[-1] for ids in batches]
    for round_ in range(1, count + 1):
        free = [i for i in lab.candidates(config, chosen) if i]
        scores = [float("nan")] * lab.n_layers
        with lab.rewritten(merged(lab, set(chosen))), lab.skipped(chosen):
            now = [lab.states(ids) for ids in batches]
        for i in free:
            gone = {*chosen, i}
            host = max(l for l in range(i) if l not in gone)  # it takes layer i in; layers below it stay as they are
            with lab.rewritten(merged(lab, gone)), lab.skipped(gone):
                last = [lab.last_state(ids, host, x[host]) for ids, x in zip(batches, now, strict=True)]
            scores[i] = sum(1 - similarity(a, b) for a, b in zip(last, dense, strict=True)) / len(batches)
            done += 1 / len(free)
            yield progressed(done, count)
        if not free:
            raise TrspError("No layer is left that could be merged.", "Lower the ratio, or protect less.")
        if round_ == 1:
            yield from tell(lab, config, "laco", scores)
        yield pick(lab, config, scores, chosen, round_)
    return chosen


def merged(lab, gone):
    """The merged weights, by parameter, of each layer that takes in the layers of `gone` right above it.

    Args:
        gone: the layers that are merged away; never layer 0.

    Raises:
        TrspError: neighbouring layers are not built alike.
    """
    layers, edits = [dict(layer.named_parameters()) for layer in lab.stack.layers], {}
    for l in range(lab.n_layers):
        if l in gone:
            continue
        m = 0
        while l + m + 1 in gone:
            m += 1
        for name, theta in layers[l].items() if m else ():
            others = [layers[l + k][name] for k in range(1, m + 1) if name in layers[l + k]]
            if len(others) < m or any(other.shape != theta.shape for other in others):
                raise TrspError(f"Layers {l} to {l + m} are not built alike.", "Choose a method that does not merge.")
            edits[theta] = theta.detach() + sum(other.detach() - theta.detach() for other in others)
    return edits


def rewrite(lab, config, chosen):
    """The merged weights, by parameter, of the layers that stay."""
    yield from ()
    return merged(lab, set(chosen))


METHOD = Method(
    name="laco",
    title="LaCo, merging",
    paper="LaCo: Large Language Model Pruning via Layer Collapse, arXiv:2402.11187",
    summary="Layers are merged into the one below, where that keeps the model's last hidden state most similar.",
    differences="Its authors walk down from the top and merge runs of several layers wherever a threshold of "
    "similarity allows; here K is given, and each round makes the one merge that changes the model least. They "
    "compare the last states as one long vector, behind the final norm; here token by token, before it. They leave "
    "the norms of the layer below as they are; here those are merged too.",
    choose=choose,
    pass_counts=PassCounts(once=1, each_pair=0.5),
    rewrite=rewrite,
    reads_weights=True,
)
