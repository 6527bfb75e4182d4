"""A run's model to take away: a checkpoint folder, or a zip of it, with card, config and proof; whole or not at all.

`python -m trsp_core.export.checkpoint` is the child process of a page (`export_queue`). Imports no torch until it has
to convert.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trsp_core import machine, subprocesses
from trsp_core.errors import TrspError, disk_full
from trsp_core.evaluation import verification
from trsp_core.evaluation.verification import Proof
from trsp_core.export import gguf_layer_kinds, hub_upload, model_card
from trsp_core.runs import limits
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema import config as configs
from trsp_core.schema.config import RunConfig
from trsp_core.schema.run_state import RunState
from trsp_core.subprocesses import Progress

MAX_PROOF = 1_000_000  # bytes of a proof inside a zip
DTYPES = ("float32", "bfloat16", "float16")
FRESH = 400_000_000  # bytes that a process takes for torch and transformers alone


@dataclass(frozen=True)
class Archive:
    """An export that lies in the run folder as a zip; `told` is its proof in words."""

    file: Path
    told: str

    @property
    def size(self) -> int:
        return self.file.stat().st_size


def export(
    run: Run, target: Path | None = None, dtype: str = "", push: str = "", token: str = ""
) -> Iterator[Progress]:  # nosec B107 - "" is none
    """Make the export and prove it; closing the iterator leaves nothing half.

    Args:
        target: a folder, or a file that ends in `.zip`; None makes a folder among the run's exports.
        dtype: one of `DTYPES`; "" leaves the weights as the run saved them.
        push: also upload it to this repository of the hub, owner/name, with `token`.

    Raises:
        TrspError: the run kept no model, the proof failed, there is no room, or the hub refused.
    """
    if push:
        limits.current().refuse_push()
        hub_upload.check_name(push)
    config, state = run.config(), run.state()
    kept = _kept_dtype(run, state)
    quantized = bool(_model_config(run).get("quantization_config"))
    if dtype not in ("", *DTYPES):
        raise TrspError(f"There is no number format {dtype!r}.", f"Take one of {', '.join(DTYPES)}.")
    if quantized and dtype:
        raise TrspError("The weights of this model are quantized and stay so.", "Leave the number format out.")
    dtype = dtype or ("quantized" if quantized else kept)
    title = model_card.name(config, state, dtype)
    target = target or run.exports_folder / title
    _check_target(target)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    ours = target.parent == run.exports_folder
    with _told(target), run.exporting() if ours else contextlib.nullcontext(), contextlib.ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(run, target)
            _sweep(target)
            folder = scratch / title if target.suffix == ".zip" else scratch
            folder.mkdir(parents=True)
            held.enter_context(_held(scratch))
            yield Progress("Copying the checkpoint" if dtype in (kept, "quantized") else f"Converting to {dtype}", 0.05)
            if dtype in (kept, "quantized"):
                shutil.copytree(run.model_folder, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
            else:
                _convert(run.model_folder, folder, dtype)
            yield Progress("Proving it: a fresh process with stock transformers loads it", 0.3)
            machine.require_memory(_weight_bytes(folder) + FRESH, "The fresh process that loads the export")
            found = verification.check(folder, run.proof_file)
            if found.problems:
                raise TrspError(
                    f"The proof failed, so nothing was exported: {'; '.join(found.problems)}.", "Please report this."
                )
            _describe(run, config, state, found, folder, title, dtype)
            if target.suffix == ".zip":
                yield Progress("Packing", 0.8)
                _pack(folder, scratch / target.name)
                (scratch / target.name).replace(target)
            else:
                shutil.rmtree(target, ignore_errors=True)
                folder.replace(target)
                folder = target
            if push:
                yield Progress(f"Uploading to {push}", 0.9)
                hub_upload.push(folder, push, token)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    yield Progress(found.sentence, 1.0)


@contextlib.contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """While this lasts, `_sweep` takes `scratch` for what a living process works on."""
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove what killed exports to `target` left beside it."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError), _held(left):
            shutil.rmtree(left, ignore_errors=True)


def formats(run: Run) -> tuple[str, ...]:
    """Formats that the run's model can be exported in, its own first; none to choose from where weights are packed."""
    try:
        found = _model_config(run)
    except (OSError, ValueError):  # the export itself will say what is wrong
        return DTYPES
    if found.get("quantization_config"):
        return ()
    own = str(found.get("dtype") or "float32")
    return (own, *(d for d in DTYPES if d != own))


def remarks(run: Run, dtype: str) -> list[str]:
    """What a reader should know before the run's model is exported in `dtype`: why there is no recipe for mergekit, and
    what becomes of it in GGUF."""
    try:
        found = _model_config(run)
    except (OSError, ValueError):  # the export itself will say what is wrong
        return []
    said = [model_card.no_recipe(run.config(), run.state(), found, dtype), gguf_layer_kinds.warning(found)]
    return [remark for remark in said if remark]


_NO_EXPORT = (OSError, KeyError, TypeError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)


def archives(run: Run) -> list[Archive]:
    """The zips among the run's exports."""
    found = []
    for file in sorted(run.exports_folder.glob("*.zip")):
        with (
            contextlib.suppress(*_NO_EXPORT),
            zipfile.ZipFile(file) as packed,
            packed.open(f"{file.stem}/proof.json") as proof,
        ):
            found.append(Archive(file, json.loads(proof.read(MAX_PROOF))["told"]))  # whatever size it claims
    return found


def archive(run: Run, dtype: str) -> Path:
    """Where the zip with weights in `dtype` lies, or will lie."""
    return run.exports_folder / f"{model_card.name(run.config(), run.state(), dtype or 'quantized')}.zip"


def _kept_dtype(run: Run, state: RunState) -> str:
    """The number format of the run's model.

    Raises:
        TrspError: the run is not finished, or kept no model.
    """
    if state.ended != "finished" or not (run.model_folder / "config.json").is_file():
        if state.ended == "damaged":
            raise TrspError(f"The record of run {run.id} is damaged.", "Resume it: that tells what is missing again.")
        what = "kept no model" if state.ended == "finished" else "has not finished"
        raise TrspError(f"Run {run.id} {what}, so there is nothing to export.", "Run it with --save-model true.")
    return str(_model_config(run).get("dtype") or "float32")


def _model_config(run: Run) -> dict:
    return _config_in(run.model_folder)


def _config_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _check_target(target: Path) -> None:
    """Raises TrspError: there is something at `target` that no export has made."""
    if target.is_dir() and target.suffix != ".zip":
        ours = (target / "proof.json").is_file() or not any(target.iterdir())
    else:
        ours = target.is_file() and any(name.endswith("/proof.json") for name in _names(target))
    if target.exists() and not ours:
        raise TrspError(f"{target} exists, and is no earlier export.", "Choose a new name.")


def _names(file: Path) -> list[str]:
    """What is in a zip; nothing, where it is none."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as packed:
        return packed.namelist()
    return []


def _check_room(run: Run, target: Path) -> None:
    """Raises TrspError: the disk has no room for a copy, and for its zip."""
    size = sum(file.stat().st_size for file in run.model_folder.iterdir())
    needed, free = size * (2 if target.suffix == ".zip" else 1) + 50_000_000, shutil.disk_usage(target.parent).free
    if free < needed:
        raise TrspError(
            f"{needed / 1e9:.1f} GB are needed in {target.parent}, {free / 1e9:.1f} GB are free.", "Free some space."
        )


def _convert(source: Path, folder: Path, dtype: str) -> None:
    """The checkpoint in `source` written to `folder` in another number format."""
    machine.require_memory(2 * _weight_bytes(source) + FRESH, "The conversion")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a folder of this machine, made by a run
        source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    model.save_pretrained(folder)
    for file in source.iterdir():  # the tokenizer's files
        if not (folder / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _describe(run: Run, config: RunConfig, state: RunState, found: Proof, folder: Path, title: str, dtype: str) -> None:
    """Card, settings and proof beside the weights."""
    shared, exported = json.loads(configs.to_json(model_card.published(config))), _config_in(folder)
    with contextlib.suppress(OSError, ValueError):
        found_there = json.loads((run.folder / "env.json").read_text("utf-8"))
        shared["environment"] = {name: value for name, value in found_there.items() if name != "platform"}
    texts = {
        "README.md": model_card.write(config, state, found, title, exported, dtype),
        "run.json": json.dumps(shared, indent=1, ensure_ascii=False) + "\n",
        "proof.json": json.dumps({"told": found.sentence, **codec.values(found)}, indent=1) + "\n",
    }
    if not model_card.no_recipe(config, state, exported, dtype):
        texts["mergekit.yml"] = model_card.mergekit(config, state, dtype)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")


def _pack(folder: Path, file: Path) -> None:
    """A zip of `folder`, stored as it is: weights do not compress."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for part in sorted(folder.iterdir()):
            packed.write(part, f"{folder.name}/{part.name}")


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or disk_full(error)):
            raise
        why = "the disk is full" if disk_full(error) else getattr(error, "strerror", "") or error
        raise TrspError(
            f"The export could not be written to {target}: {why}.",
            "Free some space, or choose another folder.",
        ) from error


def _asked(run: str, target: str, dtype: str, push: str, token: str) -> Iterator[Progress]:
    return export(Run(Path(run)), Path(target), dtype, push, token)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(subprocesses.serve(_asked))
