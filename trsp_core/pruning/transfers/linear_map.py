r"""Linear map: the MLP right below each run of deleted layers takes in a linear map, solved to do what the run did.

ReplaceMe (arXiv:2505.02819) solves for one run of neighbouring layers. Here every run gets its map, from the bottom up,
so that each is fitted on the states that the pruned model really has there.

    minimise over E:  sum of w^2 |y + M E - T|^2  +  r mean(diag G) |E|^2,   G = M' w^2 M
    W <- (I + E)' W,   x <- y + M E

For N tokens, and the layer right below a run: M (N, D) is what its MLP's output projection W puts out, y (N, D) the
layer's output, T (N, D) the dense model's state above the run, and w = 1 / |T| the weight of each token. E (D, D) is
what the map adds to plain deletion, r the setting `ridge`, x what goes on to the next layer.

This is `refit` with M in place of what the projection reads: it solves for D^2 numbers a run instead of F D, and
changes no other layers. A run that begins with layer 0 has no layer below it, and is deleted without a map.
"""

from __future__ import annotations

from trsp_core.pruning.transfers import Cost, Transfer
from trsp_core.pruning.transfers.refit import (
    fitted_in_order,
    fitted_layers,
    output_projection,
    require,
    solved,
    transposed,
)
from trsp_core.schema.events import PhaseStarted


def opens(lab, chosen):
    """The maps that `repair` changes; those of all layers where none is chosen yet."""
    return [
        output_projection(lab, i) for i in range(lab.n_layers) if not chosen or (i not in chosen and i + 1 in chosen)
    ]


def repair(lab, config, chosen):
    """New weights, by parameter: the MLPs' output projections in the layers right below the runs of deleted ones.

    Raises:
        TrspError: as in `refit.fitted_in_order`.
    """
    layers = [i for i in fitted_layers(lab, chosen) if i + 1 in chosen]
    yield PhaseStarted("repair", len(layers))

    def solve(module, inputs, errors, weights):
        """The change (F, D) of the projection's transposed weight W': W' E."""
        weight = transposed(module, module.weight.detach()).float()
        return weight @ solved([h.float() @ weight for h in inputs], errors, weights, config.ridge)

    return (yield from fitted_in_order(lab, chosen, layers, lambda layer: [output_projection(lab, layer)], solve))


TRANSFER = Transfer(
    name="linear_map",
    title="Linear map at every cut",
    paper="After ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization, "
    "arXiv:2505.02819",
    summary="The MLP below each run of deleted layers takes in a linear map, solved to do what the run did.",
    equation=r"\min_{E}\; \sum_t \frac{\lVert y_t + E^\top M_t - T_t \rVert^2}{\lVert T_t \rVert^2}"
    r" + r\, \overline{\mathrm{diag}\,G}\, \lVert E \rVert^2",
    repair=repair,
    require=require,
    opens=opens,
    in_order=True,
    cost=Cost(passes=1.7, climbs=True, states=8),
)
