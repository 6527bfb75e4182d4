"""Learned masks: every layer gets a random gate, and training settles which of them close (arXiv:2310.06694).

    u ~ U(0, 1),  z_i = clamp( (1.1 + 0.1) sigmoid((log u - log(1 - u) + log a_i) / b) - 0.1, 0, 1 ),  b = 0.83
    min over a, max over m_1, m_2 of   E L_LM(W, z; X) + m_1 (t - k) + m_2 (t - k)^2,
    k = sum over i of P(z_i = 0),  t = K * step / steps

z_i is the gate of layer i (a hard concrete gate, arXiv:1712.01312), u the noise of a step. The multipliers m_1 and m_2
hold the expected number k of closed gates to the target t, which grows to K. This is the depth part of Sheared LLaMA,
but for W, which the paper trains along and which stays as it is here. Steps and learning rate are those of stage 1, the
rate ten times as high, since log a has to move by several nats.
"""

from __future__ import annotations

import math

from trsp_core.pruning.methods import Method, pick_all
from trsp_core.schema.events import StageOneStepped

LOW, HIGH, B = -0.1, 1.1, 0.83
START = 3.0  # log a: gates nearly always open
FASTER = 10.0  # times the learning rate of stage 1


def choose(lab, config, count):
    """The K layers of lowest log a. The events of the steps tell the gates without noise as weights, and their sum as
    `l1`."""
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
    """Gates z from logits, of any shape: a sigmoid that is stretched to [-0.1, 1.1] and clamped to [0, 1], so that it
    reaches exactly 0 and 1."""
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def closed(a):
    """P(z = 0), the probability that a gate is closed, from `a`, which holds log a, of any shape."""
    return (B * math.log(-LOW / HIGH) - a).sigmoid()


METHOD = Method(
    name="masks",
    title="Learned masks",
    paper="Sheared LLaMA, arXiv:2310.06694",
    summary="Random gates on all layers learn to close until the wanted number is shut.",
    differences="Its paper trains the model's weights along, and masks heads and channels too; here the gates of whole "
    "layers learn alone.",
    choose=choose,
    trains=True,
)
