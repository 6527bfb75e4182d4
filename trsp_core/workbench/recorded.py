"""What ships measured: the figures of the default model without each layer alone, so that a first what-if is answered
at once on a fresh install. No torch.

The record is `assets/what_if.json`, made by `python -m benchmarks.recording what-if`. It answers only where model and
texts are the recorded ones, by their fingerprints; a model that is not on this machine yet is taken for the recorded
one, since the catalogue has one model of this name.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trsp_core import paths
from trsp_core.data import corpora
from trsp_core.errors import TrspError
from trsp_core.models import catalog
from trsp_core.schema import codec, messages
from trsp_core.schema.messages import Answer, Influence, Request, WhatIf

FILE = paths.ASSETS / "what_if.json"
SCHEMA = 1
PROBES, PROBE_BYTES = 64, 4096  # stretches of a weight file that its fingerprint reads, and their length


@dataclass(frozen=True)
class RecordedSet:
    """A set of removed layers: its figures, and how the model without them continues the record's prompt."""

    measured: messages.SetMeasured
    sample: str


@dataclass(frozen=True)
class LayerRecord:
    """The figures of one model on one pair of texts.

    Attributes:
        model_fingerprint: of its files, as `model_fingerprint` gives it.
        text, heldout, seed: as in `WhatIf`.
        text_fingerprints: of the files that both texts come from, by domain.
        block_fingerprints: of the measured token blocks, by domain.
        parameters, layer_parameters: of the whole model, and of each of its L layers.
        prompt, sample_tokens: as in `WhatIf`.
        influence: block influence of each layer.
        made_with: version of torch.
    """

    model: str
    model_fingerprint: str
    text: str
    heldout: str
    seed: int
    text_fingerprints: dict[str, str]
    block_fingerprints: dict[str, str]
    parameters: int
    layer_parameters: list[int]
    prompt: str
    sample_tokens: int
    sets: list[RecordedSet]
    influence: list[float]
    made_with: str

    def set_of(self, removed: Sequence[int]) -> RecordedSet | None:
        """The recorded set of these layers; None where it was not recorded."""
        wanted = sorted(removed)
        return next((entry for entry in self.sets if entry.measured.removed == wanted), None)

    def covers(self, model: str, text: str, heldout: str, seed: int) -> bool:
        """Whether a question about this model and these texts, by their names, is one that the record may answer."""
        return (model, text, heldout, seed) == (self.model, self.text, self.heldout, self.seed)


@functools.lru_cache(maxsize=4)
def read(file: Path = FILE) -> LayerRecord:
    """The record in `file`.

    Raises:
        TrspError: it is missing or damaged.
    """
    try:
        return codec.decode_document(file.read_text("utf-8"), SCHEMA, LayerRecord)
    except (OSError, ValueError) as error:
        raise TrspError(f"{file.name} cannot be read.", "Install the program again.") from error


def answers(request: Request, file: Path = FILE) -> tuple[list[Answer], Request | None]:
    """What the record in `file` answers to `request`, and what is left to ask: the request itself where the record says
    nothing of it, None where it says all."""
    if not isinstance(request, WhatIf | Influence):
        return [], request
    record, model = read(file), request.model if isinstance(request, WhatIf) else request.model.model
    if not record.covers(model, request.text, request.heldout, request.seed) or not holds(record):
        return [], request
    if isinstance(request, Influence):
        if request.model.removed:
            return [], request
        return [messages.LayerRated(layer, value) for layer, value in enumerate(record.influence)], None
    entry = record.set_of(request.removed)
    if entry is None or not request.figures:
        return [], request
    if not request.sample_tokens:
        return [entry.measured], None
    if (request.prompt, request.sample_tokens) != (record.prompt, record.sample_tokens):
        return [entry.measured], replace(request, figures=False)
    return [entry.measured, messages.TokenGenerated(0, -1, entry.sample, 0.0)], None


def holds(record: LayerRecord) -> bool:
    """Whether model and texts on this machine are those of `record`."""
    texts = {"calibration": record.text, "heldout": record.heldout}
    if any(corpora.fingerprint(text) != record.text_fingerprints.get(domain) for domain, text in texts.items()):
        return False
    try:
        folder = catalog.locate(record.model)
    except TrspError:
        return True  # not here yet
    return model_fingerprint(folder) == record.model_fingerprint


def model_fingerprint(folder: Path) -> str:
    """16 hex digits that tell whether two folders hold the same model: the SHA-256 of the sizes of its weight files and
    of `PROBES` stretches of each, evenly spread, the first of which is its header. "" where they cannot be read."""
    try:
        files = sorted(folder.glob("*.safetensors"))
        marks = [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
        return _fingerprint(tuple(marks))
    except OSError:
        return ""


@functools.lru_cache(maxsize=16)
def _fingerprint(marks: tuple[tuple[str, int, int], ...]) -> str:
    """The fingerprint of the files of these paths, sizes and times of change."""
    digest = hashlib.sha256()
    for path, size, _ in marks:
        digest.update(f"{Path(path).name} {size};".encode())
        with Path(path).open("rb") as file:
            for n in range(PROBES):
                file.seek(max(size - PROBE_BYTES, 0) * n // (PROBES - 1))
                digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()[:16]
