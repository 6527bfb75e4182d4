"""From files to a model in memory, and from a download to files that load in a second. The only one to load weights.

`python -m trsp_core.load convert NAME FILE...` is a child process of `downloads`, see there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trsp_core import downloads, forecast, models, vocabulary
from trsp_core.config import PACKED
from trsp_core.errors import TrspError, disk_full, is_short_memory
from trsp_core.hub import Say, download

MOST_BUFFER_BYTES = 4_000_000_000  # of what a model keeps beside its weights
ANSWERS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # whatever config.json says
JOINED = "joined.gguf"  # beside the model that is made of it, for a while
ARCHITECTURE = "Choose a model whose architecture this version of transformers knows."
CONFIG = "Put its config.json right, or choose a model that this version of transformers knows."
BELONG = "Check that config.json and the weights belong together."
TOKENIZER = "Save its tokenizer again with this version of transformers, or choose another model."


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

    vocabulary.check(facts)
    refuse_claims(facts)
    tokenizer = load_tokenizer(facts.folder)
    packed = precision in PACKED
    dtype = getattr(torch, compute if packed else precision)
    how: dict[str, Any] = {"quantization_config": quantized.recipe(precision, dtype)} if packed else {}
    if packed or where != "cpu":
        how["device_map"] = {"": where} if fits_one(forecast.weight_bytes(facts, precision, compute), where) else "auto"
    with _quiet(), _told_as(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a folder of this machine
            facts.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            low_cpu_mem_usage=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words of ours
            **ANSWERS,
            **how,
        )
    model, report = loaded
    if odd := sorted(key for key, *_ in report["mismatched_keys"]):
        raise TrspError(
            f"{name}: {len(odd)} of its weights have another shape than config.json says, {odd[0]} among them.", BELONG
        )
    lacking = sorted(map(str, report["missing_keys"]))
    if lacking:
        head = model.get_output_embeddings()
        remedy = "Download or save the model again."
        if lacking == [key for key, weight in model.named_parameters() if head is not None and weight is head.weight]:
            remedy = "If its head is its embedding, write tie_word_embeddings true in config.json; else save it again."
        raise TrspError(f"{name} lacks {len(lacking)} of its weights, {lacking[0]} among them.", remedy)
    quantized.settle(model)
    _describe(model, tokenizer)
    return model.eval(), tokenizer


def _describe(model: Any, tokenizer: Any) -> None:
    """Let the config say what was loaded, so that it can be saved: a head that was stored beside the embedding, and is
    another, is not tied to it, whatever the config said; and no code of the model's own was run."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if head is not None and head.weight is not embedding.weight and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        vars(config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)


def refuse_claims(facts: models.Facts) -> None:
    """Raise TrspError if config.json speaks of a far larger model than the weights hold. What is missing would be made
    up, in memory, before it is noticed; so the model is built without memory first.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet(), _told_as(f"The config of {facts.name}", CONFIG):
        config = AutoConfig.from_pretrained(  # nosec B615 - a folder of this machine
            facts.folder, trust_remote_code=False, local_files_only=True
        )
    with _quiet(), _told_as(facts.name), torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    claimed = sum(p.numel() for p in built.parameters())
    buffers = sum(b.numel() * b.element_size() for b in built.buffers())
    if claimed > 2 * facts.parameters or buffers > MOST_BUFFER_BYTES:
        raise TrspError(
            f"{facts.name}: config.json speaks of {claimed:,} parameters and {buffers:,} bytes of buffers, the weights "
            f"hold {facts.parameters:,} parameters.",
            BELONG,
        )


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
    """The tokenizer in a model's folder; one that nobody has looked at goes through `vocabulary.check` first.

    Raises:
        TrspError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    with _quiet(), _told_as(f"The tokenizer in {folder}", TOKENIZER):
        return AutoTokenizer.from_pretrained(  # nosec B615 - a folder of this machine
            folder, trust_remote_code=False, local_files_only=True
        )


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


def convert(source: models.Source, pieces: Sequence[Path], say: Say) -> Path:
    """Turn a GGUF file into a safetensors folder in float32, whole or not at all; return the folder.

    The 4-bit weights are spelled out as they are, so the result computes exactly what the file says.

    Args:
        pieces: files of `source`, in order; joined they are the GGUF file.

    Raises:
        TrspError: the file is not the one that the catalogue knows, or there is no room.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target, scratch = models.converted(source.name), downloads.scratch_folder(source.name)
    try:
        say("Checking the download", 0.05)
        file = _joined(source, pieces, scratch)
        with _quiet():
            say("Reading the model file", 0.2)
            model = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a file whose checksum was compared
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
            say("Reading its tokenizer", 0.6)
            tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 - the same file
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            say("Writing safetensors", 0.8)
            model.save_pretrained(scratch, max_shard_size="50GB")
            tokenizer.save_pretrained(scratch)
        (scratch / JOINED).unlink(missing_ok=True)
        if source.terms:  # `downloads.fetch` comes here only once they are accepted
            record = asdict(source.terms) | {"accepted": datetime.now(UTC).isoformat(timespec="seconds")}
            (scratch / "terms.json").write_text(json.dumps(record, indent=1), "utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not models.is_ready(source.name):
            shutil.rmtree(target)
        with contextlib.suppress(OSError):  # another process was faster: then its folder is as good
            scratch.rename(target)
    except Exception as error:
        if not (isinstance(error, OSError) or disk_full(error)):
            raise
        raise TrspError(
            f"The converted model could not be written: {error}.", "Free some space, or set TRSP_HOME elsewhere."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _joined(source: models.Source, pieces: Sequence[Path], folder: Path) -> Path:
    """The file that `pieces` make, its checksum compared; a single piece stays where it is."""
    (file,) = pieces if len(pieces) == 1 else (folder / JOINED,)
    if len(pieces) > 1:
        with file.open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != source.sha256:
            raise TrspError(f"{source.title} is damaged: its checksum is not the known one.", "Fetch the model again.")
    return file


@contextlib.contextmanager
def _told_as(name: str, remedy: str = ARCHITECTURE) -> Iterator[None]:
    """Turn what the libraries raise for a model that they do not know, or that is damaged, into a refusal. They name no
    errors of their own: a wrong kind of value in config.json ends in any of Python's. For calls of theirs alone."""
    try:
        yield
    except Exception as error:
        if is_short_memory(error):
            raise
        if isinstance(error, ImportError):
            remedy = "Install what is named there, or choose another model."
        raise TrspError(f"{name} could not be loaded: {type(error).__name__}: {str(error)[:300]}", remedy) from error


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
    """The child process of `downloads`: converts, and tells its progress."""
    _, name, *pieces = arguments

    def work(tell: downloads.Tell) -> None:
        convert(
            models.CATALOGUE[name],
            [Path(piece) for piece in pieces],
            lambda message, fraction: tell(message=message, fraction=fraction),
        )

    return downloads.serve(work)


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
