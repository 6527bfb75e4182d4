"""The paper's transfer: all layers are there, and the chosen ones are trained to do nothing (arXiv:2505.18232).

    minimise  L_LM(W; X) + lambda_2 * sum over i in P of R(X_out_i - X_in_i)

The equation is `trsp_core.pruning.stage2`, with its schedule; a gate that fades the chosen layers out while they learn
is a knob of it.
"""

from __future__ import annotations

from trsp_core.pruning.transfers import Transfer

TRANSFER = Transfer(
    name="penalty",
    title="Penalty (TRSP)",
    paper="TRSP: Two-Stage Regularization-Based Structured Pruning, arXiv:2505.18232",
    summary="All layers train, with a penalty on what the chosen ones change; then those are deleted.",
    equation=r"\min_{W}\; \mathcal{L}_{LM}(W; X) + \lambda_2 \sum_{i \in P} R(X_{out}^i - X_{in}^i)",
)
