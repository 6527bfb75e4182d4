r"""Kept weights: the layer weights s that stage 1 has learned are folded into the kept layers, instead of being dropped
at the deletion.

    W_out <- s_i W_out,   b_out <- s_i b_out        for each map of kept layer i that writes into the residual stream

W_out and b_out are the weight and the bias of attention's output projection, and of the MLP's; or the weights of the
norms behind these, in families that have some there. Stage 1 weighs a whole
layer: X_in + s_i (X_out - X_in). Where attention and the MLP both read X_in (GPT-J, Phi, Falcon), the folded layer is
that to rounding. Where the MLP reads what attention has written (Llama, GPT-2), it reads s_i times as much of that as
it did in stage 1; no weights of an ordinary layer say the other. The paper does not say what becomes of s; this is
ours. Nothing is solved or trained, and there is no new parameter.
"""

from __future__ import annotations

from trsp_core.errors import Problem, TrspError
from trsp_core.pruning.methods import LAYER_WEIGHTS
from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.schema.events import PhaseStarted, Progressed

CLOSE = 1e-3  # relative difference that is allowed: rounding
HALF = 0.5  # the weight that `require` tries
FAR = 1e3  # times as much as a state is tried, so that the epsilon of a norm cannot make it look linear


def repair(lab, config, chosen):
    """The scaled weights, by parameter: all that writes into the residual stream, in the kept layers whose weight is
    not 1; {} where nothing is deleted."""
    kept_layers = [i for i in range(lab.n_layers) if chosen and i not in chosen]
    yield PhaseStarted("repair", len(kept_layers))
    edits = {}
    for done, layer in enumerate(kept_layers, 1):
        edits |= scaled(lab, layer, lab.layer_weights[layer])
        yield Progressed(done)
    return edits


def scaled(lab, layer, weight):
    """`weight` times what layer `layer` writes into the residual stream with, by parameter."""
    return {p: (p.detach().float() * weight).to(p.dtype) for p in lab.stack.outputs(layer)}


def require(lab):
    """Look at every layer before any work: it has to write through its output projections alone, and each alone has to
    write half as much with half its weights.

    Raises:
        TrspError: a layer does not.
    """
    ids = lab.blocks[:1, :8].to(lab.device)
    for layer, entering in enumerate(lab.states(ids)[:-1]):
        modules = lab.stack.writers(layer)

        def addition(weights, layer=layer, entering=entering, modules=modules):
            """What the layer adds to `entering` where its writers are `weights` times themselves."""
            pairs = zip(modules, weights, strict=True)
            edits = {p: p.detach() * weight for module, weight in pairs for p in module.parameters()}
            with lab.rewritten(edits):
                return lab.leaving(layer, ids, entering).float() - entering.float()

        exact, size = entering.dtype.itemsize == 4, entering.float().norm()
        proportional = addition([0.0] * len(modules)).norm() <= CLOSE * size
        for n in range(len(modules)):
            alone = [float(n == other) for other in range(len(modules))]
            factor = (FAR * size / addition(alone).norm().clamp(min=1e-30)).clamp(max=1e12).item()
            whole, half = (addition([share * factor * weight for weight in alone]) for share in (1.0, HALF))
            room = (CLOSE if exact else 30 * CLOSE) * whole.norm()
            proportional = proportional and (HALF * whole - half).norm() <= room
        if not proportional:
            raise TrspError(
                f"What layer {layer} writes into the residual stream is not in proportion to its last weights: a norm "
                "that adds 1 to them stands there, or experts write beside them.",
                "Set --transfer rebuild, none or penalty, or choose another model.",
            )


def contradictions(config):
    """The setting that does not go with it: weights on whole outputs."""
    if config.gate == "branch":
        return []
    message = "Weights that stage 1 has learned on whole outputs cannot be folded into what a layer writes."
    return [Problem("gate", message, "Set --gate branch, or --transfer none.")]


TRANSFER = Transfer(
    name="kept_weights",
    title="Kept weights s folded in",
    paper="",
    summary="The weights that stage 1 has learned for the kept layers are folded into their output projections, "
    "instead of being dropped.",
    equation=r"W_{out}^i \leftarrow s_i\, W_{out}^i",
    repair=repair,
    require=require,
    contradictions=contradictions,
    needs=(LAYER_WEIGHTS,),
    cost=Cost(copies=0.8),
)
