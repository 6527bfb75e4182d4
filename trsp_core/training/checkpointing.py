"""What a run leaves in its folder to go on from when it is interrupted, so that it loses minutes and not hours.

Stage 2 leaves the weights and AdamW's moments after a step, now and then; stage 1 the layer weights with theirs, after
each round. Each is one safetensors file, which replaces the one before it, whole or not at all, and is never ahead of
what the run has told, whatever becomes of the power. Each holds a checksum of all that is in it: one wrong bit in a
weight would end in another model, and nothing else would notice.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trsp_core.errors import TrspError, disk_full
from trsp_core.files import sync
from trsp_core.perf.optimizer_in_backward import EagerAdamW
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_folder import RunFolder
from trsp_core.surgery import quantization
from trsp_core.surgery.stack import Stack
from trsp_core.training.progress import ROUND, STEP, Past

PATIENCE = 20.0  # writing takes at most this part of the time: 1 / 20
CHECKSUM = "sha256"  # entry of the metadata
NO_ROOM = "There is not enough room on the disk for a point to resume from, so an interrupted stage 2 would start over."


class Waypoints:
    """The file of one run that stage 2 leaves.

    Args:
        run: None keeps nothing.
        config: `config.resume_minutes` lie between two writes, at least.
    """

    def __init__(self, run: RunFolder | None, config: RunConfig):
        self._run = run if config.resume_minutes else None
        # What is frozen need not be kept, and packed weights never change.
        self._adapters_alone = bool(config.adapter_rank) and config.cycles == 1 and not config.learn_weights
        self._wait = config.resume_minutes * 60
        self._next = time.monotonic() + self._wait

    def due(self) -> bool:
        return self._run is not None and time.monotonic() >= self._next

    def keep(self, step: int, stack: Stack, optimizer: EagerAdamW) -> str:
        """Write what is known after `step`; why not, where there is no room for it: a sentence."""
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
        """Put what `file` holds into the model and the optimizer.

        Raises:
            TrspError: it does not belong to this model, or is damaged. It is gone then.
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
    """The file of one run that stage 1 leaves: L numbers with their moments, and P. What learns beside them is too much
    for it, so with `learn_weights` there is none.

    Args:
        run: None keeps nothing.
        past: of a run that broke off.
    """

    def __init__(self, run: RunFolder | None = None, config: RunConfig | None = None, past: Past | None = None):
        self._run = run if config and config.resume_minutes and not config.learn_weights else None
        self._past = past or Past()

    def begin(self, s: Tensor, optimizer: torch.optim.Optimizer) -> tuple[int, list[int]]:
        """The rounds of this choice that are over, and the layers P that they chose: those of a run that broke off, for
        the first choice that asks, with `s` (L,) and its moments put back; else none.

        Raises:
            TrspError: the file does not belong to this model, or is damaged. It is gone then.
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
        """Write what is known after `round_`, when all of it has been told; on a full disk nothing is kept."""
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


def without_damage(past: Past) -> str:
    """Delete what a run would resume from where that is not what was written; what becomes of it then, a sentence.
    Nothing where all is well."""
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
    """Write `file`, whole or not at all, once all that was told is on the disk. Raises OSError or, of the same meaning,
    safetensors' own error: there is no room."""
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
    """SHA-256 of the metadata and of every tensor: its name, its kind, its numbers."""
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(names):
        value = tensor(name)
        digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compare(metadata: Mapping[str, str], names: Iterable[str], tensor: Callable[[str], Tensor]) -> None:
    """Raises RuntimeError: what is in the file is not what was written."""
    about = {name: value for name, value in metadata.items() if name != CHECKSUM}
    if metadata.get(CHECKSUM) != _checksum(about, names, tensor):
        raise RuntimeError("its checksum is another")


def _useless(file: Path, stage: str) -> TrspError:
    """The refusal of `file`, which is deleted: so a resume does without it."""
    file.unlink(missing_ok=True)
    return TrspError(
        f"{file.name} in the run folder did not fit this model, or was damaged. It is deleted.",
        f"Resume: {stage} then starts over.",
    )
