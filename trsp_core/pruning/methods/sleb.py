"""SLEB: removes, K times in turn, the layer whose removal raises the loss least (arXiv:2402.09025).

    repeat K times:  P gets the candidate i with the smallest  L_LM(W without P and i; X)

Each layer is so judged together with the removals before it. The first and the last layer are no candidates, as in
`sleb.py` of its authors (jiwonsong-dev/SLEB), whose barriers at both ends are 1 unless set otherwise. The original
computes every candidate from the input up; `perf.removal_search` computes nothing twice, and drops a candidate once it
cannot be the best any more.
"""

from __future__ import annotations

from trsp_core.errors import TrspError
from trsp_core.pruning.methods import Method, PassCounts, pick, progressed, tell

ENDS = 1  # layers at each end that are never chosen


def choose(lab, config, count):
    """The K layers of P in order of choice. The scores are the losses (nats a predicted token) of the first round.

    Raises:
        TrspError: too few candidates are left.
    """
    chosen, search = [], lab.search(lab.sample(config), rounds=count)
    for round_ in range(1, count + 1):
        free = [i for i in lab.candidates(config, chosen) if ENDS <= i < lab.n_layers - ENDS]
        if not free:
            raise TrspError("No layer is left that SLEB may choose.", "Lower the ratio, or protect less.")
        scores = [float("nan")] * lab.n_layers
        for done, (layer, loss) in enumerate(search.losses(free, chosen, bounds=round_ > 1), 1):
            scores[layer] = loss
            yield progressed(round_ - 1 + min(done / len(free), 1), count)
        if round_ == 1:
            yield from tell(lab, config, "sleb", scores)
        yield pick(lab, config, scores, chosen, round_)
    return chosen


METHOD = Method(
    name="sleb",
    title="SLEB, greedy loss",
    paper="SLEB: Streamlining LLMs through Redundancy Verification and Elimination, arXiv:2402.09025",
    summary="One layer at a time, the one whose removal raises the loss least beside those already gone.",
    choose=choose,
    pass_counts=PassCounts(each_layer=0.25, each_pair=0.33, keeps=True),
    ends=ENDS,
)
