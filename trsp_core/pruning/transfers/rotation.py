r"""Rotation and scale: turns and scales all that lies below a run of deleted layers, so that hidden states point where
the deleted layers would have turned them.

    minimise over a and Q, Q' Q = I:  |a X_pre Q - X_post|^2        for each run of deleted layers
    U S V' = X_pre' X_post,   Q = U V',   a = tr(S) / |X_pre|^2

X_pre and X_post (N, D) are the states that enter and leave the run in the dense model, for N tokens. All tokens count
alike: the few with states a thousand times as long as the others hold on to the directions that they lie in, and the
rest of Q is free (with rows weighted as in `refit` it came out worse). An RMS norm with its gain g hands on
g x / rms(x), which a rotation of x only turns, once g is in the maps that read it (SliceGPT, arXiv:2401.15024). So with
R the product of all a Q of the runs above a place, the lowest first, and Q_R the rotation in it, the states x below
become x R by

    embedding E R;   readers W diag(g) Q_R,  g <- 1;   writers R' W_out, R' b_out

and every layer computes what it did; at the end of the last run the states are x a Q in the old directions, and all
above stays as it is. The embedding must not be the head as well, since the head reads states that are not turned.
Nothing is trained, and there is no new parameter. A rotation can overfit less than a linear map (RCPU,
arXiv:2510.07782); for whole layers it is ours.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.pruning.transfers import OWN_HEAD, Cost, Transfer
from trsp_core.pruning.transfers.magnitude import runs
from trsp_core.pruning.transfers.refit import transposed
from trsp_core.schema.events import Noted, PhaseStarted, Progressed

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-2  # relative difference that is allowed: the epsilon inside a norm does not scale with the rest


@dataclass(frozen=True)
class ScaledRotation:
    """R = a Q: a scale, and a rotation (D, D) in float64."""

    scale: float
    rotation: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.scale * self.rotation

    def then(self, other: ScaledRotation) -> ScaledRotation:
        """This one, and `other` after it."""
        return ScaledRotation(self.scale * other.scale, self.rotation @ other.rotation)


def repair(lab, config, chosen):
    """The turned weights, by parameter: the embedding, and below the highest run of deleted layers all norms that lead
    into a layer, what reads through them and what writes into the residual stream."""
    batches, cuts = lab.pool(), runs(chosen)
    yield PhaseStarted("repair", len(batches))
    if not cuts:
        return {}
    crosses, energies = dict.fromkeys(cuts, 0.0), dict.fromkeys(cuts, 0.0)
    for done, ids in enumerate(batches, 1):
        states = lab.states(ids)
        for cut in cuts:
            pre, post = (states[i].float().flatten(0, 1) for i in (cut[0], cut[1] + 1))
            crosses[cut] = crosses[cut] + (pre.T @ post).double()
            energies[cut] += pre.double().square().sum().item()
        yield Progressed(done)
    turns = {cut: nearest(crosses[cut], energies[cut]) for cut in cuts}
    for (first, last), turn in turns.items():
        names = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Noted(f"What lies below {names} is turned, and scaled by {formatting.figure(turn.scale)}.")
    return turned(lab, chosen, turns)


def nearest(cross, energy):
    """The turn that brings X_pre nearest to X_post, from X_pre' X_post (D, D) and |X_pre|^2."""
    import torch

    U, S, V_transposed = torch.linalg.svd(cross)
    return ScaledRotation((S.sum() / energy).item(), U @ V_transposed)


def turned(lab, chosen, turns):
    """The turned weights, as `repair` returns them.

    Args:
        turns: of each run of deleted layers, by its first and last layer.
    """
    import torch

    ids, embedding = lab.blocks[:1, :8].to(lab.device), lab.model.get_input_embeddings().weight
    states, edits, above = lab.states(ids), {}, ScaledRotation(1.0, torch.eye(embedding.shape[-1], dtype=torch.float64))
    for layer in reversed(range(max(last for _, last in turns) + 1)):
        for run, turn in turns.items():
            if run[1] == layer:
                above = turn.then(above)
        if layer not in chosen:
            edits |= turned_layer(lab, layer, above, ids, states[layer])
    return edits | {embedding: product(embedding, above.matrix)}


def turned_layer(lab, layer, turn, ids, entering):
    """New weights of layer `layer`, by parameter, with which it takes the states x R to y R, where it takes x to y.

    Args:
        turn: R.
        ids: a few token ids (B, T).
        entering: what enters the layer for them, (B, T, D).

    Raises:
        TrspError: a norm of the layer is no RMS norm with a gain.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    writers, modules = lab.stack.writers(layer), list(lab.stack.layers[layer].modules())
    weighted = [m for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)]
    norms = [m for m in weighted if m.weight.shape == entering.shape[-1:]]
    maps = [m for m in weighted if isinstance(m, (nn.Linear, Conv1D)) and m not in writers]
    with contextlib.ExitStack() as opened:
        heard = {module: opened.enter_context(lab.heard(module)) for module in (*norms, *maps)}
        lab.leaving(layer, ids, entering)
    edits = {}
    for norm in norms:
        readers = [m for m in maps if heard[m] and heard[norm] and same(heard[m][0][0], heard[norm][0][1])]
        if not readers:
            continue
        (x, out), *_ = heard[norm]
        gain, neutral = gain_of(norm, x, out, layer)
        edits[norm.weight] = norm.weight.detach() * 0 + neutral
        for m in readers:
            rows = transposed(m, m.weight.detach()).double()  # (D, F)
            new = turn.rotation.T.to(rows.device) @ (gain[:, None] * rows)
            edits[m.weight] = transposed(m, new).to(m.weight.dtype)
    for m in writers:
        if not isinstance(m, (nn.Linear, Conv1D)):
            raise refusal(layer)
        weight = transposed(m, m.weight.detach())
        edits[m.weight] = transposed(m, product(weight, turn.matrix))
        if getattr(m, "bias", None) is not None:
            edits[m.bias] = product(m.bias.detach(), turn.matrix)
    return edits


def product(tensor, matrix):
    """`tensor` (..., D) times `matrix` (D, D), in the tensor's own number format."""
    return (tensor.detach().double() @ matrix.to(tensor.device)).to(tensor.dtype)


def same(one, other):
    """Whether two tensors hold the same numbers, whatever their shapes."""
    return one.numel() == other.numel() and one.flatten().equal(other.flatten())


def gain_of(norm, x, out, layer):
    """The gain (D,) that `norm` multiplies x / rms(x) by, in float64, and the value of its weight for a gain of 1: 1
    where the weight is the gain, 0 where the gain is 1 + weight, as Gemma's.

    Args:
        x, out: what it reads and puts out, (B, T, D).

    Raises:
        TrspError: neither is so.
    """
    sizes, weight = x.double().square().mean(-1, keepdim=True).sqrt(), norm.weight.detach().double()
    unit = x.double() / sizes.clamp(min=1e-30)
    for gain, neutral in ((weight, 1.0), (1 + weight, 0.0)):
        if (out.double() - unit * gain).norm() <= CLOSE * out.double().norm():
            return gain, neutral
    raise refusal(layer)


def require(lab):
    """Look at the model before any work: turned at random, the embedding and each layer have to hand that on.

    Raises:
        TrspError: the embedding is the head as well, or a turn is not handed on.
    """
    import torch

    embedding, head = lab.model.get_input_embeddings().weight, lab.model.get_output_embeddings().weight
    if embedding is head:
        raise TrspError(
            f"The embedding of {type(lab.model).__name__} is its head as well: a rotation of the one would turn what "
            f"the other reads, and a head of its own would add {formatting.parameters(head.numel())} numbers.",
            "Set --transfer linear_map or refit, or choose a model with a head of its own.",
        )
    draw = torch.randn(embedding.shape[-1], embedding.shape[-1], generator=torch.Generator().manual_seed(0))
    turn, ids = ScaledRotation(1.1, torch.linalg.qr(draw.double()).Q), lab.blocks[:1, :8].to(lab.device)
    states, turned_embedding = lab.states(ids), {embedding: product(embedding, turn.matrix)}
    with lab.rewritten(turned_embedding):
        require_near(lab.entering(0, ids), states[0], turn, 0)
    for layer, (entering, leaving) in enumerate(itertools.pairwise(states)):
        edits = turned_layer(lab, layer, turn, ids, entering) | ({} if layer else turned_embedding)
        with lab.rewritten(edits):
            require_near(lab.leaving(layer, ids, product(entering, turn.matrix)), leaving, turn, layer)


def require_near(state, before, turn, layer):
    """Raise TrspError unless `state` is `before` (B, T, D), turned."""
    exact, expected = state.dtype.itemsize == 4, before.double() @ turn.matrix.to(before.device)
    if not (state.double() - expected).norm() <= (CLOSE if exact else 3 * CLOSE) * expected.norm():
        raise refusal(layer)


def refusal(layer):
    """The TrspError for a layer that does not hand on a turn of the states."""
    return TrspError(
        f"A rotation of the hidden states is not handed on by layer {layer}: it reads them through more than an RMS "
        "norm, or writes them through a norm or by experts.",
        "Set --transfer rebuild, none or penalty, or choose another model.",
    )


TRANSFER = Transfer(
    name="rotation",
    title="Rotation and scale",
    paper="",
    summary="What lies below each cut is turned and scaled, so that the states point where the deleted layers turned "
    "them.",
    equation=r"\min_{a,\, Q^\top Q = I}\; \sum_t \lVert a\, Q^\top x_{pre,t} - x_{post,t} \rVert^2",
    repair=repair,
    require=require,
    needs=(OWN_HEAD,),
    cost=Cost(passes=1.0, copies=2.0),
)
