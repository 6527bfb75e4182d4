"""Writes and reads the files from which an interrupted run resumes, so that it loses minutes and not hours.

Stage 2 writes the weights and AdamW's moments now and then, after a step. Stage 1 writes the layer weights and their
moments after each round. Each stage has one safetensors file, replaced whole or not at all. A file is never ahead of
the events on the disk, also after a power cut. A repair writes a file for each solution, which are no more than a
memory of what would be computed again: they may be ahead of the events, or missing. Each file holds a checksum of its
content, since one wrong bit in a weight would lead to another model without anything else noticing.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trsp_core.errors import TrspError, disk_full
from trsp_core.files import sync
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_folder import RunFolder
from trsp_core.surgery import quantization
from trsp_core.surgery.stack import Stack
from trsp_core.training.progress import ROUND, STEP, Past

Solve = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor], Any], Tensor]
PATIENCE = 20.0  # after a write at least this many times its duration passes, so writing takes at most 1 / 20
CHECKSUM, SOLUTION = "sha256", "solution"  # entries of the metadata
NO_ROOM = "There is not enough room on the disk for a point to resume from, so an interrupted stage 2 would start over."


class Waypoints:
    """Writes and reads the file of stage 2.

    Args:
        run: the run folder; with None nothing is written.
        config: at least `config.resume_minutes` lie between two writes; 0 writes nothing.
    """

    def __init__(self, run: RunFolder | None, config: RunConfig):
        self._run = run if config.resume_minutes else None
        # Then only the adapters differ from the model as it is loaded.
        self._adapters_alone = bool(config.adapter_rank) and config.cycles == 1 and not config.learn_weights
        self._wait = config.resume_minutes * 60
        self._next = time.monotonic() + self._wait

    def due(self) -> bool:
        """Whether it is time to write."""
        return self._run is not None and time.monotonic() >= self._next

    def keep(self, step: int, stack: Stack, optimizer: EagerAdamW) -> str:
        """Write the file after `step`. Returns "", or a sentence where there is no room on the disk; then nothing more
        is written in this run."""
        assert self._run
        tensors = {f"weight/{name}": p.detach().contiguous() for name, p in self._weights(stack).items()}
        for name, parameter in stack.model.named_parameters():
            for kind, value in optimizer.moments(parameter).items():
                tensors[f"{kind}/{name}"] = value.contiguous()
        began = time.monotonic()
        try:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            if shutil.disk_usage(self._run.folder).free < 2 * size:
                self._next = float("inf")
                return NO_ROOM
            _replace(self._run, self._run.checkpoint_file, tensors, {STEP: str(step)})
        except Exception as error:
            if not (isinstance(error, OSError) or disk_full(error)):
                raise
            self._next = float("inf")
            return NO_ROOM
        now = time.monotonic()
        self._next = now + max(self._wait, PATIENCE * (now - began))
        return ""

    def restore(self, file: Path, stack: Stack, optimizer: EagerAdamW) -> None:
        """Put the weights and moments in `file` into the model and the optimizer, in place.

        Raises:
            TrspError: the file does not belong to this model, or is damaged. It has been deleted then.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as file_tensors, torch.no_grad():
                names = set(file_tensors.keys())
                _compare(file_tensors.metadata() or {}, names, file_tensors.get_tensor)
                for name, parameter in self._weights(stack).items():
                    parameter.copy_(file_tensors.get_tensor(f"weight/{name}"))
                for name, parameter in stack.model.named_parameters():
                    kinds = [k for k in EagerAdamW.MOMENTS if f"{k}/{name}" in names]
                    optimizer.restore(parameter, {k: file_tensors.get_tensor(f"{k}/{name}") for k in kinds})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise _useless(file, "stage 2") from error

    def _weights(self, stack: Stack) -> dict[str, Any]:
        alone = self._adapters_alone or quantization.is_packed(stack.model)
        return {n: p for n, p in stack.model.named_parameters() if not alone or "lora_" in n}


class Rounds:
    """Writes and reads the file of stage 1: the L layer weights with their moments, and P. It would be too small for
    the model's weights, so with `learn_weights` nothing is written.

    Args:
        run: the run folder; with None nothing is written.
        config: with `config.resume_minutes` 0 nothing is written.
        past: of a run that broke off, whose file is to be read.
    """

    def __init__(self, run: RunFolder | None = None, config: RunConfig | None = None, past: Past | None = None):
        self._run = run if config and config.resume_minutes and not config.learn_weights else None
        self._past = past or Past()

    def begin(self, s: Tensor, optimizer: torch.optim.Optimizer) -> tuple[int, list[int]]:
        """Begin a choice of layers. Returns how many of its rounds are over, and the layers P that these chose.

        For the first choice after a run that broke off in it, they come from the file, and the layer weights `s` (L,)
        and their moments in `optimizer` are set as they were. For any other choice they are 0 and [].

        Raises:
            TrspError: the file does not belong to this model, or is damaged. It has been deleted then.
        """
        from safetensors import SafetensorError, safe_open

        past, self._past = self._past, Past()
        if not past.rounds:
            return 0, []
        try:
            with safe_open(past.rounds, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
                _compare(opened.metadata() or {}, tensors, tensors.__getitem__)
            with torch.no_grad():
                s.copy_(tensors.pop("s"))
            chosen = tensors.pop("P").tolist()
            optimizer.state[s] = {k: v if k == "step" else v.to(s.device) for k, v in tensors.items()}
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise _useless(past.rounds, "the choice of layers") from error
        return past.round, chosen

    def keep(self, round_: int, s: Tensor, optimizer: torch.optim.Optimizer, chosen: list[int]) -> None:
        """Write the file after `round_`, once all events of that round are told. On a full disk it is left out, then
        and later."""
        if self._run is None or not self._run.folder.is_dir():  # it was deleted, or nothing is kept in it
            return
        tensors = {k: v.detach().cpu().contiguous() for k, v in optimizer.state[s].items()}
        tensors |= {"s": s.detach().cpu(), "P": torch.tensor(chosen, dtype=torch.int64)}
        try:
            _replace(self._run, self._run.rounds_file, tensors, {ROUND: str(round_)})
        except Exception as error:
            if not (isinstance(error, OSError) or disk_full(error)):
                raise
            self._run = None  # the run itself will say so, when it has something to write


class Solutions:
    """Keeps what a repair solves for, a file for each solution, in the order in which it solves. A run that broke off
    has the same solutions from these files, to the bit, without solving again.

    Writing takes at most 1 / `PATIENCE` of the time; solutions wait in memory meanwhile.

    Args:
        run: the run folder; with None nothing is written.
        config: with `config.resume_minutes` 0 nothing is written.
    """

    def __init__(self, run: RunFolder | None = None, config: RunConfig | None = None):
        self._run = run if config and config.resume_minutes else None
        self._count = 0
        self._waiting: dict[int, Tensor] = {}
        self._next = 0.0

    def remembered(self, solve: Solve) -> Solve:
        """`solve`, but the solutions that an earlier process has left come from their files.

        Args:
            solve: called as `solve(module, inputs, errors, weights)` with batches of inputs (B, T, F) and of errors
                (B, T, D), it returns a solution (F, D).
        """

        def solved(module: nn.Module, inputs: Sequence[Tensor], errors: Sequence[Tensor], weights: Any) -> Tensor:
            number = self._count
            self._count += 1
            shape = inputs[0].shape[-1], errors[0].shape[-1]
            solution = self._read(self._run.solution_file(number), shape) if self._run else None
            if solution is not None:
                return solution.to(inputs[0].device)
            solution = solve(module, inputs, errors, weights)
            self._keep(number, solution)
            return solution

        return solved

    @staticmethod
    def _read(file: Path, shape: tuple[int, ...]) -> Tensor | None:
        """The solution in `file`; None where there is none, or a damaged one or one of another model, which is
        deleted."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                _compare(opened.metadata() or {}, opened.keys(), opened.get_tensor)
                solution = opened.get_tensor("solution")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, RuntimeError):
            solution = None
        if solution is None or tuple(solution.shape) != shape:
            file.unlink(missing_ok=True)
            return None
        return solution

    def _keep(self, number: int, solution: Tensor) -> None:
        """Write all solutions that wait, if it is time. On a full disk they are left out, then and later."""
        if self._run is None or not self._run.folder.is_dir():  # it was deleted, or nothing is kept in it
            return
        self._waiting[number] = solution.detach().cpu().contiguous()
        began = time.monotonic()
        if began < self._next:
            return
        try:
            for n, value in self._waiting.items():
                _replace(self._run, self._run.solution_file(n), {"solution": value}, {SOLUTION: str(n)})
        except Exception as error:
            if not (isinstance(error, OSError) or disk_full(error)):
                raise
            self._run = None
        self._waiting.clear()
        now = time.monotonic()
        self._next = now + PATIENCE * (now - began)


def without_damage(past: Past) -> str:
    """Check the files that a run would resume from, and delete one that is damaged. Returns a sentence on what that
    means; "" where both are as they were written."""
    from safetensors import SafetensorError, safe_open

    for file, stage in ((past.checkpoint, "stage 2"), (past.rounds, "the choice of layers")):
        if file:
            try:
                with safe_open(file, "pt") as opened:
                    _compare(opened.metadata() or {}, opened.keys(), opened.get_tensor)
            except (OSError, SafetensorError, RuntimeError):
                file.unlink(missing_ok=True)
                return f"{file.name} in the run folder was damaged, and is deleted: {stage} starts over."
    return ""


def _replace(run: RunFolder, file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Replace `file`, whole or not at all, after everything that the run has told is on the disk.

    Args:
        about: entries of the file's metadata; a checksum is added to them.

    Raises:
        OSError, or safetensors' own error: there is no room.
    """
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, temporary, {**about, CHECKSUM: _checksum(about, tensors, tensors.__getitem__)})
        sync(temporary)
        if run.events_file.exists():  # nobody records a run that a program drives by itself
            sync(run.events_file)
        temporary.replace(file)
        sync(run.folder)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(about: Mapping[str, str], names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """SHA-256, in hex, of the metadata and of every tensor: its name, number format, shape and numbers."""
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(names):
        value = tensor(name)
        digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compare(metadata: Mapping[str, str], names: Iterable[str], tensor: Callable[[str], Tensor]) -> None:
    """Raise RuntimeError if the checksum in `metadata` is not that of the tensors `names`, which `tensor` gives."""
    about = {name: value for name, value in metadata.items() if name != CHECKSUM}
    if metadata.get(CHECKSUM) != _checksum(about, names, tensor):
        raise RuntimeError("its checksum is another")


def _useless(file: Path, stage: str) -> TrspError:
    """Delete `file`, so that the next resume does without it, and return the TrspError that says so."""
    file.unlink(missing_ok=True)
    return TrspError(
        f"{file.name} in the run folder did not fit this model, or was damaged. It is deleted.",
        f"Resume: {stage} then starts over.",
    )
