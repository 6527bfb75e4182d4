"""The paper's transfer: the whole model trains under a penalty on what the chosen layers P change, so that they learn
to do nothing before they are deleted (arXiv:2505.18232).

    minimise  L_LM(W; X) + lambda_2 * sum over i in P of R(X_out_i - X_in_i)

This file only names it: `trsp_core.pruning.stage2` holds the equation and its schedule, and `anneal`, the setting by
which a gate fades the chosen layers out meanwhile.
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
