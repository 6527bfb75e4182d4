"""What stage 2 leaves in the run folder now and then, so that an interrupted run loses minutes and not hours: weights
and AdamW's moments after a step, in one safetensors file. It replaces the one before it, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from trsp_core import quantized
from trsp_core.adam import EagerAdamW
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError, disk_full
from trsp_core.resume import STEP
from trsp_core.surgery import Stack

PATIENCE = 20.0  # writing takes at most this part of the time: 1 / 20
NO_ROOM = "There is not enough room on the disk for a point to resume from, so an interrupted stage 2 would start over."


class Waypoints:
    """The file of one run.

    Args:
        file: None keeps nothing.
        config: `config.resume_minutes` lie between two writes, at least.
    """

    def __init__(self, file: Path | None, config: RunConfig):
        self._file = file if config.resume_minutes else None
        # What is frozen need not be kept, and packed weights never change.
        self._adapters_alone = bool(config.adapter_rank) and config.cycles == 1 and not config.learn_weights
        self._wait = config.resume_minutes * 60
        self._next = time.monotonic() + self._wait

    def due(self) -> bool:
        return self._file is not None and time.monotonic() >= self._next

    def keep(self, step: int, stack: Stack, optimizer: EagerAdamW) -> str:
        """Write what is known after `step`; why not, where there is no room for it: a sentence."""
        from safetensors.torch import save_file

        assert self._file
        tensors = {f"weight/{name}": p.detach().contiguous() for name, p in self._weights(stack).items()}
        for name, parameter in stack.model.named_parameters():
            for kind, value in optimizer.moments(parameter).items():
                tensors[f"{kind}/{name}"] = value.contiguous()
        temporary, began = self._file.with_name(f".{self._file.name}.partial"), time.monotonic()
        try:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            if shutil.disk_usage(self._file.parent).free < 2 * size:
                self._next = float("inf")
                return NO_ROOM
            save_file(tensors, temporary, {STEP: str(step)})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(self._file)
        except Exception as error:
            if not (isinstance(error, OSError) or disk_full(error)):
                raise
            self._next = float("inf")
            return NO_ROOM
        finally:
            temporary.unlink(missing_ok=True)
        now = time.monotonic()
        self._next = now + max(self._wait, PATIENCE * (now - began))
        return ""

    def restore(self, file: Path, stack: Stack, optimizer: EagerAdamW) -> None:
        """Put what `file` holds into the model and the optimizer.

        Raises:
            TrspError: it does not belong to this model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened, torch.no_grad():
                names = set(opened.keys())
                for name, parameter in self._weights(stack).items():
                    parameter.copy_(opened.get_tensor(f"weight/{name}"))
                for name, parameter in stack.model.named_parameters():
                    kinds = [k for k in EagerAdamW.MOMENTS if f"{k}/{name}" in names]
                    optimizer.restore(parameter, {k: opened.get_tensor(f"{k}/{name}") for k in kinds})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise TrspError(
                f"{file.name} in the run folder does not fit this model, or is damaged.",
                "Delete that file and resume: stage 2 then starts over.",
            ) from error

    def _weights(self, stack: Stack) -> dict[str, Any]:
        alone = self._adapters_alone or quantized.is_packed(stack.model)
        return {n: p for n, p in stack.model.named_parameters() if not alone or "lora_" in n}
