"""No transfer: the chosen layers P are deleted, and what is left may be trained.

    minimise  L_LM(W without P; X)

It is the control of every other transfer: delete, then train for as many steps, or as many seconds.
"""

from __future__ import annotations

from trsp_core.pruning.transfers import Transfer

TRANSFER = Transfer(
    name="none",
    title="None: delete, then train",
    paper="",
    summary="The chosen layers are deleted as they are; whatever training there is begins after that. The control.",
    equation=r"\min_{W}\; \mathcal{L}_{LM}(W_{\setminus P}; X)",
)
