r"""Magnitude compensation: scales everything below a run of deleted layers, so that hidden states are as large above
the run as the deleted layers would have made them (Prune&Comp, arXiv:2507.18212).

    alpha_c = mean over k of  E |X_post[:, k]| / E |X_pre[:, k]|        for each run c of deleted layers
    embedding * prod of all alpha_c,   writers of layer i * prod of those alpha_c whose run lies above i

X_pre and X_post (N, D) are the states that enter and leave run c in the dense model, for N tokens; k is one of the D
channels; the writers of a layer are what it writes into the residual stream with. A layer reads its input through a
norm, which undoes any scale, so layers below a run compute the same as before, alpha times as large. Where the head is
the embedding, and so is scaled too, the weight of the final norm is divided by the product. Nothing is solved or
trained, and there is no new parameter.
"""

from __future__ import annotations

import math
from typing import Any

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.schema.events import Noted, PhaseStarted, Progressed

CLOSE = 1e-2  # relative difference that is allowed: the epsilon inside a norm does not scale with the rest


def repair(lab, config, chosen):
    """The scaled weights, by parameter: the embedding, what writes into the residual stream below a run, and where the
    head is the embedding the final norm.

    Raises:
        TrspError: in this family a scale is not handed on from layer to layer.
    """
    cuts, batches = (
        [run for run in runs(chosen) if run[1] < lab.n_layers - 1],
        lab.pool(),
    )  # above one reads a norm alone
    yield PhaseStarted("repair", len(batches))
    if not cuts:
        return {}
    pre: dict[tuple[int, int], Any] = dict.fromkeys(cuts, 0.0)  # sums of |X_pre| by channel (D,)
    post = pre.copy()
    for done, ids in enumerate(batches, 1):
        states = lab.states(ids)
        for cut in cuts:
            pre[cut] = pre[cut] + states[cut[0]].double().abs().flatten(0, 1).sum(0)
            post[cut] = post[cut] + states[cut[1] + 1].double().abs().flatten(0, 1).sum(0)
        yield Progressed(done)
    alphas = {cut: (post[cut] / (pre[cut] + 1e-12)).mean().item() for cut in cuts}
    for (first, last), alpha in alphas.items():
        require_handed_on(lab, chosen, (first, last), alpha)
        names = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Noted(f"What lies below {names} is scaled by {formatting.figure(alpha)}.")
    return scaled(lab, chosen, alphas)


def require(lab):
    """Scale what lies below the layer in the middle, to see whether the scale is handed on.

    Raises:
        TrspError: it is not.
    """
    middle = lab.n_layers // 2
    require_handed_on(lab, [middle], (middle, middle), 1.1)


def runs(chosen):
    """The runs of neighbouring layers in `chosen`, each as (first, last), from the bottom up."""
    ordered = sorted(chosen)
    firsts = [i for i in ordered if i - 1 not in chosen]
    lasts = [i for i in ordered if i + 1 not in chosen]
    return list(zip(firsts, lasts, strict=True))


def scaled(lab, chosen, alphas):
    """The scaled weights, as `repair` returns them.

    Args:
        alphas: the factor of each run of deleted layers, by its first and last layer.
    """
    model = lab.model
    whole = math.prod(alphas.values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    edits = {embedding: embedding.detach() * whole}
    for layer in set(range(max(first for first, _ in alphas))) - set(chosen):
        factor = math.prod(alpha for (first, _), alpha in alphas.items() if layer < first)
        edits |= {p: p.detach() * factor for p in lab.stack.outputs(layer)}
    return edits | (divided(lab, final_norm(lab), whole) if head is embedding else {})


def final_norm(lab):
    """The norm whose output the head reads.

    Raises:
        TrspError: there is none, or it has no weight to scale by.
    """
    ids = lab.pool()[0][:1]
    inside = {id(m) for layer in lab.stack.layers for m in layer.modules()}
    norms = [m for m in lab.model.modules() if id(m) not in inside and getattr(m, "weight", None) is not None]
    for norm in (m for m in norms if m.weight.dim() == 1):
        with lab.heard(lab.model.get_output_embeddings()) as head_calls, lab.heard(norm) as norm_calls:
            lab.states(ids)
        if norm_calls and norm_calls[-1][1].equal(head_calls[-1][0]):
            return norm
    raise refusal()


def divided(lab, norm, factor):
    """New weights for `norm`, by parameter, with which it puts out 1 / `factor` of what it did: divided where it
    multiplies by its weight w, (1 + w) / factor - 1 where it multiplies by 1 + w, as Gemma's does.

    Raises:
        TrspError: neither is so.
    """
    ids = lab.pool()[0][:1]
    with lab.heard(norm) as calls:
        lab.states(ids)
    expected = calls[-1][1] / factor
    plain = {p: p.detach() / factor for p in norm.parameters()}
    for edits in (plain, {**plain, norm.weight: (1 + norm.weight.detach()) / factor - 1}):
        with lab.rewritten(edits), lab.heard(norm) as calls:
            lab.states(ids)
        if (calls[-1][1] - expected).norm() <= CLOSE * expected.norm():
            return edits
    raise refusal()


def require_handed_on(lab, chosen, cut, alpha):
    """Raise TrspError unless scaling for the run `cut` alone makes what enters it, in the model without the runs below,
    `alpha` times what it was, and leaves the head its own."""
    ids, below = lab.pool()[0][:1], [i for i in chosen if i < cut[0]]
    edits = scaled(lab, chosen, {cut: alpha})
    with lab.skipped(below):
        expected = alpha * lab.entering(cut[0], ids)
        with lab.rewritten(edits):
            state = lab.entering(cut[0], ids)
    if not (state - expected).norm() <= CLOSE * expected.norm():
        raise refusal()


def refusal():
    """The TrspError for a family in which a scale is not handed on."""
    return TrspError(
        "In this family a scale of the embedding is not handed on from layer to layer.",
        "Set --transfer rebuild, none or penalty, or choose another model.",
    )


TRANSFER = Transfer(
    name="magnitude",
    title="Magnitude compensation (Prune&Comp)",
    paper="Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude Compensation, "
    "arXiv:2507.18212",
    summary="The embedding and what lies below each cut are scaled, so that the states have the size that the deleted "
    "layers left.",
    equation=r"\alpha = \tfrac{1}{D} \sum_k \frac{E\,|X_{post,k}|}{E\,|X_{pre,k}|}",
    repair=repair,
    require=require,
    cost=Cost(passes=1.0, copies=1.0),
)
