"""ReplaceMe: a linear map stands in for a run of K neighbouring layers (arXiv:2505.02819).

    l* = argmin over l of  1 - E cos(X_in_l, X_in_(l+K))
    T* = argmin over T of  |M T + Y - X_in_(l+K)|^2,   X_in_l = Y + M

For N tokens, M (N, D) is what the MLP of the layer right below the run puts out, Y (N, D) the rest of the residual
stream there. T (D, D) is folded into that MLP's output projection, W* = T^T W, so that the pruned model has no more
weights than after plain deletion. T is solved by least squares; nothing is trained. Our addition is a ridge that pulls
T towards I, plain deletion, since a small calibration text does not settle all of T: in each of the D channels a small
share of M's own energy there.
"""

from __future__ import annotations

from trsp_core.errors import TrspError
from trsp_core.pruning.methods import Method, PassCounts, pick_run, progressed
from trsp_core.schema.events import Noted

RIDGE = 1e-3  # share of the energy of each channel of M that pulls T to the identity


def choose(lab, config, count):
    """The K neighbouring layers across which hidden states keep their direction best, from the bottom up. There has to
    be a layer below them."""
    from trsp_core.evaluation.losses import similarity

    batches, starts = lab.sample(config), lab.spans(config, count, lowest=1)
    tokens, scores = sum(ids.numel() for ids in batches), dict.fromkeys(starts, 0.0)
    for n, ids in enumerate(batches, 1):
        states = lab.states(ids)
        for i in starts:
            scores[i] += (1 - similarity(states[i], states[i + count])) * ids.numel() / tokens
        yield progressed(n, len(batches) * 2)
    return (yield from pick_run("replaceme", scores, lab.n_layers, count))


def rewrite(lab, config, chosen):
    """New weights, by parameter: the MLP's output projection in the layer below the run, with T folded in. T is fitted
    on all calibration blocks.

    Raises:
        TrspError: that projection's output is not simply added to the residual stream, so T cannot be folded in.
    """
    import torch

    below, above = min(chosen) - 1, max(chosen) + 1
    module = lab.stack.writers(below)[-1]
    require_added(lab, below, module)
    gram = cross = torch.zeros((), dtype=torch.float64, device=lab.device)  # (D, D) from the first batch on
    batches = lab.pool()
    for n, ids in enumerate(batches, 1):
        with torch.no_grad(), lab.heard(module) as heard:
            states = lab.states(ids)
            M, x_in, x_out = (
                x.double().reshape(-1, x.shape[-1]) for x in (heard[0][1], states[below + 1], states[above])
            )
            gram = gram + M.T @ M
            cross = cross + M.T @ (x_out - (x_in - M))
        yield progressed(len(batches) + n, 2 * len(batches))
    ridge = torch.diag(RIDGE * gram.diagonal().clamp(min=1e-12))
    T = torch.linalg.solve(gram + ridge, cross + ridge)
    yield Noted(f"A linear map in the MLP of layer {below} stands in for layers {min(chosen)} to {max(chosen)}.")
    return folded(module, T)


def require_added(lab, layer, module):
    """Raise TrspError unless layer `layer` adds the output of `module` to the residual stream as it is."""
    import torch

    ids = lab.pool()[0][:1]
    with lab.heard(module) as heard:
        states = lab.states(ids)
    with lab.rewritten({p: torch.zeros_like(p) for p in module.parameters()}):
        without = lab.states(ids)[layer + 1]
    with torch.inference_mode():
        off = (states[layer + 1] - heard[0][1].view_as(without) - without).norm() / states[layer + 1].norm()
    if not off < 1e-3:
        raise TrspError(
            "In this family the MLP's output is changed before it joins the residual stream.",
            "Choose a method that replaces nothing.",
        )


def folded(module, T):
    """New weights for the linear map `module`, by parameter, with which its output (N, D) is multiplied by T (D, D)."""
    from torch import nn

    weight = module.weight.detach().double()
    edits = {module.weight: T.T @ weight if isinstance(module, nn.Linear) else weight @ T}  # GPT-2's is (F, D)
    if getattr(module, "bias", None) is not None:
        edits[module.bias] = module.bias.detach().double() @ T
    return edits


METHOD = Method(
    name="replaceme",
    title="ReplaceMe, linear map",
    paper="ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization, arXiv:2505.02819",
    summary="A run of neighbouring layers makes way for a linear map, fitted to do what the run did.",
    differences="Its authors score a run by the last token of each block; here by all tokens. The ridge that pulls the "
    "map towards plain deletion is ours.",
    choose=choose,
    pass_counts=PassCounts(once=1, pool=1),
    contiguous=True,
    rewrite=rewrite,
    reads_weights=True,
)
