r"""Linear map: at each cut, the layer below it learns in closed form to do what the run of deleted layers did.

ReplaceMe (arXiv:2505.02819) solves for the map of one run of neighbouring layers; here every run has one, in order, so
that each is fitted on what the pruned model really gives it. M (N, D) is what the MLP's output projection of the layer
right below a run puts out, y that layer's output, T the dense model's state behind the run; rows weighted by w = 1/|T|.

    minimise over E:  sum of w^2 |y + M E - T|^2  +  r mean(diag G) |E|^2,   G = M' w^2 M,   T~ = I + E
    W <- T~' W,   x <- y + M E

It is `refit` with M in the place of what the projection reads: D^2 instead of F D numbers a cut, and layers that touch
no cut stay as they are. A run at the very bottom has no layer below it, and is deleted alone.
"""

from __future__ import annotations

from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.pruning.transfers.refit import fitted_in_order, fitted_layers, solved, transposed
from trsp_core.schema.events import PhaseStarted


def repair(lab, config, chosen):
    """New output projections for the layers right below the cuts."""
    layers = [i for i in fitted_layers(lab, chosen) if i + 1 in chosen]
    yield PhaseStarted("repair", len(layers))

    def solve(module, inputs, errors, weights):
        """The change (F, D) of the transposed weight: W' E."""
        weight = transposed(module, module.weight.detach()).float()
        return weight @ solved([h.float() @ weight for h in inputs], errors, weights, config.ridge)

    return (yield from fitted_in_order(lab, chosen, layers, solve))


TRANSFER = Transfer(
    name="linear_map",
    title="Linear map at every cut",
    paper="after ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization, "
    "arXiv:2505.02819",
    summary="The MLP below each run of deleted layers takes in a linear map, solved to do what the run did.",
    equation=r"\min_{E}\; \sum_t \frac{\lVert y_t + E^\top M_t - T_t \rVert^2}{\lVert T_t \rVert^2}"
    r" + r\, \overline{\mathrm{diag}\,G}\, \lVert E \rVert^2",
    repair=repair,
    in_order=True,
    cost=Cost(passes=1.5, states=5),
)
