"""Computes the loss of a text, and its divergence from another model, without ever holding all logits.

On a CPU the head's projection is computed in slices of the vocabulary, each small enough to be read again while it is
in the cache. Where a model does more than project (scale or cap its logits), its own logits are used whole.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SLICE = 1024  # tokens of the vocabulary at once, on a CPU
ROWS = 256  # rows of logits, one a predicted token, that are held at once where gradients need them whole, on a CPU
READ = 512  # rows at once where a slice of them at a time will do, on a CPU
ROOM = 2**29  # bytes of logits that are held at once, on a GPU
_plain_heads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_of(model: nn.Module) -> nn.Linear | None:
    """The model's head, if it is an ordinary linear layer; else None."""
    outer: Any = model
    head = outer.get_output_embeddings()
    return head if type(head) is nn.Linear else None


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each pass inside adds what the head is given, (B, T, D); it stays empty where `head_of` is
    None."""
    states: list[Tensor] = []
    head = head_of(model)
    hook = head.register_forward_pre_hook(lambda _, args: states.append(args[0])) if head is not None else None
    try:
        yield states
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def withheld(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the head returns what it is given, (B, T, D), in place of logits; each pass adds that to the list, too.
    The model has to have a `head_of`."""
    states: list[Tensor] = []
    head = head_of(model)
    assert head is not None

    def hand_on(hidden: Tensor) -> Tensor:
        states.append(hidden)
        return hidden

    head.forward = hand_on  # type: ignore[method-assign]
    try:
        yield states
    finally:
        del head.forward


def projects(model: nn.Module, ids: Tensor) -> bool:
    """Whether the model's logits are its head's projection and nothing else. A pass over `ids` (B, T) tells, once for
    each model."""
    head = head_of(model)
    if head is None or "forward" in vars(head):  # another library has put its own forward there
        return False
    if model not in _plain_heads:
        with torch.no_grad(), listening(model) as head_inputs:
            logits = model(input_ids=ids, use_cache=False).logits
            _plain_heads[model] = _projects(head, head_inputs[0].flatten(0, -2), logits.flatten(0, -2))
    return _plain_heads[model]


Slopes = Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor, Tensor]]  # the type of `slopes`


def taught(
    model: nn.Module, ids: Tensor, teacher: nn.Module | None = None, share: float = 0.0, how: Slopes | None = None
) -> list[Tensor]:
    """Two scalars for `ids` (B, T), in nats a predicted token: the mean loss, without a gradient, and with one
    (1 - share) * loss + share * KL(teacher, model). The gradient is computed with the loss, so that few rows of logits
    are held at a time.

    For models whose logits are a plain projection (`projects`) and whose heads are `withheld`. The plain form, equal
    within rounding, is `losses.next_token_loss(model(ids).logits, ids).mean()`.

    Args:
        teacher: None for the loss alone.
        share: 0 to 1; without a teacher it has no effect.
        how: `slopes` or its compiled form, for devices on which logits are taken whole; None for `slopes`.
    """
    states, head = _before_head(model, ids)
    says = None
    if teacher is not None and share:
        with torch.no_grad():
            hidden, other = _before_head(teacher, ids)
        says = lambda rows: F.linear(hidden[rows], other.weight, other.bias).float().log_softmax(-1)  # noqa: E731
    targets, learns = ids[:, 1:].flatten(), any(p.requires_grad for p in head.parameters())
    if takes_whole(states):
        return _Whole.apply(states, head.weight, head.bias, targets, share, says, how or slopes)  # type: ignore[return-value]
    if says is None and not learns:
        loss = _Streamed.apply(states, head.weight, head.bias, targets)
        return [loss.detach(), loss]  # type: ignore[union-attr, list-item]
    return _Taught.apply(states, head.weight, head.bias, targets, share, says)  # type: ignore[return-value]


def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of each predicted token, in nats, (B, T - 1), for `ids` (B, T) and a model whose head is `withheld`. It
    is `losses.next_token_loss` with a slice of logits at a time, without gradients."""
    return nats_given(model, model(input_ids=ids, use_cache=False).logits, ids)


def nats_given(model: nn.Module, states: Tensor, ids: Tensor) -> Tensor:
    """As `nats`, but from `states` (B, T, D), what the model's head is given for `ids` (B, T)."""
    head, nats = head_of(model), []
    assert head is not None
    rows, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    at_once = _rows(rows, head.weight, READ)
    for some, wanted in zip(rows.split(at_once), targets.split(at_once), strict=True):
        if takes_whole(some):
            nats.append(-_log_probabilities(some, head.weight, head.bias).gather(1, wanted[:, None]).squeeze(1))
            continue
        norms = [part.logsumexp(-1) for part in _logits(some, head.weight, head.bias)]
        nats.append(torch.stack(norms).logsumexp(0) - _logit(some, head.weight, head.bias, wanted))
    return torch.cat(nats).view(len(ids), -1)


class Bound:
    """A lower bound of a text's mean loss, which rises with each part of the vocabulary that `read` adds: over a part,
    fewer exponentials are summed. Over the whole vocabulary it is the loss.

    Args:
        states: what the model's head is given, (B, T, D).
        ids: the text, (B, T).
    """

    def __init__(self, model: nn.Module, states: Tensor, ids: Tensor):
        head = head_of(model)
        assert head is not None
        self._weight, self._bias, self._rows = head.weight, head.bias, states[:, :-1].flatten(0, 1)
        self._wanted = _logit(self._rows, self._weight, self._bias, ids[:, 1:].flatten())
        self._norms = torch.full_like(self._wanted, -torch.inf)

    def read(self, tokens: Tensor) -> None:
        """Take `tokens` (N,) of the vocabulary into the sum. Each may be added only once."""
        for some in tokens.split(_size(self._weight, 0)):
            logits = F.linear(self._rows, self._weight[some], None if self._bias is None else self._bias[some])
            self._norms = torch.logaddexp(self._norms, logits.float().logsumexp(-1))

    @property
    def nats(self) -> float:
        """The bound so far, in nats a predicted token."""
        return (self._norms - self._wanted).double().mean().item()


def likeliest(model: nn.Module, states: Tensor) -> Tensor:
    """All V tokens of the vocabulary, (V,), those first whose exp(logit) is largest, summed over all positions.

    Args:
        states: what the model's head is given, (B, T, D).
    """
    head = head_of(model)
    assert head is not None
    sums = [part.logsumexp(0) for part in _logits(states.flatten(0, 1), head.weight, head.bias)]
    return torch.cat(sums).argsort(descending=True)


def _before_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, nn.Linear]:
    """What the withheld head is given for `ids` (B, T) at every position but each block's last, (B * (T - 1), D); and
    the head."""
    head = head_of(model)
    assert head is not None
    return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), head


class _Streamed(torch.autograd.Function):
    """The mean loss of targets (N,), in nats, from states (N, D) before a frozen head, whose gradient goes to the
    states.

    Computed as in flash attention (arXiv:2205.14135), with the vocabulary in place of the keys. Slice by slice of the
    logits, two sums are kept, relative to the largest logit so far: of their exponentials, and of the head's rows
    weighted by them.
    """

    @staticmethod
    def forward(ctx: Any, states, weight, bias, targets):  # type: ignore[override]
        nats, slopes = [], []
        for rows, wanted in zip(states.split(READ), targets.split(READ), strict=True):
            top = rows.new_full((len(rows), 1), -torch.inf, dtype=torch.float32)
            total, mean = torch.zeros_like(top), torch.zeros_like(rows, dtype=torch.float32)
            for part, weights in zip(_logits(rows, weight, bias), weight.split(_size(weight, 0)), strict=True):
                before, top = top, torch.maximum(top, part.amax(-1, keepdim=True))
                shrunk = (before - top).exp_()
                part.sub_(top).exp_()
                total.mul_(shrunk).add_(part.sum(-1, keepdim=True))
                mean.mul_(shrunk).add_(part.to(rows.dtype) @ weights)
            nats.append((top + total.log()).squeeze(1) - _logit(rows, weight, bias, wanted))
            slopes.append(mean.div_(total).sub_(weight[wanted]).div_(len(targets)).to(rows.dtype))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(nats).double().mean().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        return ctx.saved_tensors[0] * upstream, None, None, None


class _Taught(torch.autograd.Function):
    """The two losses of `taught`, slice by slice.

    Takes states (N, D), the head's weight (V, D) and bias (V,) or None, targets (N,), the teacher's share, and `says`:
    None, or a function that gives the teacher's log-probabilities at a slice of rows.
    """

    @staticmethod
    def forward(ctx: Any, states, weight, bias, targets, share, says):  # type: ignore[override]
        ctx.grads, n = _room_for_gradients(ctx, states, weight, bias), len(targets)
        lm = kl = torch.zeros((), dtype=torch.float64)
        room = states.new_empty(min(ROWS, n), len(weight), dtype=torch.float32)
        for start in range(0, n, ROWS):
            rows = slice(start, start + ROWS)
            wanted, teacher = targets[rows, None], says(rows) if says else None
            logits = room[: len(wanted)]
            norms = [part.logsumexp(-1) for part in _logits(states[rows], weight, bias, logits)]
            norm = torch.stack(norms).logsumexp(0).unsqueeze(1)
            lm = lm + (norm - logits.gather(1, wanted)).double().sum()
            begin = 0
            for part in logits.split(SLICE, dim=-1):  # becomes the loss's slope: probabilities, less 1 at the target
                here, index = slice(begin, begin + part.shape[1]), wanted - begin
                begin = here.stop
                part.sub_(norm)
                log_p = teacher[:, here] if teacher is not None else None
                if log_p is not None:
                    kl = kl + F.kl_div(part, log_p, reduction="none", log_target=True).sum(-1).double().sum()
                if any(ctx.needs_input_grad[:3]):
                    part.exp_()
                    if log_p is not None:
                        part.sub_(log_p.exp_(), alpha=share)
                    less = ((index >= 0) & (index < part.shape[1])) * (share - 1.0 if says else -1.0)
                    part.scatter_add_(1, index.clamp(0, part.shape[1] - 1), less.float())
                    _add_gradients(ctx.grads, rows, here, part.to(states.dtype), states, weight, n)
        return _losses(ctx, states, lm, kl, share if says else 0.0, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, upstream: Tensor):  # type: ignore[override]
        return (*_gradients(ctx, upstream), None, None, None)


class _Whole(torch.autograd.Function):
    """As `_Taught`, for devices on which logits are best taken whole; `slopes`, or its compiled form, comes last."""

    @staticmethod
    def forward(ctx: Any, states, weight, bias, targets, share, says, slopes):  # type: ignore[override]
        ctx.grads, n = _room_for_gradients(ctx, states, weight, bias), len(targets)
        lm = kl = torch.zeros((), dtype=torch.float64, device=states.device)
        at_once = _rows(states, weight, n)
        for start in range(0, n, at_once):
            rows = slice(start, start + at_once)
            logits, teacher = F.linear(states[rows], weight, bias), says(rows) if says else None
            nats, apart, slope = slopes(logits, targets[rows], teacher, share)
            lm, kl = lm + nats.double().sum(), kl + apart.double().sum()
            if any(ctx.needs_input_grad[:3]):
                _add_gradients(ctx.grads, rows, slice(None), slope, states, weight, n)
        return _losses(ctx, states, lm, kl, share if says else 0.0, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, upstream: Tensor):  # type: ignore[override]
        return (*_gradients(ctx, upstream), None, None, None, None)


def slopes(logits: Tensor, wanted: Tensor, teacher: Tensor | None, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The losses at N positions, and the gradient of their sum.

    Args:
        logits: (N, V).
        wanted: the tokens that follow, (N,).
        teacher: its log-probabilities (N, V), or None.
        share: of the teacher, 0 to 1.

    Returns:
        The loss of each wanted token in nats, (N,); KL(teacher, model), (N,), 0 without a teacher; and the gradient of
        (1 - share) * loss + share * KL by the logits, (N, V), in their number format.
    """
    logs, wanted = logits.log_softmax(-1, dtype=torch.float32), wanted[:, None]
    nats = -logs.gather(1, wanted)
    if teacher is None:
        slope, at = torch.exp(logs, out=torch.empty_like(logs, dtype=logits.dtype)), torch.expm1(-nats)
        apart = torch.zeros_like(nats)
    else:
        apart = F.kl_div(logs, teacher, reduction="none", log_target=True).sum(-1)
        slope = logs.exp_().sub_(teacher.exp(), alpha=share)
        at = slope.gather(1, wanted) - (1 - share)
        slope = slope.to(logits.dtype)
    return nats.squeeze(1), apart, slope.scatter_(1, wanted, at.to(logits.dtype))


def _room_for_gradients(ctx: Any, *inputs: Tensor | None) -> list[Tensor | None]:
    """A tensor for the gradient of each of states, weight and bias that needs one, else None. That of the states is in
    float32, since slices are added up in it; that of the weight is empty, since it is written before it is read."""
    make = (lambda x: torch.zeros_like(x, dtype=torch.float32), torch.empty_like, torch.zeros_like)
    wants = zip(make, inputs, ctx.needs_input_grad, strict=False)
    return [fresh(x) if x is not None and wanted else None for fresh, x, wanted in wants]


def _add_gradients(
    grads: list[Tensor | None], rows: slice, here: slice, slope: Tensor, states: Tensor, weight: Tensor, n: int
) -> None:
    """Add to the gradients `grads` of states, weight and bias, as far as they are needed, what a part of the logits
    contributes.

    Args:
        rows: the part's rows.
        here: its slice of the vocabulary.
        slope: the gradient by these logits, of a sum over rows.
        n: how many rows the loss is the mean of.
    """
    if grads[0] is not None:
        grads[0][rows].add_(slope @ weight[here], alpha=1 / n)
    if grads[1] is not None:
        grads[1][here].addmm_(slope.T, states[rows], alpha=1 / n, beta=0 if rows.start == 0 else 1)
    if grads[2] is not None:
        grads[2][here].add_(slope.sum(0), alpha=1 / n)


def _losses(ctx: Any, states: Tensor, lm: Tensor, kl: Tensor, share: float, n: int) -> tuple[Tensor, Tensor]:
    """What `_Taught` and `_Whole` return, from the sums `lm` and `kl` over n rows: the mean loss, and the loss to
    minimise."""
    if ctx.grads[0] is not None:
        ctx.grads[0] = ctx.grads[0].to(states.dtype)
    lm, kl = lm.float() / n, kl.float() / n
    loss = (1 - share) * lm + share * kl if share else lm.clone()
    ctx.mark_non_differentiable(lm)
    return lm, loss


def _gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients that the forward pass has left, times `upstream`. They are handed out once and let go of, so that
    torch can add to that of a tied embedding in place."""
    grads, ctx.grads = ctx.grads, None
    same = not upstream.is_cuda and upstream.item() == 1.0  # asking a GPU would mean to wait for it
    return [g if g is None or same else g * upstream.to(g.dtype) for g in grads]


class DenseLogits:
    """The dense model's probabilities at N positions, with which models without some layers are compared.

    Args:
        states: (N, D), what the head was given; None where `head_of` is None.
        logits: (N, V), what the model made of them.

    Attributes:
        plain: whether the logits are the head's projection and nothing else, so that slices of it will do.
        dense: `states` if `plain`, else `logits`: for `compare` of the dense model with itself.
    """

    def __init__(self, model: nn.Module, states: Tensor | None, logits: Tensor):
        self._head = head_of(model)
        with torch.inference_mode():
            self.plain = states is not None and self._head is not None and _projects(self._head, states, logits)
            self.dense = states if self.plain and states is not None else logits
            logs = torch.log_softmax(logits.float(), dim=-1)
            p = logs.exp()
            self._p_log_p = torch.stack([(a * b).sum(-1) for a, b in zip(_sliced(p), _sliced(logs), strict=True)]).sum(
                0
            )
            self._p = [part.contiguous() for part in _sliced(p)]

    def compare(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For another model with the same head, at each of the N positions: the loss of the target, (N,), and
        KL(dense, model), (N,), both in nats.

        Args:
            states: what its head is given (N, D) if `plain`, else its logits (N, V).
            targets: the tokens that follow, (N,).
        """
        with torch.inference_mode():
            norms, expected = [], torch.zeros(len(targets), device=states.device)
            room = torch.empty_like(self._p[0])
            for part, p in zip(self._parts(states), self._p, strict=True):
                norms.append(torch.logsumexp(part, dim=-1))
                # adds in a tree: a dot product would lose the long tail
                expected += torch.mul(p, part, out=room[:, : p.shape[1]]).sum(-1)
            norm = torch.stack(norms).logsumexp(0)
            return (norm - self._at(states, targets)).double(), (self._p_log_p - expected + norm).double()

    def _parts(self, states: Tensor) -> Iterator[Tensor]:
        """The logits in float32, slice by slice of the vocabulary: (N, up to SLICE) each."""
        if not self.plain or self._head is None:
            yield from (part.float() for part in _sliced(states))
        else:
            yield from _logits(states, self._head.weight, self._head.bias)

    def _at(self, states: Tensor, targets: Tensor) -> Tensor:
        """The logit of each of the `targets`, (N,)."""
        if not self.plain or self._head is None:
            return states.gather(1, targets[:, None]).squeeze(1).float()
        return _logit(states, self._head.weight, self._head.bias, targets)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor | None = None) -> Iterator[Tensor]:
    """The logits of states (N, D) in float32, slice by slice of the vocabulary: (N, up to SLICE) each.

    Args:
        room: (N, V) in float32, where all are left. None writes each slice over the one before, which is still in the
            cache: then a slice has to be used before the next is asked for.
    """
    size = _size(weight, 0)
    parts = zip(weight.split(size), bias.split(size) if bias is not None else itertools.repeat(None), strict=False)
    near = states.new_empty(len(states), size)
    for number, (weights, biases) in enumerate(parts):
        whole = room[:, number * size : number * size + len(weights)] if room is not None else None
        out = whole if whole is not None and whole.dtype == states.dtype else near[:, : len(weights)]
        part = torch.mm(states, weights.T, out=out)
        part = (part.add_(biases) if biases is not None else part).float()
        yield part if whole is None or whole is out else whole.copy_(part)


def takes_whole(table: Tensor) -> bool:
    """Whether logits are best taken whole where `table` is: on all but a CPU, where slices stay in the cache."""
    return table.device.type != "cpu"


def _rows(states: Tensor, weight: Tensor, near: int) -> int:
    """How many of states (N, D) go through the weight (V, D) at once: `near` on a CPU; elsewhere so many that their
    logits take at most `ROOM` bytes, in parts of equal size."""
    if not takes_whole(states):
        return near
    parts = math.ceil(len(states) * 4 * len(weight) / ROOM)
    return math.ceil(len(states) / max(parts, 1)) or 1


def _log_probabilities(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Log-probabilities (N, V) in float32 from states (N, D): two kernels, whatever the logits' number format."""
    return F.linear(states, weight, bias).log_softmax(-1, dtype=torch.float32)


def _logit(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The logit of each of the `targets` (N,) from states (N, D), (N,) in float32."""
    logit = (states * weight[targets]).sum(-1).float()
    return logit if bias is None else logit + bias[targets].float()


def _projects(head: nn.Linear, states: Tensor, logits: Tensor) -> bool:
    """Whether `logits` (N, V) are the head's projection of `states` (N, D), as far as the first 8 rows tell."""
    rows = min(8, len(states))
    return torch.allclose(F.linear(states[:rows], head.weight, head.bias).float(), logits[:rows].float(), 1e-4, 1e-4)


def _sliced(table: Tensor) -> tuple[Tensor, ...]:
    """`table` (N, V) in slices of the vocabulary."""
    return table.split(_size(table, -1), dim=-1)


def _size(table: Tensor, dim: int) -> int:
    """How many tokens of the vocabulary (dimension `dim` of `table`) are in a slice: `SLICE` on a CPU, else all."""
    return table.shape[dim] if takes_whole(table) else SLICE
