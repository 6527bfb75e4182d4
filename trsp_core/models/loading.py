"""Loads models into memory, and converts the catalogue's downloads into folders that load in a second.

`python -m trsp_core.models.loading` is a child process of `download`, which asks it to convert the files of a model of
the catalogue.
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

from trsp_core import formatting, machine, subprocesses
from trsp_core.errors import TrspError, disk_full
from trsp_core.models import catalog, download, hub, inspection, tokenizer_check
from trsp_core.models.libraries import CONFIG, load_tokenizer, quiet, refused_as
from trsp_core.schema.config import PACKED
from trsp_core.subprocesses import Progress

MOST_BUFFER_BYTES = 4_000_000_000  # of the buffers that a model has beside its weights
ANSWERS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # whatever config.json says
JOINED = "joined.gguf"  # the pieces of a GGUF file joined; removed once it is converted
GENERATION = "Put that file right, or take it away: a run does not need it."
BELONG = "Check that config.json and the weights belong together."


def load(
    name: str,
    precision: str = "float32",
    device: str = "auto",
    compute: str = "float32",
    facts: inspection.Facts | None = None,
) -> tuple[Any, Any]:
    """Load the model `name`; returns it, in evaluation mode, with its tokenizer. A model that is too large for one GPU
    is spread over all of them.

    Args:
        name: as in `catalog.locate`; a hub id that is not on this machine is downloaded first.
        precision: "float32" or "bfloat16", the number format in memory; "nf4" or "int8" for packed weights.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        compute: with packed weights, the number format of products and of what is not packed.
        facts: of the model, where they have been read already.

    Raises:
        TrspError: there is no such model or device, it cannot be loaded, weights are missing or have other shapes, or
            memory is short.
    """
    if facts is None:
        if catalog.is_hub_id(name) and not catalog.is_ready(name):
            hub.download(hub.look(name))
        facts = catalog.facts(name)
    where = pick_device(device)
    if where == "cpu":
        machine.require_memory(inspection.weight_bytes(facts, precision, compute), f"The weights of {name}")
    import torch
    from transformers import AutoModelForCausalLM

    from trsp_core.surgery import quantization

    tokenizer_check.check(facts)
    refuse_claims(facts)
    tokenizer = load_tokenizer(facts.folder)
    packed = precision in PACKED
    dtype = getattr(torch, compute if packed else precision)
    how: dict[str, Any] = {"quantization_config": quantization.recipe(precision, dtype)} if packed else {}
    if packed or where != "cpu":
        how["device_map"] = (
            {"": where} if fits_one(inspection.weight_bytes(facts, precision, compute), where) else "auto"
        )
    with quiet(), refused_as(name):
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
    quantization.settle(model)
    _describe(model, tokenizer)
    return model.eval(), tokenizer


def _describe(model: Any, tokenizer: Any) -> None:
    """Correct the config, so that the model can be saved as it was loaded: if head and embedding are two matrices, the
    config says that they are not tied; and it does not name code of the model's own, since none was run."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if head is not None and head.weight is not embedding.weight and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        vars(config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)


def check(facts: catalog.Facts) -> Any:
    """Check a model as far as that is possible without reading its weights; returns its tokenizer.

    Raises:
        TrspError: transformers cannot read its config or its tokenizer, or as in `refuse_claims`.
    """
    refuse_claims(facts)
    return load_tokenizer(facts.folder)


def refuse_claims(facts: catalog.Facts) -> None:
    """Raise TrspError if config.json describes a far larger model than the weights hold, or is nothing that
    transformers can read.

    Loading would fill in all missing weights, in memory, before it complains. So the model is first built on the meta
    device, without memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with quiet(), refused_as(f"The config of {facts.name}", CONFIG):
        config = AutoConfig.from_pretrained(  # nosec B615 - a folder of this machine
            facts.folder, trust_remote_code=False, local_files_only=True
        )
    if (facts.folder / "generation_config.json").is_file():
        with quiet(), refused_as(f"generation_config.json of {facts.name}", GENERATION):
            GenerationConfig.from_pretrained(facts.folder, local_files_only=True)  # nosec B615 - the same folder
    with quiet(), refused_as(facts.name), torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    claimed = sum(p.numel() for p in built.parameters())
    buffers = sum(b.numel() * b.element_size() for b in built.buffers())
    if claimed > 2 * facts.parameters or buffers > MOST_BUFFER_BYTES:
        raise TrspError(
            f"{facts.name}: config.json speaks of {formatting.count(claimed)} parameters and "
            f"{formatting.count(buffers)} bytes of buffers, the weights "
            f"hold {formatting.count(facts.parameters)} parameters.",
            BELONG,
        )


def fits_one(needed: int, where: str) -> bool:
    """Whether a model whose weights take `needed` bytes should go on one device: on "cpu", on the only GPU, or if
    enough of the first GPU is free.

    Args:
        where: "cpu" or "cuda".
    """
    import torch

    return where == "cpu" or torch.cuda.device_count() < 2 or needed < 0.8 * torch.cuda.mem_get_info()[0]


def settle_precision(precision: str, device: str) -> tuple[str, str]:
    """The precision to load with on `device`: `precision`, or "float32" on a GPU without bfloat16. And a sentence where
    it is another, or slow here; else ""."""
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


def pick_device(device: str) -> str:
    """The device for a value of the setting `device`: "cpu" or "cuda".

    Raises:
        TrspError: "cuda" is asked for, and there is no GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise TrspError("The device cuda was asked for, but torch sees no GPU.", "Set --device to auto or cpu.")
    return device


def convert(source: catalog.Source, pieces: Sequence[Path]) -> Iterator[Progress]:
    """Convert the GGUF file of `source` into a folder with safetensors in float32, whole or not at all, and yield the
    progress. The 4-bit weights are unpacked without any rounding.

    Args:
        pieces: the files of `source`, in order; joined they are the GGUF file.

    Raises:
        TrspError: the file is not the one that the catalogue knows, or there is no room on the disk.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target, scratch = catalog.converted(source.name), download.scratch_folder(source.name)
    try:
        yield Progress("Checking the download", 0.05)
        file = _joined(source, pieces, scratch)
        with quiet():
            yield Progress("Reading the model file", 0.2)
            model = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a file whose checksum was compared
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
            yield Progress("Reading its tokenizer", 0.6)
            tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 - the same file
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            yield Progress("Writing safetensors", 0.8)
            model.save_pretrained(scratch, max_shard_size="50GB")
            tokenizer.save_pretrained(scratch)
        (scratch / JOINED).unlink(missing_ok=True)
        if source.terms:  # `download.fetch` comes here only once they are accepted
            record = asdict(source.terms) | {"accepted": datetime.now(UTC).isoformat(timespec="seconds")}
            (scratch / "terms.json").write_text(json.dumps(record, indent=1), "utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not catalog.is_ready(source.name):
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


def _joined(source: catalog.Source, pieces: Sequence[Path], folder: Path) -> Path:
    """The file that `pieces` make, joined in `folder` if there are several. Raises TrspError if its checksum is not
    that of `source`."""
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


def _answer(name: str, pieces: list[str]) -> Iterator[Progress]:
    """What the child does: `convert` for the catalogue's model `name`."""
    return convert(catalog.CATALOGUE[name], [Path(piece) for piece in pieces])


if __name__ == "__main__":
    sys.exit(subprocesses.serve(_answer))
