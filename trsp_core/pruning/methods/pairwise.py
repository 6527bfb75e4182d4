"""Pairwise choice: the set of K layers whose removal, by the gradients of all layer weights at one, moves the loss of
the calibration blocks least (arXiv:2602.00161).

    A[s, i] = dL_s / d alpha_i  at alpha = 1,   H = A'A / m,
    min over x of  x'H x   subject to   sum over i of x_i = K,  x in {0, 1}^L

alpha_i is the weight of layer i in the gate of stage 1 (`surgery.hooks.gated`, on the branch), L_s the loss of block s
of m: all calibration blocks. x'Hx is the mean square of what the removal of the set does to a block's loss, to first
order. Unlike a score a layer, it sees that two layers do the same, or undo each other's work.

Layers that may not go have x_i = 0. The problem is a spin glass with a fixed sum; its authors hand it to solvers for
those. Here `lowest` goes down by swaps from the greedy set around each layer. Nothing of it is drawn by chance, and on
problems that are small enough to try all sets it finds the lowest (a test). Since x'Hx is an estimate, the loss on the
scored blocks decides among the `FINALISTS` lowest sets.

Written from the formula above. Of the paper its abstract was read here; its code is for research alone, and was not.
"""

from __future__ import annotations

import heapq
import math

from trsp_core.errors import TrspError
from trsp_core.pruning.methods import Method, PassCounts, progressed, tell
from trsp_core.schema.events import LayerChosen

FINALISTS = 10  # sets of lowest energy whose losses are compared
ROUNDING = 1e-12  # a swap that lowers the energy by a smaller share of it changes nothing


def choose(lab, config, count):
    """The K layers of the best set, those of the lowest score first. The scores are H_ii, a layer's energy alone.

    Raises:
        TrspError: no set of K layers may be chosen.
    """
    rows, batches = [], lab.pool()
    with lab.learning([]), lab.stepping():
        for n, ids in enumerate(batches, 1):
            rows += gradients(lab, config, ids)
            yield progressed(n, len(batches) + FINALISTS)
    H = energies(rows)
    scores = [H[i][i] for i in range(lab.n_layers)]
    yield from tell(lab, config, "pairwise", scores)
    finalists = lowest(H, count, lambda chosen: lab.candidates(config, chosen))
    losses, blocks = [], lab.sample(config)
    for n, layers in enumerate(finalists, 1):
        losses.append(math.fsum(lab.loss_without(layers, ids) * len(ids) for ids in blocks))
        yield progressed(len(batches) + n, len(batches) + FINALISTS)
    best = min(range(len(losses)), key=lambda n: (math.isnan(losses[n]), losses[n], n))
    chosen = sorted(finalists[best], key=lambda i: (scores[i], i))
    for layer in chosen:
        yield LayerChosen(1, layer, scores[layer])
    return chosen


def gradients(lab, config, ids):
    """The rows of A for the blocks `ids` (B, T): B lists of L numbers, 0 for a layer that may not be chosen. No weight
    of the model may be learning."""
    import torch

    # One weight a block: the gate broadcasts it over tokens and width, (L, B, 1, 1) beside (B, T, D).
    alpha = torch.ones(lab.n_layers, len(ids), 1, 1, device=lab.device, requires_grad=True)
    with torch.enable_grad(), lab.gated(alpha, "branch", lab.unprotected(config)):
        (slopes,) = torch.autograd.grad(lab.lm_loss(ids), alpha)  # of the mean over B blocks
    return (slopes.view(lab.n_layers, len(ids)).double().T * len(ids)).tolist()


def energies(rows):
    """H (L, L), a list of rows, from the m rows of A."""
    columns = list(zip(*rows, strict=True))
    return [[math.fsum(a * b for a, b in zip(one, other, strict=True)) / len(rows) for other in columns]
            for one in columns]  # fmt: skip


def lowest(H, count, candidates):
    """At most `FINALISTS` sets of `count` layers, sorted tuples, with the lowest energies x'Hx that are found, the
    lowest first. From each layer a set grows greedily, then goes down by the best swap until none helps; each set on
    the way counts, and each that is one swap away from it.

    Args:
        H: (L, L), symmetric.
        candidates: called with a set of layers; returns those that may join it.

    Raises:
        TrspError: no set was found.
    """
    best, visited = {}, set()
    for start in candidates(()):
        layers = grown(H, (start,), count, candidates)
        while layers and layers not in visited:
            visited.add(layers)
            here, near = energy(H, layers), swaps(H, layers, candidates)
            best |= {layers: here} | {other: here + rise for other, rise in near.items()}
            best = dict(heapq.nsmallest(FINALISTS, best.items(), key=lambda item: (item[1], item[0])))
            below = min(near, key=lambda other: (near[other], other), default=())
            layers = below if near.get(below, 0.0) < -ROUNDING * here else ()
    if not best:
        raise TrspError(f"No set of {count} layers may be chosen.", "Lower the ratio, or protect less.")
    return list(best)


def grown(H, layers, count, candidates):
    """`layers` with others added one by one, each time the one that adds least energy, up to `count` in all; a sorted
    tuple. () where too few may join."""
    while len(layers) < count:
        pulls = {i: 2 * sum(H[i][j] for j in layers) + H[i][i] for i in candidates(layers)}
        if not pulls:
            return ()
        layers = (*layers, min(pulls, key=lambda i: (pulls[i], i)))
    return tuple(sorted(layers))


def swaps(H, layers, candidates):
    """How much the energy of `layers` rises when one of them is swapped for another, by the set that is then there."""
    pulls = [sum(row[j] for j in layers) for row in H]
    rises = {}
    for out in layers:
        rest = [i for i in layers if i != out]
        for new in candidates(rest):
            if new != out:
                rise = H[out][out] - 2 * pulls[out] + H[new][new] + 2 * (pulls[new] - H[new][out])
                rises[tuple(sorted((*rest, new)))] = rise
    return rises


def energy(H, layers):
    """x'Hx of a set of layers."""
    return math.fsum(H[i][j] for i in layers for j in layers)


METHOD = Method(
    name="pairwise",
    title="Pairwise choice",
    paper="LLM Compression by Block Removal with Constrained Binary Optimization, arXiv:2602.00161",
    summary="The set of layers whose removal, by the gradients of all layer weights, moves each block's loss least.",
    differences="Written from the formula, without its authors' code. They hand the problem to solvers for spin "
    "glasses; here a search by swaps from every layer finds the ten lowest sets, and the loss decides among them.",
    choose=choose,
    pass_counts=PassCounts(once=0.75 * FINALISTS, pool=2, slopes=True),
)
