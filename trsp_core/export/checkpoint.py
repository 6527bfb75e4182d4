"""A run's model to take away: a checkpoint folder, or a zip of it, with a card, the settings and the proof.

It is made under another name and renamed in the end, so that it is there whole or not at all.

`python -m trsp_core.export.checkpoint` is the child process of a page (`export_queue`). Torch is imported only where
weights are converted.
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

from trsp_core import formatting, machine, subprocesses
from trsp_core.errors import TrspError, disk_full
from trsp_core.evaluation import verification
from trsp_core.evaluation.verification import Proof
from trsp_core.export import gguf_layer_kinds, hub_upload, model_card
from trsp_core.runs import limits
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema.config import RunConfig, to_json
from trsp_core.schema.run_state import RunState
from trsp_core.subprocesses import Progress

MAX_PROOF = 1_000_000  # bytes of a proof inside a zip
DTYPES = ("float32", "bfloat16", "float16")
FRESH = 400_000_000  # bytes that a process takes for torch and transformers alone


@dataclass(frozen=True)
class Archive:
    """An export that lies in the run folder as a zip.

    Attributes:
        verdict: what its proof came to, in a sentence.
    """

    file: Path
    verdict: str

    @property
    def size(self) -> int:
        return self.file.stat().st_size


def export(
    run: Run, target: Path | None = None, dtype: str = "", push: str = "", token: str = ""
) -> Iterator[Progress]:  # nosec B107 - "" is none
    """Make an export, prove it, and yield how far that is. Closing the iterator removes what is unfinished.

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
    own_dtype = _own_dtype(run, state)
    quantized = bool(_model_config(run).get("quantization_config"))
    if dtype not in ("", *DTYPES):
        raise TrspError(f"There is no number format {dtype!r}.", f"Take one of {', '.join(DTYPES)}.")
    if quantized and dtype:
        raise TrspError("The weights of this model are quantized and stay so.", "Leave the number format out.")
    dtype = dtype or ("quantized" if quantized else own_dtype)
    title = model_card.name(config, state, dtype)
    target = target or run.exports_folder / title
    _check_target(target)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    in_run = target.parent == run.exports_folder
    with _refusing(target), run.exporting() if in_run else contextlib.nullcontext(), contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(run, target)
            _remove_scraps(target)
            folder = scratch / title if target.suffix == ".zip" else scratch
            folder.mkdir(parents=True)
            stack.enter_context(_locked(scratch))
            yield Progress(
                "Copying the checkpoint" if dtype in (own_dtype, "quantized") else f"Converting to {dtype}", 0.05
            )
            if dtype in (own_dtype, "quantized"):
                shutil.copytree(run.model_folder, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
            else:
                _convert(run.model_folder, folder, dtype)
            yield Progress("Proving it: a fresh process with stock transformers loads it", 0.3)
            proof = _prove(run, folder)
            _describe(run, config, state, proof, folder, title, dtype)
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
    yield Progress(proof.sentence, 1.0)


def _prove(run: Run, folder: Path) -> Proof:
    """The proof of the checkpoint in `folder`.

    Raises:
        TrspError: it failed, or there is no memory for it.
    """
    machine.require_memory(_weight_bytes(folder) + FRESH, "The fresh process that loads the export")
    proof = verification.check(folder, run.proof_file)
    if proof.problems:
        problems = "; ".join(proof.problems)
        raise TrspError(f"The proof failed, so nothing was exported: {problems}.", "Please report this.")
    return proof


@contextlib.contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """A lock on the folder that a living process works in, so that `_remove_scraps` leaves it.

    Raises:
        OSError: another process has the lock.
    """
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_scraps(target: Path) -> None:
    """Remove what killed exports to `target` left beside it."""
    for scrap in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError), _locked(scrap):
            shutil.rmtree(scrap, ignore_errors=True)


def formats(run: Run) -> tuple[str, ...]:
    """Number formats that the run's model can be exported in, its own first; () where its weights are quantized."""
    try:
        model_config = _model_config(run)
    except (OSError, ValueError):  # the export itself will say what is wrong
        return DTYPES
    if model_config.get("quantization_config"):
        return ()
    own = str(model_config.get("dtype") or "float32")
    return (own, *(d for d in DTYPES if d != own))


def remarks(run: Run, dtype: str) -> list[str]:
    """Sentences to read before the model is exported in `dtype`: why there is no recipe for mergekit, and what GGUF
    would change."""
    try:
        model_config = _model_config(run)
    except (OSError, ValueError):  # the export itself will say what is wrong
        return []
    recipe = model_card.no_recipe(run.config(), run.state(), model_config, dtype)
    return [remark for remark in (recipe, gguf_layer_kinds.warning(model_config)) if remark]


UNREADABLE = (OSError, KeyError, TypeError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)


def archives(run: Run) -> list[Archive]:
    """The zips among the run's exports."""
    exports = []
    for file in sorted(run.exports_folder.glob("*.zip")):
        with (
            contextlib.suppress(*UNREADABLE),
            zipfile.ZipFile(file) as package,
            package.open(f"{file.stem}/proof.json") as proof,
        ):
            exports.append(Archive(file, json.loads(proof.read(MAX_PROOF))["told"]))  # whatever size it claims
    return exports


def archive(run: Run, dtype: str) -> Path:
    """Where the zip with weights in `dtype` lies, or will lie."""
    return run.exports_folder / f"{model_card.name(run.config(), run.state(), dtype or 'quantized')}.zip"


def _own_dtype(run: Run, state: RunState) -> str:
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
        is_export = (target / "proof.json").is_file() or not any(target.iterdir())
    else:
        is_export = target.is_file() and any(name.endswith("/proof.json") for name in _names(target))
    if target.exists() and not is_export:
        raise TrspError(f"{target} exists, and is no earlier export.", "Choose a new name.")


def _names(file: Path) -> list[str]:
    """Names of what is in a zip; none where the file is no zip."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as package:
        return package.namelist()
    return []


def _check_room(run: Run, target: Path) -> None:
    """Raises TrspError: the disk has no room for a copy, and for its zip."""
    size = sum(file.stat().st_size for file in run.model_folder.iterdir())
    needed, free = size * (2 if target.suffix == ".zip" else 1) + 50_000_000, shutil.disk_usage(target.parent).free
    if free < needed:
        raise TrspError(
            f"{formatting.size(needed)} are needed in {target.parent}, {formatting.size(free)} are free.",
            "Free some space.",
        )


def _convert(source: Path, folder: Path, dtype: str) -> None:
    """The checkpoint in `source` written to `folder` in another number format."""
    machine.require_memory(2 * _weight_bytes(source) + FRESH, "The conversion")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a folder of this machine, made by a run
        source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    model.save_pretrained(folder)
    for file in source.iterdir():  # the tokenizer's files
        if not (folder / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _describe(run: Run, config: RunConfig, state: RunState, proof: Proof, folder: Path, title: str, dtype: str) -> None:
    """Write card, settings and proof beside the weights."""
    settings, exported = json.loads(to_json(model_card.public_config(config))), _config_in(folder)
    with contextlib.suppress(OSError, ValueError):
        versions = json.loads((run.folder / "env.json").read_text("utf-8"))
        settings["environment"] = {name: value for name, value in versions.items() if name != "platform"}
    texts = {
        "README.md": model_card.write(config, state, proof, title, exported, dtype),
        "run.json": json.dumps(settings, indent=1, ensure_ascii=False) + "\n",
        "proof.json": codec.encode({"told": proof.sentence, **codec.plain(proof)}, indent=1) + "\n",
    }
    if not model_card.no_recipe(config, state, exported, dtype):
        texts["mergekit.yml"] = model_card.mergekit(config, state, dtype)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")


def _pack(folder: Path, file: Path) -> None:
    """A zip of `folder`, stored as it is: weights do not compress."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as package:
        for part in sorted(folder.iterdir()):
            package.write(part, f"{folder.name}/{part.name}")


@contextlib.contextmanager
def _refusing(target: Path) -> Iterator[None]:
    """What the disk refuses becomes a refusal in words; other errors pass."""
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


def export_folder(run: str, target: str, dtype: str, push: str, token: str) -> Iterator[Progress]:
    """`export` for a run and a target that are named by their paths."""
    return export(Run(Path(run)), Path(target), dtype, push, token)


if __name__ == "__main__":
    sys.exit(subprocesses.serve(export_folder))
