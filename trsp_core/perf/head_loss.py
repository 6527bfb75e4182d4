"""The loss of a text and its divergence from a reference, without ever holding all its logits.

The last projection is taken in slices of the vocabulary: a slice is small enough to be read again while it is near.
Where a model does more than project (scale or cap its logits), its own logits are used whole.
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
ROWS = 256  # rows of logits (a row a predicted token) that are held at once while a gradient is taken, on a CPU
READ = 512  # and where a slice of them at a time will do
ROOM = 2**29  # bytes of logits that are held at once elsewhere
_plain_heads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_of(model: nn.Module) -> nn.Linear | None:
    """The model's last projection, where it is a plain one."""
    outer: Any = model
    head = outer.get_output_embeddings()
    return head if type(head) is nn.Linear else None


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what the head is given, (B, T, D); empty where there is no plain head."""
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
    """The head hands on what it is given inside, (B, T, D), which a list gets as well."""
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
    """Whether the model's logits are its head's projection and nothing else, by a pass over `ids` (B, T); asked once
    of each model."""
    head = head_of(model)
    if head is None or "forward" in vars(head):  # somebody moves its weights about
        return False
    if model not in _plain_heads:
        with torch.no_grad(), listening(model) as head_inputs:
            logits = model(input_ids=ids, use_cache=False).logits
            _plain_heads[model] = _projects(head, head_inputs[0].flatten(0, -2), logits.flatten(0, -2))
    return _plain_heads[model]


Slopes = Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor, Tensor]]


def taught(
    model: nn.Module, ids: Tensor, teacher: nn.Module | None = None, share: float = 0.0, how: Slopes | None = None
) -> list[Tensor]:
    """Mean nats per predicted token of `ids` (B, T), which has no gradient, and (1 - share) of that +
    share KL(teacher, model), whose gradient is worked out on the way: no more than ROWS rows of logits are ever held.

    For models whose logits are a plain projection (`projects`), and whose heads are `withheld`. Elsewhere, and in
    tests, what this stands for is `lab.next_token_loss(model(ids).logits, ids).mean()`, equal within rounding.

    Args:
        how: `slopes`, as it is or compiled; used where logits are taken whole.
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
    """Nats of each predicted token (B, T - 1) of `ids` (B, T), by a model whose head is `withheld`, without gradients:
    `lab.next_token_loss` with a slice of logits at a time."""
    return nats_given(model, model(input_ids=ids, use_cache=False).logits, ids)


def nats_given(model: nn.Module, states: Tensor, ids: Tensor) -> Tensor:
    """`nats` from what the head is given (B, T, D)."""
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
    """The mean nats of `ids` (B, T) from below, given what the head is (B, T, D): over some tokens of the vocabulary
    alone it is too low, since fewer exponentials are summed, and rises as `read` adds more. Over all it is the loss."""

    def __init__(self, model: nn.Module, states: Tensor, ids: Tensor):
        head = head_of(model)
        assert head is not None
        self._weight, self._bias, self._rows = head.weight, head.bias, states[:, :-1].flatten(0, 1)
        self._wanted = _logit(self._rows, self._weight, self._bias, ids[:, 1:].flatten())
        self._norms = torch.full_like(self._wanted, -torch.inf)

    def read(self, tokens: Tensor) -> None:
        """Add `tokens` (N,) of the vocabulary, each of them once."""
        for some in tokens.split(_size(self._weight, 0)):
            logits = F.linear(self._rows, self._weight[some], None if self._bias is None else self._bias[some])
            self._norms = torch.logaddexp(self._norms, logits.float().logsumexp(-1))

    @property
    def nats(self) -> float:
        return (self._norms - self._wanted).double().mean().item()


def likeliest(model: nn.Module, states: Tensor) -> Tensor:
    """All V tokens of the vocabulary, those first that get the most of exp(logit) in sum, given what the head is
    (B, T, D)."""
    head = head_of(model)
    assert head is not None
    sums = [part.logsumexp(0) for part in _logits(states.flatten(0, 1), head.weight, head.bias)]
    return torch.cat(sums).argsort(descending=True)


def _before_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, nn.Linear]:
    """What the withheld head is given at all positions but each block's last, (B * (T - 1), D), and the head."""
    head = head_of(model)
    assert head is not None
    return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), head


class _Streamed(torch.autograd.Function):
    """Mean nats of targets (N,) given states (N, D) before a frozen head. The way of flash attention
    (arXiv:2205.14135), with the vocabulary for keys: what is read of a slice of logits, the sum of their exponentials
    and the mean row of weights under them, is kept relative to the largest so far."""

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
    """The losses of `taught` from states (N, D), the head's weight (V, D) and bias (V,) or None, targets (N,), and
    what the teacher says at some rows: its log-probabilities."""

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
            for part in logits.split(SLICE, dim=-1):  # of the loss's slope by the logits: probabilities less the wanted
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
    """`_Taught` where logits are best taken whole, with `slopes` or what was compiled from it."""

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
    """Of logits (N, V): nats of the wanted tokens (N,), KL(teacher, model) (N,), and how fast (1 - share) of the one +
    share of the other rises with each logit (N, V), in their format. `teacher`: its log-probabilities (N, V)."""
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
    """For those of states, weight and bias that want one; in float32 for states, since slices add up in it. That of the
    weight is written before it is read."""
    make = (lambda x: torch.zeros_like(x, dtype=torch.float32), torch.empty_like, torch.zeros_like)
    wants = zip(make, inputs, ctx.needs_input_grad, strict=False)
    return [fresh(x) if x is not None and wanted else None for fresh, x, wanted in wants]


def _add_gradients(
    grads: list[Tensor | None], rows: slice, here: slice, slope: Tensor, states: Tensor, weight: Tensor, n: int
) -> None:
    """Those of states, weight and bias, where they are wanted, from the slope by some rows of logits of a slice of the
    vocabulary; the loss is the mean over n rows."""
    if grads[0] is not None:
        grads[0][rows].add_(slope @ weight[here], alpha=1 / n)
    if grads[1] is not None:
        grads[1][here].addmm_(slope.T, states[rows], alpha=1 / n, beta=0 if rows.start == 0 else 1)
    if grads[2] is not None:
        grads[2][here].add_(slope.sum(0), alpha=1 / n)


def _losses(ctx: Any, states: Tensor, lm: Tensor, kl: Tensor, share: float, n: int) -> tuple[Tensor, Tensor]:
    """What `_Taught` and `_Whole` return, from sums over n rows."""
    if ctx.grads[0] is not None:
        ctx.grads[0] = ctx.grads[0].to(states.dtype)
    lm, kl = lm.float() / n, kl.float() / n
    loss = (1 - share) * lm + share * kl if share else lm.clone()
    ctx.mark_non_differentiable(lm)
    return lm, loss


def _gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """Once, and let go of: what comes from a tied embedding is then added in place."""
    grads, ctx.grads = ctx.grads, None
    same = not upstream.is_cuda and upstream.item() == 1.0  # asking a GPU would mean to wait for it
    return [g if g is None or same else g * upstream.to(g.dtype) for g in grads]


class DenseLogits:
    """What a model says at N positions: the probabilities that others are compared with.

    Args:
        states: (N, D), what the head was given; None where the head is no plain projection.
        logits: (N, V), what the model made of them.

    Attributes:
        plain: the logits are the head's projection and nothing else, so that slices of it will do.
        dense: `states` where plain, else `logits`: what `compare` takes.
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
        """Nats of each of the `targets` (N,), and KL from the reference at each position (N,), of a model.

        Args:
            states: what its head is given (N, D) where `plain`, else its logits (N, V).
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
        """Logits (N, up to SLICE), slice by slice."""
        if not self.plain or self._head is None:
            yield from (part.float() for part in _sliced(states))
        else:
            yield from _logits(states, self._head.weight, self._head.bias)

    def _at(self, states: Tensor, targets: Tensor) -> Tensor:
        """Logits (N,) of `targets`."""
        if not self.plain or self._head is None:
            return states.gather(1, targets[:, None]).squeeze(1).float()
        return _logit(states, self._head.weight, self._head.bias, targets)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor | None = None) -> Iterator[Tensor]:
    """Logits (N, up to SLICE) of states (N, D) in float32, slice by slice. They are left in `room` (N, V); without it
    each is written over the one before, which is still near."""
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
    """Whether a device reads and writes so fast that logits are best taken whole; on a CPU slices stay near."""
    return table.device.type != "cpu"


def _rows(states: Tensor, weight: Tensor, near: int) -> int:
    """How many of states (N, D) are projected by the weight (V, D) at once: `near` on a CPU, elsewhere equal parts."""
    if not takes_whole(states):
        return near
    parts = math.ceil(len(states) * 4 * len(weight) / ROOM)
    return math.ceil(len(states) / max(parts, 1)) or 1


def _log_probabilities(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, V) in float32, from states (N, D): two kernels, however narrow the logits."""
    return F.linear(states, weight, bias).log_softmax(-1, dtype=torch.float32)


def _logit(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Logits (N,) of `targets` (N,) from states (N, D), in float32."""
    logit = (states * weight[targets]).sum(-1).float()
    return logit if bias is None else logit + bias[targets].float()


def _projects(head: nn.Linear, states: Tensor, logits: Tensor) -> bool:
    """Whether `logits` (N, V) are the plain projection of `states` (N, D), by some of the rows."""
    rows = min(8, len(states))
    return torch.allclose(F.linear(states[:rows], head.weight, head.bias).float(), logits[:rows].float(), 1e-4, 1e-4)


def _sliced(table: Tensor) -> tuple[Tensor, ...]:
    return table.split(_size(table, -1), dim=-1)


def _size(table: Tensor, dim: int) -> int:
    """Tokens of the vocabulary in a slice: on a CPU as many as stay near, elsewhere all."""
    return table.shape[dim] if takes_whole(table) else SLICE
