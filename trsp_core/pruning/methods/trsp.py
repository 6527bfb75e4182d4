"""TRSP's stage 1: learns a weight for each layer under an l1 penalty, and greedily chooses the layers whose weights are
smallest (arXiv:2505.18232).

    repeat K times:   steps on  L_LM(W, s; X) + lambda_1 * sum over i not in P of |s_i|,
                      then the candidate with the smallest |s_i| joins P and is skipped from then on.

Knobs of ours make the choice depend less on the last few steps: what is compared may be the mean of s over the last
`stage1_average` steps of a round, and a round may go on, to at most `stage1_stretch` times its steps, until the margin
between the winner and the runner-up exceeds its noise. A third one, `shortlist`, lets the loss decide among the
smallest: |s_i| tells well which layers come into question, and not so well which of them is the best one to lose.

Symbols as in the paper: L layers, s (L,) the layer weights, all 1 at the start, W the model's parameters, P the chosen
layers, K how many are to go. Where s enters the forward pass is `surgery.hooks.gated`.
"""

from __future__ import annotations

import itertools
import math
import statistics

from trsp_core.pruning.methods import LAYER_WEIGHTS, Method
from trsp_core.schema.events import LayerChosen, StageOneStepped


def choose(lab, config, count):
    """The K layers of P in order of choice; leaves s in `lab.layer_weights`. From round to round s goes on from where
    it is. W stays as it is, unless `config.learn_weights`. Rates, lambda_1, the steps of a round and K are those of the
    moment: `lab.steering`."""
    import torch

    s = torch.ones(lab.n_layers, device=lab.device, requires_grad=True)
    W = list(lab.model.parameters()) if config.learn_weights else []
    groups = [{"params": parameters} for parameters in ([s], W) if parameters]
    optimizer = torch.optim.Adam(groups, fused=bool(W))
    record = {}
    with torch.no_grad():
        s[lab.gone] = 0.0
    finished, P = lab.rounds.begin(s, optimizer)
    step = len(lab.gone) * config.stage1_steps + int(optimizer.state[s]["step"] if finished else 0)
    round_ = max(finished, len(lab.gone))

    def now():
        return lab.steering.now(config)

    def missing():
        """How many layers are still to be chosen."""
        return lab.steering.layers(config, count, lab.n_layers) - len(P)

    def take():
        return missing() if config.one_shot else min(missing(), 1)

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

            history = []  # s after each step of this round
            with lab.gated(s, config.gate, free), lab.skipped(P):
                while missing() > 0 and _goes_on(lab, now(), P, take(), history):
                    seed, skip = config.seed * 1009 + round_, len(history)
                    steps = lab.fit(
                        optimizer, loss, round_steps, seed, "stage 1", pace, after=project, first=step + 1, skip=skip
                    )
                    for step in steps:
                        history.append(s.tolist())
                        yield StageOneStepped(step, round_, record["lm"].item(), record["l1"].item(), history[-1])
            weights = averaged(history or [s.tolist()], config.stage1_average)  # no step: the stage was ended
            for _ in range(take()):
                yield _taken(lab, config, weights, P, round_)
            lab.rounds.keep(round_, s, optimizer, P)
    lab.layer_weights = s.tolist()
    return P


def _taken(lab, config, weights, P, round_):
    """Add the candidate with the smallest |s_i| to P, of equal ones the lowest layer; or, of the `config.shortlist`
    smallest, the one without which the loss is lowest. Returns the event that tells it."""
    ranked = _ranked(lab, config, weights, P)
    shortlist = ranked[: config.shortlist]
    if len(shortlist) > 1:
        winner = _least_missed(lab, config, shortlist, P)
        P.append(winner)
        return LayerChosen(round_, winner, weights[winner])
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    P.append(winner)
    margin = abs(weights[runner_up]) - abs(weights[winner]) if runner_up is not None else None
    return LayerChosen(round_, winner, weights[winner], runner_up, margin)


def _least_missed(lab, config, layers, P):
    """The one of `layers` without which, and without P, the loss of the scored blocks is lowest, with no weights on the
    others."""
    batches = lab.sample(config)
    losses = {i: sum(lab.loss_without([*P, i], ids) * len(ids) for ids in batches) for i in layers}
    return min(layers, key=lambda i: (math.isnan(losses[i]), losses[i], i))


def _ranked(lab, config, weights, P):
    return sorted(lab.candidates(config, P), key=lambda i: (abs(weights[i]), i))


def _goes_on(lab, config, P, take, history):
    """Whether a round takes its steps, or takes them once more: it may, and the margin between the last layer that it
    would choose, of `take`, and the next one is within its noise."""
    if len(history) >= config.stage1_stretch * config.stage1_steps:
        return False
    if not history:
        return True
    weights = averaged(history, config.stage1_average)
    ranked = _ranked(lab, config, weights, P)
    if len(ranked) <= take:
        return False
    winner, runner_up = ranked[take - 1 : take + 1]
    return abs(weights[runner_up]) - abs(weights[winner]) <= noise(history, winner, runner_up)


def averaged(history, steps):
    """The mean of each layer's weight over the last `steps` of `history`, lists of L weights each; (L,)."""
    recent = history[-steps:]
    return [sum(column[1:], column[0]) / len(recent) for column in zip(*recent, strict=True)]


def noise(history, one, other):
    """How far |s| of two layers would have come apart in the steps of `history` if each step moved their difference by
    chance: the standard deviation of its change from step to step, times the root of the number of changes. Infinity
    where there are fewer than two changes."""
    gaps = [abs(weights[other]) - abs(weights[one]) for weights in history]
    changes = [after - before for before, after in itertools.pairwise(gaps)]
    return statistics.stdev(changes) * math.sqrt(len(changes)) if len(changes) > 1 else math.inf


def soft_threshold(s, threshold):
    """sign(s) max(|s| - threshold, 0), of any shape: the proximal step for threshold * |s|."""
    return s.sign() * (s.abs() - threshold).clamp(min=0)


METHOD = Method(
    name="trsp",
    title="TRSP",
    paper="Two-Stage Regularization-Based Structured Pruning for LLMs, arXiv:2505.18232",
    summary="A weight on each layer learns under an l1 penalty; the smallest is chosen, again and again.",
    choose=choose,
    gives=(LAYER_WEIGHTS,),
    trains=True,
)
