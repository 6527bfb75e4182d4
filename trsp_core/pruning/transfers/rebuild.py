r"""Local rebuild: trains one layer beside each run of deleted layers, and no other, to do the work of the run (with the
loss of XMerge, arXiv:2609.02083).

    minimise over the weights of layer k:  E |f_k(x) - T|^2 / E |T|^2

k is the kept layer right below the run, or right above it where none is below; f_k(x) is its output for x, what enters
it in the pruned model; T is the dense model's state above the run. Runs are taken from the bottom up, so that each
layer learns on what those below really give it. AdamW goes once over the calibration blocks; L_LM plays no part. The
paper takes 300 steps of 16 blocks for each run at a learning rate of 1e-5, this fewer blocks a step at a higher rate.
"""

from __future__ import annotations

from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.pruning.transfers.refit import distance
from trsp_core.schema.events import LayerRefitted, PhaseStarted, Progressed, RepairPlanned

AT_ONCE = 512  # tokens of a step of training
RATE = 1e-4  # the learning rate


def repair(lab, config, chosen):
    """New weights, by parameter, of the layers beside the runs of deleted ones."""
    neighbours = neighbours_of(lab, chosen)
    batches = [ids.to(lab.device) for ids in lab.blocks.split(max(1, AT_ONCE // lab.blocks.shape[1]))]
    yield PhaseStarted("repair", len(neighbours) * len(batches))
    yield RepairPlanned([*neighbours])
    lab.edits = edits = {}
    for n, (layer, behind) in enumerate(neighbours.items()):
        targets = [lab.states(ids)[behind].clone() for ids in batches]
        with lab.rewritten(edits), lab.skipped([i for i in chosen if i < layer]):
            entering = [lab.entering(layer, ids).clone() for ids in batches]
            before = far(lab, layer, batches, entering, targets)
            learners = {p: p.detach().clone() for p in lab.stack.layers[layer].parameters()}
            with lab.rewritten(learners), lab.learning(list(learners)):
                for done in trained(lab, layer, batches, entering, targets, list(learners)):
                    yield Progressed(n * len(batches) + done)
                after = far(lab, layer, batches, entering, targets)
                learnt = {p: p.detach().clone() for p in learners}
        edits |= learnt
        yield LayerRefitted(layer, before, after)
    return edits


def neighbours_of(lab, chosen):
    """The kept layers that are trained; for each, the layer of the dense model whose input it has to give: the next
    kept one, or L. A layer takes over the run right above it; the lowest kept layer also one below it."""
    kept_layers = [i for i in range(lab.n_layers) if i not in chosen]
    behind = {}
    for layer in kept_layers:
        following = next((i for i in kept_layers if i > layer), lab.n_layers)
        if following > layer + 1 or (layer == kept_layers[0] and layer > 0):
            behind[layer] = following
    return behind


def trained(lab, layer, batches, entering, targets, parameters):
    """Train `layer`: take a step on each batch, and yield how many are done.

    Args:
        batches: token ids (B, T).
        entering: what enters the layer for each batch, (B, T, D).
        targets: T for each batch, (B, T, D).
        parameters: those of the layer.
    """
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for done, (ids, x, target) in enumerate(zip(batches, entering, targets, strict=True), 1):
        with torch.enable_grad():
            error = lab.leaving(layer, ids, x, learns=True).float() - target.float()
            loss = error.square().sum() / target.float().square().sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield done


def far(lab, layer, batches, entering, targets):
    """|T - f_k(x)| / |T| in the mean over tokens, for k = `layer`; arguments as in `trained`."""
    errors, weights = [], []
    for ids, x, target in zip(batches, entering, targets, strict=True):
        errors.append(target.float() - lab.leaving(layer, ids, x).float())
        weights.append(1 / target.float().norm(dim=-1, keepdim=True).clamp(min=1e-6))
    return distance(errors, weights)


TRANSFER = Transfer(
    name="rebuild",
    title="Local rebuild (XMerge's loss)",
    paper="XMerge, arXiv:2609.02083",
    summary="The layer beside each cut is trained alone, to hand on what the dense model had behind the cut.",
    equation=r"\min_{W_k}\; E\,\lVert f_k(x) - T \rVert^2 \,/\, E\,\lVert T \rVert^2",
    repair=repair,
    in_order=True,
    cost=Cost(passes=4.0, states=4),
)
