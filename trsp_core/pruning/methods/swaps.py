"""Set search by swaps, after EvoPress (arXiv:2410.14649): a set of K layers has children, in which a few of its layers
are swapped for others, and the best of the family is the next parent.

    fitness of a set P:  KL(dense, W without P), in nats a predicted token; lower is better
    a child of P:        n times in turn one layer of P comes back and another one goes,
                         n = min(n_1, n_2), n_1 and n_2 drawn from 1 to `MOST_SWAPS`

In each generation `CHILDREN` children are judged on one batch, in turn another one; then the best `SURVIVORS` of them,
and their parent, on all scored blocks. There are K (L - K) / `PAIRS` generations: so large a share of the swaps that a
set has. The first parent are the K layers whose absence alone costs least.

Hidden states are kept, and so are the figures of sets that came before (`evaluation.layer_removal`): a child is
computed from the lowest swapped layer upwards, and never twice.
"""

from __future__ import annotations

import math
import random

from trsp_core.pruning.methods import Method, PassCounts, pick, progressed, tell
from trsp_core.schema.events import LayerChosen

CHILDREN, SURVIVORS, MOST_SWAPS, PAIRS = 8, 2, 3, 8


def choose(lab, config, count):
    """The K layers of the last parent, those of the lowest score first. The scores are the KL without each layer alone,
    on the first batch.

    Raises:
        TrspError: too few candidates are left.
    """
    from trsp_core.evaluation.layer_removal import Path
    from trsp_core.perf.budget import SEARCH_ROOM

    batches, free = lab.sample(config), lab.candidates(config, [])
    paths = [Path(lab.stack, ids, SEARCH_ROOM // len(batches)) for ids in batches]
    generations = max(math.ceil(count * (len(free) - count) / PAIRS), 0)
    whole = len(free) + generations * (CHILDREN + SURVIVORS)
    scores = [float("nan")] * lab.n_layers
    for done, layer in enumerate(free, 1):
        scores[layer] = fitness(paths[:1], (layer,))
        yield progressed(done, whole)
    yield from tell(lab, config, "swaps", scores)
    first, draws = [], random.Random(config.seed * 1009 + 11)  # noqa: S311 - a reproducible search, no secret
    while len(first) < count:
        pick(lab, config, scores, first, 1)
    parent, done = tuple(sorted(first)), len(free)
    for generation in range(generations):
        family = [child(lab, config, parent, draws) for _ in range(CHILDREN)]
        for parts, survivors in ((paths[generation % len(paths) :][:1], SURVIVORS), (paths, 1)):
            ranks = {}
            for layers in family:
                ranks[layers] = fitness(parts, layers)
                done += 1
                yield progressed(min(done, whole), whole)
            family = [*sorted(ranks, key=lambda layers: (ranks[layers], layers))[:survivors], parent]
        parent = family[0]
    chosen = sorted(parent, key=lambda i: (scores[i], i))
    for layer in chosen:
        yield LayerChosen(1, layer, scores[layer])
    return chosen


def fitness(paths, layers):
    """KL(dense, without `layers`) over the texts of `paths`, in nats a predicted token; infinity if it is no number."""
    kl = math.fsum(path.figures(frozenset(layers)).kl * len(path.ids) for path in paths)
    return math.inf if math.isnan(kl) else kl / sum(len(path.ids) for path in paths)


def child(lab, config, parent, draws):
    """`parent`, a sorted tuple of layers, with one to `MOST_SWAPS` of them swapped, as the random numbers `draws`
    say."""
    layers = parent
    for _ in range(min(draws.randint(1, MOST_SWAPS), draws.randint(1, MOST_SWAPS))):
        out = draws.choice(layers)
        rest = [i for i in layers if i != out]
        others = [i for i in lab.candidates(config, rest) if i != out]
        layers = tuple(sorted((*rest, draws.choice(others) if others else out)))
    return layers


METHOD = Method(
    name="swaps",
    title="Search by swaps",
    paper="EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, arXiv:2410.14649",
    summary="The set of layers without which predictions stay nearest, found by swapping a few of its layers again "
    "and again.",
    differences="Its authors begin with the best of 64 random sets, have 32 children in each of K (L - K) / 1.5 "
    "generations, and drop attention and MLP apart unless told otherwise. Here the search begins with the layers whose "
    "absence alone costs least, has 8 children in each of K (L - K) / 8 generations, and drops whole layers.",
    choose=choose,
    pass_counts=PassCounts(each_layer=0.2, each_pair=0.25, keeps=True, predicts=True),
)
