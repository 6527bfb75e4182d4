"""Talks to the model hub: searches, looks at a model without reading its weights, and downloads. Loads no torch.

`python -m trsp_core.models.hub` is a child process of `download`, which asks it to search, look or download. It is a
process of its own since the hub's client reads HF_ENDPOINT and HF_HOME only when it is imported, and since a child can
be ended whatever it waits for.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trsp_core import files, subprocesses
from trsp_core.errors import TrspError, disk_full, is_ours
from trsp_core.models import catalog, inspection
from trsp_core.models.catalog import HubModel, SearchResult

SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")  # wanted beside the weights; never code
READ = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")  # what `inspection` opens
START = 100_000  # bytes of a weight file that are asked for at first: nearly always its whole header
TIMEOUT = 15  # seconds without a word from the hub
MOST = 20  # models that a search finds


def search(words: str) -> list[SearchResult]:
    """At most `MOST` models of the hub for text generation that have safetensors and whose ids hold `words`, the most
    downloaded first.

    Raises:
        TrspError: the hub cannot be reached.
    """
    with _refusing(f"The search for {words!r}"):
        from huggingface_hub import HfApi

        models = HfApi().list_models(
            search=words,
            filter="safetensors",
            pipeline_tag="text-generation",
            sort="downloads",
            limit=MOST,
            expand=["downloads", "gated", "safetensors", "tags"],
        )
        return [
            SearchResult(m.id, m.safetensors.total if m.safetensors else None, _licence(m), m.downloads, bool(m.gated))
            for m in models
        ]


def look(hub_id: str) -> HubModel:
    """What the hub says of the model `hub_id`, and what its files will say once they are here: so a model that cannot
    be used is refused before its download.

    Raises:
        TrspError: the hub cannot be reached or has no such model, its terms have to be accepted first, or
            `inspection.read` or its family refuses it.
    """
    with _refusing(hub_id), tempfile.TemporaryDirectory() as scratch:
        from huggingface_hub import HfApi

        info = HfApi().model_info(hub_id, files_metadata=True, timeout=TIMEOUT)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or [] if "/" not in f.rfilename}
        outline = Path(scratch)
        weights = _draw(hub_id, info.sha, sizes, outline)
        facts = replace(inspection.read(outline, hub_id), folder=catalog.repository(hub_id))
    inspection.refuse_family(facts)
    small = [name for name in sizes if any(fnmatch(name, pattern) for pattern in SMALL)]
    whole = sum(sizes[name] for name in [*weights, *small])
    return HubModel(hub_id, _licence(info), info.downloads, bool(info.gated), weights, small, whole, facts)


def download(model: HubModel) -> None:
    """Download a model that was looked up into the hub's own cache. The weights come last, so that where all of them
    are, everything is. Files that are there already are not downloaded again, and a connection that breaks is resumed.

    Raises:
        TrspError: the hub cannot be reached, or there is no room on the disk.
    """
    needed = model.bytes - files.folder_size(catalog.repository(model.id))
    files.make_room(catalog.hub_cache(), needed, "Set HF_HOME to a folder on another disk, or free some space.")
    with _refusing(model.id):
        from huggingface_hub import snapshot_download

        for names in (model.small, model.weights):
            snapshot_download(model.id, allow_patterns=names)  # nosec B615 - the newest is asked for; read before use


def _draw(hub_id: str, revision: str | None, sizes: dict[str, int], outline: Path) -> list[str]:
    """Fill the folder `outline` with what `inspection` reads of a model. The files that it opens are there whole; a
    weight file has its header, its size and a hole for the rest; all others are empty. Returns the names of the weight
    files.

    Args:
        sizes: bytes of each file of the model, by name.
    """
    from huggingface_hub import hf_hub_url

    def write(name: str, start: int) -> bytes:
        content = _first(hf_hub_url(hub_id, name, revision=revision), start)
        (outline / name).write_bytes(content)
        return content

    def draw(name: str) -> None:
        content = write(name, START)
        length = 8 + struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
        if len(content) < length <= inspection.MAX_HEADERS:
            write(name, length)
        os.truncate(outline / name, sizes[name])

    for name in sizes:
        (outline / name).touch()
    for name in set(READ) & set(sizes):
        write(name, inspection.MAX_JSON)
    weights = inspection.shards(outline, outline.resolve(), hub_id)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(draw, weights))
    return weights


def _first(url: str, count: int) -> bytes:
    """The first `count` bytes of the file at `url`, or all of a shorter one. A hub that sends more is not read on."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
        hf_raise_for_status(answer)
        content = b""
        for part in answer.iter_bytes(65536):
            content += part
            if len(content) >= count:
                break
    return content[:count]


def _licence(info: Any) -> str | None:
    """The licence among the tags of a model; None where there is none."""
    licences = [tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")]
    return licences[0] if licences else None


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Inside, turn whatever the hub's client raises into a TrspError: it raises a dozen types, of several libraries.

    Args:
        what: what is being asked for, such as a hub id: the subject of the message.
    """
    try:
        yield
    except TrspError:
        raise
    except Exception as error:
        if is_ours(error):
            raise
        raise _refusal(what, error) from error


def _refusal(what: str, error: BaseException) -> TrspError:
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    behind, reasons = error, [error]
    while behind := behind.__cause__ or behind.__context__:
        reasons.append(behind)

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(reason, kinds) for reason in reasons)

    network = "Check the network and HF_ENDPOINT, or take a model of the catalogue or a local folder."
    if any_is(GatedRepoError):
        return TrspError(
            f"{what} is gated: its owner wants its terms accepted before the download.",
            f"Accept them on https://huggingface.co/{what}, then set HF_TOKEN to a token of your account.",
        )
    if any_is(RepositoryNotFoundError, HFValidationError):
        return TrspError(
            f"{what} could not be had from the hub: it has no such model, or a private one.",
            "Check the id; for a private model set HF_TOKEN.",
        )
    if disk_full(error):
        return TrspError(f"The disk ran full while {what} came.", "Free some space, or set HF_HOME to another disk.")
    if any_is(httpx2.TimeoutException):
        return TrspError(f"{what} could not be had from the hub: it did not answer in time.", network)
    if any_is(httpx2.ConnectError):
        return TrspError(f"{what} could not be had from the hub: it cannot be reached.", network)
    return TrspError(
        f"{what} could not be had from the hub: {type(error).__name__}: {' '.join(str(error).split())[:200]}.", network
    )


def _answer(action: str, subject: str) -> Iterator[dict[str, Any]]:
    """What the child does: yields the answer to "search", "look" or "download". A download begins after its answer,
    which is that of "look" and so tells how many bytes will come."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")  # seconds
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if action == "search":
        yield {"answer": [asdict(model) for model in search(subject)]}
        return
    model = look(subject)
    yield {"answer": asdict(model)}
    if action == "download":
        download(model)


if __name__ == "__main__":
    sys.exit(subprocesses.serve(_answer))
