"""Learned layer masks: every layer gets a random gate, and training settles which gates close.

    u ~ U(0, 1),  z_i = clamp( (1.1 + 0.1) sigmoid((log u - log(1 - u) + log a_i) / b) - 0.1, 0, 1 ),  b = 0.83
    min over a, max over m_1, m_2 of   E L_LM(W, z; X) + m_1 (t - k) + m_2 (t - k)^2,
    k = sum over i of P(z_i = 0),  t = K * step / steps

Hard concrete gates with a Lagrangian that holds the expected number k of closed gates to a target that grows to K: the
depth part of Sheared LLaMA (arXiv:2310.06694; gates from arXiv:1712.01312). W stays as it is here; the paper trains it
along. Steps and rate are those of stage 1; log a moves in nats, so its rate is ten times higher.
"""

from __future__ import annotations

import math

from trsp_core.pruning.methods import Method, pick_all
from trsp_core.schema.events import StageOneStepped

LOW, HIGH, B = -0.1, 1.1, 0.83
START = 3.0  # log a: gates nearly always open
FASTER = 10.0  # times the rate of stage 1


def choose(lab, config, count):
    """The K layers with the lowest log a. Told weights are the gates without noise; `l1` is their sum."""
    import torch

    n, free = lab.n_layers, lab.unprotected(config)
    steps = config.stage1_steps * (1 if config.one_shot else count)
    a = torch.full((n,), START, device=lab.device, requires_grad=True)
    m = torch.zeros(2, device=lab.device, requires_grad=True)
    groups = [{"params": [a]}, {"params": [m], "maximize": True}]
    optimizer = torch.optim.Adam(groups, lr=FASTER * config.stage1_lr)
    draws = torch.Generator().manual_seed(config.seed * 1009 + 7)
    z, record = torch.ones(n, device=lab.device), {"step": 0, "lm": 0.0}

    def loss(ids):
        record["step"] += 1
        u = torch.rand(n, generator=draws).clamp(1e-6, 1 - 1e-6).to(lab.device)
        z[free] = gate((u.logit() + a) / B)[free]
        lm = lab.gate_loss(z, ids)
        record["lm"] = lm.item()
        short = count * record["step"] / steps - closed(a)[free].sum()
        return lm + m[0] * short + m[1] * short**2

    def forget():
        z.detach_()

    with lab.learning([]), lab.stepping(), lab.gated(z, "branch", free):
        for step in lab.fit(optimizer, loss, steps, config.seed * 1009 + 1, "stage 1", after=forget):
            still = gate(a.detach())[free]
            weights = [1.0] * n
            for i, value in zip(free, still.tolist(), strict=True):
                weights[i] = value
            yield StageOneStepped(step, 1, record["lm"], float(still.sum()), weights)
    return (yield from pick_all(lab, config, "masks", a.tolist(), count))


def gate(logits):
    """The stretched and clamped sigmoid: exactly 0 and exactly 1 are reached."""
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def closed(a):
    """P(z = 0) of gates with log a."""
    return (B * math.log(-LOW / HIGH) - a).sigmoid()


METHOD = Method(
    name="masks",
    title="Learned masks",
    paper="Sheared LLaMA, arXiv:2310.06694",
    summary="Random gates on all layers learn to close until the wanted number is shut.",
    choose=choose,
    trains=True,
)
