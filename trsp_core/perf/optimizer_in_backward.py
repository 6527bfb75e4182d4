"""An AdamW that steps each parameter within the backward pass, as soon as its gradient is whole. So a model's gradients
are never all held at once: training takes a quarter less memory, and gives the same numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class EagerAdamW:
    """AdamW without weight decay. While `stepping` is open, backward passes step the large parameters, and `step` the
    small ones.

    Args:
        groups: parameter groups, dicts with `params` and, where it is another than `lr`, `lr`.
        lr: the learning rate.
        together: treat all parameters as small ones.

    Attributes:
        param_groups: the groups. Their `lr` may be changed between steps; `pace` makes it hold.
    """

    SMALL = 2**16  # numbers of a parameter, up to which it is stepped together with others, which is faster
    MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter

    def __init__(self, groups: list[dict[str, Any]], lr: float, together: bool = False):
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self._small = math.inf if together else self.SMALL
        self._own: dict[Tensor, torch.optim.Optimizer] = {}
        self._rates: list[tuple[torch.optim.Optimizer, dict[str, Any]]] = []
        self._together: list[torch.optim.Optimizer] = []
        self._held = False

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, a backward pass steps the large parameters that it reaches, and drops their gradients. The moments
        begin at 0."""
        hooks = []
        for group in self.param_groups:
            rate = self._rate(group)
            large = [p for p in group["params"] if p.numel() > self._small]
            small = [p for p in group["params"] if p.numel() <= self._small]
            for parameters in [*([p] for p in large), *([small] if small else [])]:
                on_gpu = isinstance(rate, Tensor)
                own = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True, capturable=on_gpu)
                self._rates.append((own, group))
                for parameter in parameters:
                    own.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                    self._own[parameter] = own
                if parameters is small:
                    self._together.append(own)
                else:
                    hooks.append(parameters[0].register_post_accumulate_grad_hook(self._stepper(own)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, backward passes step nothing: their gradients are kept, and join those of the next pass outside."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def pace(self) -> None:
        """Let the `lr` of each group in `param_groups` hold from now on."""
        rates = set()
        for own, group in self._rates:
            rate = own.param_groups[0]["lr"]
            if not isinstance(rate, Tensor):
                own.param_groups[0]["lr"] = group["lr"]
            elif id(rate) not in rates:
                rates.add(id(rate))
                rate.fill_(group["lr"])

    def step(self) -> None:
        """Step the small parameters; the backward pass has stepped the others."""
        for own in self._together:
            own.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that are left: those of small parameters, and those of `held` passes alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What AdamW remembers of `parameter`, by the names in `MOMENTS`; {} where it does not learn."""
        return dict(self._own[parameter].state[parameter]) if parameter in self._own else {}

    def restore(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Set what AdamW remembers of `parameter` to what `moments` once gave; only while `stepping` is open. Nothing
        happens for a parameter that does not learn."""
        for kind, value in moments.items():
            if parameter in self._own:
                self._own[parameter].state[parameter][kind].copy_(value)

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        """The learning rate of `group` as AdamW gets it. On a GPU it is a tensor that changes in place, since recorded
        steps (`cuda_graphs`) read it."""
        device = group["params"][0].device
        return torch.tensor(group["lr"], device=device) if device.type == "cuda" else group["lr"]

    def _stepper(self, own: torch.optim.Optimizer) -> Any:
        def step(parameter: Tensor) -> None:
            if not self._held:
                own.step()
                parameter.grad = None

        return step
