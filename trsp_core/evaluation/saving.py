"""Saves a model in the run folder as an ordinary checkpoint, and proves it before it gets its name there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from trsp_core import files, formatting, machine, malloc
from trsp_core.errors import TrspError
from trsp_core.evaluation import verification
from trsp_core.perf.budget import PROCESS_BYTES
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event
from trsp_core.schema.run_folder import RunFolder
from trsp_core.surgery import lora, quantization
from trsp_core.surgery.stack import Stack


def keep(
    config: RunConfig, stack: Stack, tokenizer: Any, run: RunFolder, name: str, done: int
) -> Generator[Event, None, int]:
    """Save the model as it stands in the run's folder `name`, and return its bytes. It gets there only once a fresh
    process with stock transformers has loaded it and computed the same.

    Args:
        done: how many units of the phase are done before; this does two more.

    Raises:
        TrspError: the fresh process cannot load it, or computes something else. The files are left in `unproved-NAME`.
    """
    unproved, computed = run.folder / f"unproved-{name}", run.folder / f".{name}-proof.partial"
    try:
        size = save(config, stack, tokenizer, unproved, computed)
        yield ev.Progressed(done + 1)
        malloc.give_back()
        torch.cuda.empty_cache()
        yield from _proved(run, unproved, computed, ev.Progressed(done + 1))
        if name == run.model_folder.name:
            computed.replace(run.proof_file)  # exports are compared with it
        shutil.rmtree(run.folder / name, ignore_errors=True)
        unproved.replace(run.folder / name)
        files.sync(run.folder)
    except (GeneratorExit, KeyboardInterrupt):
        shutil.rmtree(unproved, ignore_errors=True)
        raise
    finally:
        computed.unlink(missing_ok=True)
    yield ev.Progressed(done + 2)
    return size


def _proved(run: RunFolder, unproved: Path, computed: Path, progress: ev.Progressed) -> Iterator[Event]:
    """Prove the checkpoint in `unproved`: let a fresh process load it, and compare what it computes with `computed`,
    which `verification.keep` wrote. Yields `progress` again if the run is asked to stop meanwhile, so that whoever
    reads can close it.

    Raises:
        TrspError: memory for the process is short, it cannot load the checkpoint, or it computes something else.
    """
    where = f"The files are in {unproved.name}, unproved."
    again = "All that was measured stays, and resuming the run tries this again; without --save-model nothing is kept."
    if (free := machine.available_memory()) < PROCESS_BYTES:
        raise TrspError(
            f"The model is not proved: a fresh process to load it takes {formatting.size(PROCESS_BYTES)} of memory, "
            f"{formatting.size(free)} are free. {where}",
            f"Free some memory. {again}",
        )
    with contextlib.closing(verification.checking(unproved, computed)) as waiting:
        while True:
            try:
                next(waiting)
            except StopIteration as end:
                problems = end.value.problems
                break
            except TrspError as error:
                raise TrspError(f"{error.message} {where}", f"{error.remedy} {again}") from error
            if run.cancelled():
                yield progress
    if problems:
        raise TrspError(
            f"The model that stock transformers loads is not the one of this run: {'; '.join(problems)}. {where}",
            f"Please report this. {again}",
        )


def save(config: RunConfig, stack: Stack, tokenizer: Any, target: Path, reference: Path | None = None) -> int:
    """Write an ordinary checkpoint (safetensors and tokenizer) into the folder `target`, whole or not at all; returns
    its bytes. A packed model is unpacked in bfloat16, with its adapters merged; or, where `config.save_as` is
    "adapters", written as it is, with its adapters in the folder `adapter` inside.

    Args:
        reference: the file to write what the model in memory computes to, for the proof; None writes none.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    packed = quantization.is_packed(stack.model)
    beside = packed and config.save_as == "adapters"
    model: Any = quantization.spelled_out(stack, torch.bfloat16) if packed and not beside else stack.model
    dtype = model.config.dtype
    try:
        with lora.set_aside(stack) if beside else contextlib.nullcontext(), quantization.named_in_config(stack):
            model.save_pretrained(temporary)
    finally:
        model.config.dtype = dtype  # save_pretrained leaves a string there
    if beside and lora.of(stack):
        lora.save(stack, temporary / "adapter", config.model)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    files.sync_all(temporary)
    temporary.replace(target)
    if reference:
        verification.keep(model, tokenizer, reference)
        files.sync(reference)
    files.sync(target.parent)
    return files.folder_size(target)
