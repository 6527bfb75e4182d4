"""TRSP's stage 1: learns a weight for each layer under an l1 penalty, and greedily chooses the layers whose weights are
smallest (arXiv:2505.18232).

    repeat K times:   steps on  L_LM(W, s; X) + lambda_1 * sum over i not in P of |s_i|,
                      then the candidate with the smallest |s_i| joins P and is skipped from then on.

Symbols as in the paper: L layers, s (L,) the layer weights, all 1 at the start, W the model's parameters, P the chosen
layers, K how many are to go. Where s enters the forward pass is `surgery.hooks.gated`.
"""

from __future__ import annotations

from trsp_core.pruning.methods import Method
from trsp_core.schema.events import LayerChosen, StageOneStepped


def choose(lab, config, count):
    """The K layers of P in order of choice. From round to round s goes on from where it is. W stays as it is, unless
    `config.learn_weights`. Rates, lambda_1, the steps of a round and K are those of the moment: `lab.steering`."""
    import torch

    s = torch.ones(lab.n_layers, device=lab.device, requires_grad=True)
    W = list(lab.model.parameters()) if config.learn_weights else []
    groups = [{"params": parameters} for parameters in ([s], W) if parameters]
    optimizer = torch.optim.Adam(groups, fused=bool(W))
    record = {}
    with torch.no_grad():
        s[lab.gone] = 0.0
    finished, P = lab.rounds.begin(s, optimizer)
    round_ = max(finished, len(lab.gone))
    step = lab.rounds.steps or round_ * config.stage1_steps

    def now():
        return lab.steering.now(config)

    def missing():
        """How many layers are still to be chosen."""
        return lab.steering.layers(config, count, lab.n_layers) - len(P)

    def round_steps():
        return now().stage1_steps if missing() > 0 else 0

    def pace(step):
        for group, rate in zip(optimizer.param_groups, (now().stage1_lr, now().stage1_weight_lr), strict=False):
            group["lr"] = rate

    with lab.learning(W), lab.stepping():
        while missing() > 0:
            round_ += 1
            free = [i for i in lab.unprotected(config) if i not in P]

            def loss(ids, free=free):
                lm = lab.lm_loss(ids) if W else lab.gate_loss(s, ids)
                l1 = s[free].abs().sum()
                record["lm"], record["l1"] = lm.detach(), l1.detach()
                if config.l1 == "proximal":  # the l1 term acts after the step instead
                    return lm
                return lm + now().lambda_1 * l1

            def project(free=free):
                if config.l1 == "proximal":
                    s[free] = soft_threshold(s[free], now().stage1_lr * now().lambda_1)
                s[P] = 0.0  # else Adam's momentum would move them on

            with lab.gated(s, config.gate, free), lab.skipped(P):
                seed, first = config.seed * 1009 + round_, step + 1
                steps = lab.fit(optimizer, loss, round_steps, seed, "stage 1", pace, after=project, first=first)
                for step in steps:
                    yield StageOneStepped(step, round_, record["lm"].item(), record["l1"].item(), s.tolist())
            for _ in range(missing() if config.one_shot else min(missing(), 1)):
                yield _take_smallest(lab, config, s.tolist(), P, round_)
            lab.rounds.keep(round_, s, optimizer, P)
    return P


def _take_smallest(lab, config, weights, P, round_):
    """Add the candidate with the smallest |s_i| to P, of equal ones the lowest layer; returns the event that tells
    it."""
    ranked = sorted(lab.candidates(config, P), key=lambda i: (abs(weights[i]), i))
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    P.append(winner)
    margin = abs(weights[runner_up]) - abs(weights[winner]) if runner_up is not None else None
    return LayerChosen(round_, winner, weights[winner], runner_up, margin)


def soft_threshold(s, threshold):
    """sign(s) max(|s| - threshold, 0), of any shape: the proximal step for threshold * |s|."""
    return s.sign() * (s.abs() - threshold).clamp(min=0)


METHOD = Method(
    name="trsp",
    title="TRSP",
    paper="Two-Stage Regularization-Based Structured Pruning for LLMs, arXiv:2505.18232",
    summary="A weight on each layer learns under an l1 penalty; the smallest is chosen, again and again.",
    choose=choose,
    trains=True,
)
