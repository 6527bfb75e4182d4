"""From files to a model in memory, and from a download to files that load in a second. The only one to load weights.

`python -m trsp_core.load convert NAME FILE` and `... download OWNER/NAME` are the child processes of `models.fetch`;
they write one JSON object a line to stdout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp_core import downloads, forecast, models
from trsp_core.config import PACKED
from trsp_core.errors import TrspError

if TYPE_CHECKING:
    pass

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]  # never pickles, never code

Say = Callable[[str, float], None]


def load(name: str, precision: str = "float32", device: str = "auto", compute: str = "float32") -> tuple[Any, Any]:
    """The model called `name`, in evaluation mode, and its tokenizer. On several GPUs a model that is too large for one
    is spread over them.

    Args:
        name: as in `models.locate`; a hub id that is not on this machine is downloaded.
        precision: "float32" or "bfloat16", the number format in memory, or "nf4" or "int8" for packed weights.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        compute: number format of products on packed weights, and of what is not packed.

    Raises:
        TrspError: no such model, not loadable, weights missing, no such device, or more bytes than memory.
    """
    if models.is_hub_id(name) and not models.is_ready(name):
        download(name, lambda message, fraction: None)
    facts = models.facts(name)
    where = pick_device(device)
    if where == "cpu":
        forecast.require_memory(forecast.weight_bytes(facts, precision, compute), f"The weights of {name}")
    import torch
    from transformers import AutoModelForCausalLM

    from trsp_core import quantized

    tokenizer = load_tokenizer(facts.folder)
    packed = precision in PACKED
    dtype = getattr(torch, compute if packed else precision)
    how: dict[str, Any] = {"quantization_config": quantized.recipe(precision, dtype)} if packed else {}
    if packed or where != "cpu":
        how["device_map"] = {"": where} if fits_one(forecast.weight_bytes(facts, precision, compute), where) else "auto"
    with _quiet(), _told_as(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            facts.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            low_cpu_mem_usage=True,
            output_loading_info=True,
            **how,
        )
        model, report = loaded
        quantized.settle(model)
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]])
        raise TrspError(
            f"{name} lacks {len(missing)} of its weights, {missing[0]} among them.", "Download or save the model again."
        )
    return model.eval(), tokenizer


def fits_one(needed: int, where: str) -> bool:
    """Whether `needed` bytes of weights leave room to work on the one device `where`."""
    import torch

    return where == "cpu" or torch.cuda.device_count() < 2 or needed < 0.8 * torch.cuda.mem_get_info()[0]


def settle_precision(precision: str, device: str) -> tuple[str, str]:
    """The number format that a device can do, and a sentence where it is not the wanted one or comes at a price."""
    import torch

    if precision != "bfloat16":
        return precision, ""
    if pick_device(device) == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return precision, ""
        return "float32", "This GPU has no bfloat16: the run goes on in float32, with twice the memory."
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return precision, ""
    return precision, "This CPU has no bfloat16 units: memory is halved, and every step takes longer than in float32."


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        TrspError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    with _quiet(), _told_as(f"The tokenizer in {folder}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def pick_device(device: str) -> str:
    """ "cpu" or "cuda" for a device knob.

    Raises:
        TrspError: cuda is asked for, and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise TrspError("The device cuda was asked for, but torch sees no GPU.", "Set --device to auto or cpu.")
    return device


def convert(source: models.Source, file: Path, say: Say) -> Path:
    """Turn the GGUF `file` into a safetensors folder in float32, whole or not at all; return the folder.

    The 4-bit weights are spelled out as they are, so the result computes exactly what the file says.

    Raises:
        TrspError: the file is not the one that the catalogue knows, or there is no room.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("Checking the download", 0.05)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != source.sha256:
            raise TrspError(f"{file.name} is damaged: its checksum is not the known one.", "Fetch the model again.")
    target, scratch = models.converted(source.name), downloads.scratch_folder(source.name)
    try:
        with _quiet():
            say("Reading the model file", 0.2)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
            say("Reading its tokenizer", 0.6)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            say("Writing safetensors", 0.8)
            model.save_pretrained(scratch, max_shard_size="50GB")
            tokenizer.save_pretrained(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not models.is_ready(source.name):
            shutil.rmtree(target)
        with contextlib.suppress(OSError):  # another process was faster: then its folder is as good
            scratch.rename(target)
    except OSError as error:
        raise TrspError(
            f"The converted model could not be written: {error}.", "Free some space, or set TRSP_HOME elsewhere."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def download(hub_id: str, say: Say) -> None:
    """Download a model from the hub into the hub's own cache: safetensors, JSON and tokenizer files alone.

    Raises:
        TrspError: the hub cannot be reached, has no such model, or has it without safetensors.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")  # seconds
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import HfApi, snapshot_download

    with _hub_told(hub_id):
        files = HfApi().model_info(hub_id, files_metadata=True, timeout=15).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise TrspError(f"{hub_id} has no safetensors on the hub.", "Choose a model that is stored as safetensors.")
    total = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    with _watched(hub_id, total, say), _hub_told(hub_id):
        snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=["*/*"])


@contextlib.contextmanager
def _watched(hub_id: str, total: int, say: Say) -> Iterator[None]:
    """Tell every second how many of `total` bytes have arrived in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder, done = Path(HF_HUB_CACHE) / ("models--" + hub_id.replace("/", "--")), threading.Event()

    def tell() -> None:
        while not done.wait(1.0):
            share = min(downloads.folder_size(folder) / max(total, 1), 1.0)
            say(f"Downloading {hub_id}: {share:.0%} of {total / 1e6:,.0f} MB", share)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@contextlib.contextmanager
def _hub_told(hub_id: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one refusal: it has a dozen error types, of several libraries."""
    try:
        yield
    except Exception as error:
        raise TrspError(
            f"{hub_id} could not be had from the hub: {type(error).__name__}: {str(error)[:200]}.",
            "Check the id and the network, or take a model of the catalogue or a local folder.",
        ) from error


@contextlib.contextmanager
def _told_as(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it does not know into a refusal."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrspError(
            f"{name} could not be loaded: {type(error).__name__}: {str(error)[:300]}",
            "Choose a model whose architecture this version of transformers knows.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars out of stderr."""
    from transformers.utils import logging

    were = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were:
            logging.enable_progress_bar()


def _child(arguments: list[str]) -> int:
    """The child process of `models.fetch`: 0, or 1 with the refusal as the last line."""

    def tell(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    def say(message: str, fraction: float) -> None:
        tell(message=message, fraction=fraction)

    try:
        if arguments[0] == "convert":
            convert(models.CATALOGUE[arguments[1]], Path(arguments[2]), say)
        else:
            download(arguments[1], say)
    except TrspError as error:
        tell(error=error.message, remedy=error.remedy)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
