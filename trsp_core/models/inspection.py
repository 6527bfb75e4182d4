"""Reads what a model folder says of itself, in config.json and the headers of its safetensors files, without torch.

Before anything is loaded it refuses pickled weights, remote code, files that are cut short, links out of the folder,
and configs that are not those of a decoder-only language model. Knows no catalogue and no hub.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.models import architectures
from trsp_core.schema.config import PACKED
from trsp_core.surgery import families

MAX_HEADERS = 32_000_000  # bytes of all headers of a model; those of 100,000 tensors have some 15 MB
LONGEST_NAME = 255  # bytes of a file name; no usual file system takes more
MAX_CONFIG, MAX_JSON = 4_000_000, 32_000_000  # bytes of config.json, and of a shard index or the like
MAX_COUNT, MAX_SIZE = 100_000, 2**40  # of heads, experts and the like; of any other number
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 2_000, 1_000_000, 20_000_000

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")  # what configs call L

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_COUNT = re.compile(r"(num|n)_(\w+_)?(heads?|layers?|experts?|groups?)(_\w+)?")
_SIZE = re.compile(r"\w*(hidden|intermediate|vocab|ffn|mlp|embed)\w*_(size|dim)|head_dim|n_embd|d_model|n_positions")
_LAYER_NAME = re.compile(r"^(.*?)(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is loaded. Sizes are those of the stored weights.

    Attributes:
        name: what the person asked for.
        folder: where its files are.
        architecture: the class of the model, as the config names it.
        n_layers, width, vocabulary: L, D and V.
        max_length: longest context in tokens; None where the config does not say.
        parameters: how many numbers are stored; a tied matrix counts once.
        layer_parameters: how many each of the L layers has.
        bytes: of the weight files.
        model_type: the config's name of the family.
    """

    name: str
    folder: Path
    architecture: str
    n_layers: int
    width: int
    vocabulary: int
    max_length: int | None
    parameters: int
    layer_parameters: Sequence[int]
    bytes: int
    model_type: str = ""


def read(folder: Path, name: str, boundary: Path | None = None) -> Facts:
    """The facts of the model in `folder`.

    Args:
        name: for `Facts.name` and for messages.
        boundary: files may be links, but only to files inside this folder; None for `folder` itself.

    Raises:
        TrspError: the folder is no model that this program may or can load; message and remedy say why.
    """
    if not folder.is_dir():
        raise TrspError(f"{name}: there is no folder {folder}.", "Check the path, or choose a model of the catalogue.")
    inside = (boundary or folder).resolve()
    config = _json(folder, "config.json", inside, name, MAX_CONFIG)
    tokenizer_config = folder / "tokenizer_config.json"
    extra = _json(folder, "tokenizer_config.json", inside, name) if tokenizer_config.exists() else {}
    if (config.get("auto_map") or extra.get("auto_map")) and str(
        config.get("model_type")
    ) not in architectures.native():
        raise TrspError(
            f"{name} brings its own code (auto_map), which is never run here, and transformers has none for it.",
            "Choose a model whose architecture is part of transformers.",
        )
    if (folder / "adapter_config.json").exists():
        raise TrspError(f"{name} is an adapter, which names another model to be loaded.", "Merge it into its model.")
    for entry in os.scandir(folder):
        if entry.is_symlink():
            _inside(Path(entry.path), inside)
    architecture = _architecture(config, name)
    sizes = _sizes(config, name)
    _refuse_absurd(config, name)
    files = [_inside(folder / shard, inside) for shard in shards(folder, inside, name)]
    if not any((folder / tokenizer).exists() for tokenizer in _TOKENIZERS):
        raise TrspError(f"{name} has no tokenizer beside its weights.", "Save the tokenizer into the same folder.")
    lengths = [_header_length(file) for file in files]
    if max(lengths) <= MAX_HEADERS < sum(lengths):
        raise TrspError(
            f"{name}: the headers of its weight files have more than {formatting.size(MAX_HEADERS)}.",
            "Download or save the model again.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= header(file)
    return Facts(
        name=name,
        folder=folder,
        architecture=architecture,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        layer_parameters=_layers(shapes, sizes["n_layers"], name),
        bytes=sum(file.stat().st_size for file in files),
        **sizes,
    )


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, by name.

    Raises:
        TrspError: the file is cut short, or is no safetensors file.
    """
    size, length, remedy = file.stat().st_size, _header_length(file), "Download or save the model again."
    broken = TrspError(f"{file.name} is no safetensors file.", remedy)
    if not 2 <= length <= MAX_HEADERS:
        raise broken
    try:
        with safe_open(file, framework="np") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        if 8 + length <= size and "incomplete metadata" not in str(error):
            raise broken from error
        raise TrspError(
            f"{file.name} is cut short: {formatting.count(size)} bytes are there, its header speaks of another number.",
            remedy,
        ) from error
    if not shapes:
        raise broken
    return shapes


def _header_length(file: Path) -> int:
    """How many bytes the header of a safetensors file has, as its first 8 bytes say; 0 where it has none."""
    with file.open("rb") as stream:
        start = stream.read(8)
    return struct.unpack("<Q", start)[0] if len(start) == 8 else 0


def _json(folder: Path, file: str, inside: Path, name: str, most: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of the model, of at most `most` bytes; raises TrspError where there is none."""
    path = folder / file
    if not path.is_file():
        raise TrspError(
            f"{name} is no model: it has no {file}.", "A model folder holds config.json and .safetensors files."
        )
    path = _inside(path, inside)
    try:
        if path.stat().st_size > most:
            raise ValueError("too large")
        document = json.loads(path.read_text("utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise TrspError(f"{name}: {file} cannot be read as JSON.", "Download or save the model again.") from error
    return document


def _inside(path: Path, inside: Path) -> Path:
    """The file that `path` leads to; raises TrspError if it is not in `inside`."""
    real = path.resolve()
    if not real.is_relative_to(inside):
        raise TrspError(f"{path.name} is a link out of the model's folder.", "Put the file itself into the folder.")
    return real


def shards(folder: Path, inside: Path, name: str) -> list[str]:
    """The names of the weight files in `folder`, once it is known that all of them are there.

    Args:
        inside: the folder that files, if they are links, may lead into.
        name: the model's, for messages.

    Raises:
        TrspError: there are none, some are missing, or they are pickled.
    """
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickled:
            raise TrspError(
                f"{name} has its weights only as pickled files ({pickled[0]}), which can run code when opened.",
                "Convert them to safetensors: load them where you trust them, and save_pretrained.",
            )
        raise TrspError(f"{name} has no weights: no model.safetensors.", "Save it again, or choose one that has them.")
    weights = _json(folder, index.name, inside, name).get("weight_map")
    files = sorted({str(file) for file in weights.values()} if isinstance(weights, dict) else ())
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors") or len(file.encode()) > LONGEST_NAME:
            raise TrspError(f"{index.name} names {str(file)[:60]!r}, no file of this folder.", "Save the model again.")
        if not (folder / file).is_file():
            raise TrspError(f"{name} is incomplete: {file} is missing.", "Download the model again.")
    if not files:
        raise TrspError(f"{index.name} names no weight files.", "Download or save the model again.")
    return files


def _architecture(config: dict[str, Any], name: str) -> str:
    """The architecture that the config names, or if none that of its model type. Raises TrspError where it cannot be a
    decoder-only language model with ordinary weights."""
    remedy = "Choose a decoder-only language model: its architecture ends in ForCausalLM."
    if config.get("is_encoder_decoder") is True:
        raise TrspError(f"{name} is an encoder-decoder model, which has no single stack of layers.", remedy)
    names = config.get("architectures") or [architectures.native().get(str(config.get("model_type")), "")]
    architecture = names[0] if isinstance(names, list) else ""
    if not isinstance(architecture, str) or not architecture:
        raise TrspError(f"{name}: config.json names no architecture.", remedy)
    if not re.search(r"(CausalLM|LMHeadModel|ForConditionalGeneration)$", architecture):
        raise TrspError(f"{name} is a {architecture[:60]}, which does not predict the next token.", remedy)
    if config.get("quantization_config"):
        raise TrspError(
            f"{name} is stored in a quantized form, whose weights cannot be trained.",
            "Choose the same model with ordinary weights (float32, float16 or bfloat16).",
        )
    return architecture


def _refuse_absurd(config: dict[str, Any], name: str) -> None:
    """Raise TrspError if the config, or a part of it, gives a size that no model has: a model of that size would be
    built before loading fails."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            most = MAX_COUNT if _COUNT.fullmatch(key) else MAX_SIZE
            least = 0 if _COUNT.fullmatch(key) or _SIZE.fullmatch(key) else -MAX_SIZE
            if not least <= value <= most:
                raise TrspError(
                    f"{name}: config.json gives {str(value)[:40]} for {key[:60]}, at most "
                    f"{formatting.count(most)} is believed.",
                    "Check config.json, or choose another model.",
                )


def _sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    """L, D, V, longest context and model type from the config, as arguments of `Facts`; where the config has several
    parts, the sizes are those of its text part. Raises TrspError if one is missing or absurd."""
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config

    def number(what: str, most: int, *keys: str, listed: str = "") -> int:
        value = next((text[key] for key in keys if text.get(key) is not None), None)
        if value is None and isinstance(text.get(listed), list):
            value = len(text[listed])
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise TrspError(
                f"{name}: config.json gives {str(value)[:40]} as its {what}, expected 1 to {formatting.count(most)}.",
                "Check config.json, or choose another model.",
            )
        return value

    return {
        "model_type": str(config.get("model_type", ""))[:60],
        "n_layers": number("number of layers", MAX_LAYERS, *DEPTHS, listed="layers_block_type"),
        "width": number("width", MAX_WIDTH, "hidden_size", "n_embd", "d_model"),
        "vocabulary": number("vocabulary", MAX_VOCABULARY, "vocab_size"),
        "max_length": families.context(text),
    }


def _layers(shapes: dict[str, tuple[int, ...]], n_layers: int, name: str) -> tuple[int, ...]:
    """How many parameters each layer has, by the names of the tensors. The layers are a group of tensors whose names
    have numbers at the same place: one with the numbers 0 to L - 1, of several the largest; vision towers do not count.

    Raises:
        TrspError: no group has these numbers.
    """
    groups: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for tensor, shape in shapes.items():
        match = _LAYER_NAME.match(tensor)
        if match and "vision" not in match[1] and len(match[2]) <= 6:
            groups[match[1]][int(match[2])] += math.prod(shape)

    def is_whole(group: dict[int, int]) -> bool:
        return sorted(group) == list(range(n_layers))

    stack = max(groups.values(), key=lambda group: (is_whole(group), sum(group.values())), default={})
    if not is_whole(stack):
        raise TrspError(
            f"{name}: config.json speaks of {n_layers} layers, the weights hold {len(stack)}.",
            "Check that config.json and the weights belong together.",
        )
    return tuple(stack[i] for i in range(n_layers))


BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.516, "int8": 1.0}  # of a number, with its share of the scales


def weight_bytes(facts: Facts, precision: str, compute: str = "float32") -> int:
    """How many bytes the weights take in memory.

    Args:
        precision: a key of `BYTES`. Packed precisions hold for the layers only.
        compute: with a packed precision, the number format of everything else.
    """
    if precision not in PACKED:
        return int(facts.parameters * BYTES[precision])
    layers = sum(facts.layer_parameters)
    return int(layers * BYTES[precision] + (facts.parameters - layers) * BYTES[compute])


def refuse_family(facts: Facts) -> None:
    """Raise TrspError if models of this family cannot be pruned by whole layers."""
    family = families.of(facts.model_type)
    if family.refused:
        raise TrspError(f"{family.name} cannot be pruned by whole layers: {family.refused}.", "Choose another model.")
