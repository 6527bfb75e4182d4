r"""Refit in order: from the first deleted layer upwards, solves for the output projections of each kept layer so that
it hands on the state that the dense model has there.

    minimise over dW:  sum of w^2 |y + h dW' - T|^2  +  r mean(diag H) |dW|^2,   H = h' w^2 h
    (H + r mean(diag H) I) dW' = h' w^2 (T - y),   W <- W + dW,   x <- y + h dW'

The kept layers are taken one after the other, from the one right below the first deleted layer upwards. For one of
them, and N calibration tokens: x (N, D) is the state that the pruned model gives it, y (N, D) its output, W (D, F) its
MLP's output projection and h (N, F) what that reads. T (N, D) is the state that the dense model has where the next kept
layer begins, or at the end. A token has the weight w = 1 / |T|, since a few have states a thousand times as long as the
others; r is the setting `ridge`. What is left of T - y is then solved for with attention's output projection in the
same way, unless the setting `refit` is "mlp".

The order matters: a layer is fitted on what the layers below it, already refitted, really give it, so errors do not add
up. There is no gradient and no new parameter, and what is left is an ordinary checkpoint. The method is ours; near to
it are ReplaceMe (arXiv:2505.02819), LLM-Streamline (arXiv:2403.19135), and the layer-wise reconstruction of GPTQ and
SparseGPT.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.schema.events import LayerRefitted, PhaseStarted, Progressed, RepairPlanned

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2048  # tokens of a pass
CLOSE = 1e-3  # relative difference that is allowed between a layer with its new weights and what was computed for it


def repair(lab, config, chosen):
    """New weights, by parameter: the output projections of the kept layers from the first deleted one upwards.

    Raises:
        TrspError: as in `fitted_in_order`.
    """
    layers = fitted_layers(lab, chosen)
    yield PhaseStarted("repair", len(layers))

    def solve(module, inputs, errors, weights):
        return solved(inputs, errors, weights, config.ridge)

    return (yield from fitted_in_order(lab, chosen, layers, partial(fitted_maps, lab), solve))


def fitted_layers(lab, chosen):
    """The kept layers, ascending, from the one right below the first deleted layer; from the first kept one where none
    is below; [] where nothing is deleted."""
    if not chosen:
        return []
    kept_layers = [i for i in range(lab.n_layers) if i not in chosen]
    below = [i for i in kept_layers if i < min(chosen)]
    return [i for i in kept_layers if i >= (below[-1] if below else 0)]


def opens(lab, chosen):
    """The maps that `repair` may change; those of all layers where none is chosen yet."""
    layers = fitted_layers(lab, chosen) if chosen else range(lab.n_layers)
    return [module for layer in layers for module in fitted_maps(lab, layer)]


def fitted_maps(lab, layer):
    """The output projections of layer `layer` that are solved for, the MLP's first."""
    writers = lab.stack.writers(layer)
    attention = writers[:1] if lab.config.refit == "all" and len(writers) == 2 else []
    return [output_projection(lab, layer), *(m for m in attention if m.weight.dim() == 2)]


def fitted_in_order(lab, chosen, layers, modules, solve):
    """Go up through the kept layers, with the dense model's states beside the pruned model's, and fit those in
    `layers`. Yields a `RepairPlanned`, and a `LayerRefitted` for each of them; `lab.edits` grows with each.

    Args:
        modules: gives the output projections of a layer that are fitted, the MLP's first, by the layer's number.
        solve: called as `solve(module, inputs, errors, weights)` for one of `modules`, with batches of what it reads
            (B, T, F), of T - y (B, T, D) and of the tokens' weights (B, T, 1). Returns the change of its transposed
            weight, (F, D).

    Returns:
        The new weights, by parameter.

    Raises:
        TrspError: a layer's MLP does not end in one linear map that is added to the residual stream.
    """
    if not layers:
        return {}
    yield RepairPlanned(layers)
    kept_layers = fitted_layers(lab, chosen)
    batches = [ids.to(lab.device) for ids in lab.blocks.split(max(1, AT_ONCE // lab.blocks.shape[1]))]
    dense = [lab.entering(kept_layers[0], ids) for ids in batches]
    with lab.skipped([i for i in chosen if i < kept_layers[0]]):
        pruned = [lab.entering(kept_layers[0], ids) for ids in batches]
    lab.edits, solve = (edits := {}), lab.solutions.remembered(solve)
    there, done = kept_layers[0], 0  # `there`: the layer that `dense` enters
    for layer, following in zip(kept_layers, [*kept_layers[1:], lab.n_layers], strict=True):
        for passed in range(there, following):
            dense = [lab.leaving(passed, ids, x) for ids, x in zip(batches, dense, strict=True)]
        there = following
        if layer not in layers:
            pruned = [lab.leaving(layer, ids, x) for ids, x in zip(batches, pruned, strict=True)]
            continue
        try:
            new_weights, pruned, before, after = fitted(lab, layer, modules(layer), batches, pruned, dense, solve)
        except ArithmeticError as error:
            raise TrspError(f"Layer {layer} cannot be solved for: {error}.", "Raise --ridge, or the blocks.") from error
        edits |= new_weights
        yield LayerRefitted(layer, before, after)
        done += 1
        yield Progressed(done)
    return edits


def fitted(lab, layer, modules, batches, pruned, dense, solve):
    """Fit the output projections `modules` of layer `layer`, one after the other.

    A change of attention's output reaches the end of the layer through the MLP too, which least squares do not
    foresee: where it takes the layer further from the dense state, it is dropped.

    Args:
        pruned: states that enter the layer, batches (B, T, D), of the tokens in `batches` (B, T).
        dense: the states T that it should hand on, batches (B, T, D).
        solve: as in `fitted_in_order`.

    Returns:
        The new weights, by parameter; what leaves the layer with them, batches (B, T, D); and how far that is from
        `dense`, before and after.

    Raises:
        ArithmeticError: the equations of a projection are singular to rounding.
        TrspError: the layer's MLP does not end in one linear map that is added to the residual stream.
    """
    weights = [1 / target.float().norm(dim=-1, keepdim=True).clamp(min=1e-6) for target in dense]
    inputs, leaving = zip(
        *(read(lab, layer, modules, ids, x) for ids, x in zip(batches, pruned, strict=True)), strict=True
    )
    inputs_of_mlp, *inputs_of_others = zip(*inputs, strict=True)
    errors = differences(dense, leaving)
    before = distance(errors, weights)
    change = solve(modules[0], inputs_of_mlp, errors, weights)
    edits = changed(modules[0], change)
    leaving = [(y.float() + h.float() @ change).to(y.dtype) for h, y in zip(inputs_of_mlp, leaving, strict=True)]
    require_added(lab, layer, edits, batches[0], pruned[0], leaving[0])
    del inputs, inputs_of_mlp
    errors = differences(dense, leaving)
    after = distance(errors, weights)
    for module, inputs in zip(modules[1:], inputs_of_others, strict=True):
        more_edits = edits | changed(module, solve(module, inputs, errors, weights))
        with lab.rewritten(more_edits):
            states = [lab.leaving(layer, ids, x) for ids, x in zip(batches, pruned, strict=True)]
        errors_left = differences(dense, states)
        if (nearer := distance(errors_left, weights)) < after:
            edits, leaving, errors, after = more_edits, states, errors_left, nearer
    return edits, leaving, before, after


def differences(targets, states):
    """T - x in float32, batches (B, T, D)."""
    return [target.float() - x.float() for target, x in zip(targets, states, strict=True)]


def require(lab):
    """Look at every layer before any work: with its last weights moved at random, its output has to move as computed.

    Raises:
        TrspError: a layer's MLP does not end in one linear map that is added to the residual stream.
    """
    import torch

    ids = lab.blocks[:1, :8].to(lab.device)
    states = lab.states(ids)
    for layer, state in enumerate(states[:-1]):
        module = output_projection(lab, layer)
        (h, *_), y = read(lab, layer, fitted_maps(lab, layer), ids, state)
        draw = torch.randn(h.shape[-1], y.shape[-1], generator=torch.Generator().manual_seed(layer)).to(lab.device)
        scale = 0.1 * y.float().norm() / (h.float() @ draw).norm().clamp(min=1e-6)
        moved = y.float() + h.float() @ (scale * draw)
        require_added(lab, layer, changed(module, scale * draw), ids, state, moved)


def read(lab, layer, modules, ids, entering):
    """What each of `modules` in layer `layer` reads (B, T, F), and what leaves the layer (B, T, D), for token ids
    (B, T) and the state that enters it (B, T, D).

    Raises:
        TrspError: one does not read every token once, as an expert does not, or the states have another shape.
    """
    with contextlib.ExitStack() as ears:
        calls_of = [ears.enter_context(lab.heard(module)) for module in modules]
        leaving = lab.leaving(layer, ids, entering)
    for calls in calls_of:
        if len(calls) != 1 or leaving.dim() != 3 or calls[0][0].numel() // calls[0][0].shape[-1] != ids.numel():
            raise unfit(layer)
    return [calls[0][0].view(*ids.shape, -1) for calls in calls_of], leaving


def solved(inputs, errors, weights, ridge):
    """The map dW' (F, D) that solves the equation above. Products of a batch are taken in float32; they are summed, and
    the system is solved, in float64.

    Args:
        inputs: h, batches (B, T, F).
        errors: T - y, batches (B, T, D).
        weights: w, batches (B, T, 1).
        ridge: r.

    Raises:
        ArithmeticError: the system is singular to rounding.
    """
    import torch

    gram = cross = torch.zeros((), device=inputs[0].device, dtype=torch.float64)
    for h, error, w in zip(inputs, errors, weights, strict=True):
        rows = (h.float() * w).flatten(0, 1)
        gram = gram + rows.T @ rows
        cross = cross + rows.T @ (error * w).flatten(0, 1)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.item() or not factor.isfinite().all():
        raise ArithmeticError(f"at a ridge of {formatting.setting(ridge)} its equations are singular to rounding")
    return torch.cholesky_solve(cross, factor).float()


def output_projection(lab, layer):
    """The linear map at the end of layer `layer`'s MLP.

    Raises:
        TrspError: it does not end in one.
    """
    writers = lab.stack.writers(layer)
    weight = getattr(writers[-1], "weight", None) if writers else None
    if weight is None or weight.dim() != 2:
        raise unfit(layer)
    return writers[-1]


def unfit(layer):
    """The TrspError for a layer whose output is not linear in the last weights of its MLP."""
    return TrspError(
        f"Layer {layer} does not end in one linear map whose output is added, as it is, to the residual stream, so it "
        "cannot be solved in closed form.",
        "Set --transfer rebuild, none or penalty, or choose another model.",
    )


def transposed(module, matrix: Tensor):
    """`matrix` turned from the shape of `module`'s weight to (F, D), or back from that."""
    from torch import nn

    return matrix.T if isinstance(module, nn.Linear) else matrix  # GPT-2's is (F, D)


def changed(module, change: Tensor):
    """The new weight of `module`, by parameter: `change` (F, D) is added to its transposed weight."""
    weight = module.weight.detach()
    return {module.weight: (weight.float() + transposed(module, change)).to(weight.dtype)}


def require_added(lab, layer, edits, ids, entering, expected):
    """Raise TrspError unless layer `layer`, with the new weights in `edits`, turns `entering` (B, T, D) into `expected`
    (B, T, D) for the token ids `ids` (B, T)."""
    with lab.rewritten(edits):
        leaving = lab.leaving(layer, ids, entering).float()
    exact = next(iter(edits)).dtype.itemsize == 4
    if not (leaving - expected.float()).norm() <= (CLOSE if exact else 30 * CLOSE) * expected.float().norm():
        raise unfit(layer)


def distance(errors, weights):
    """The mean over tokens of |T - x| / |T|, from batches of T - x (B, T, D) and of w = 1 / |T| (B, T, 1)."""
    pairs = zip(errors, weights, strict=True)
    total = sum(float((error.norm(dim=-1, keepdim=True) * w).double().sum()) for error, w in pairs)
    return total / sum(w.numel() for w in weights)


TRANSFER = Transfer(
    name="refit",
    title="Refit in order",
    paper="",
    summary="From the first cut upwards, the output projections of each kept layer are solved, by least squares, to "
    "hand on what the dense model had there.",
    equation=r"\min_{\Delta W}\; \sum_t \frac{\lVert y_t + \Delta W h_t - T_t \rVert^2}{\lVert T_t \rVert^2}"
    r" + r\, \overline{\mathrm{diag}\,H}\, \lVert \Delta W \rVert^2",
    repair=repair,
    require=require,
    opens=opens,
    in_order=True,
    cost=Cost(passes=2.5, climbs=True, squares=True, states=6),
)
