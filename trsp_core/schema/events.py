"""The events of a run, in the past tense: frozen values, each one line of `events.jsonl`.

A line is `{"n": 12, "at": 3.41, "event": "LayerChosen", ...fields, "crc": "5f0c81d2"}`: `n` counts from 0, `at` is
seconds since the run began, `crc` is the CRC-32 of what stands before it (older runs have none). Fields marked volatile
are measured times or memory; all others are equal for equal seed and machine.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

from trsp_core.errors import TrspError
from trsp_core.schema import codec

# dense; layers deleted at once; repaired, not yet trained; after stage 2, all layers; deleted
STATES = ("dense", "direct", "repaired", "trained", "pruned")
DOMAINS = ("calibration", "heldout")


def _volatile() -> Any:
    return field(metadata={"volatile": True})


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class RunPlanned(Event):
    """The phases to come, each `{"name", "seconds"}`, with the forecast's seconds; memory in bytes."""

    phases: list[dict[str, Any]] = _volatile()
    peak_bytes: int = _volatile()


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase of the run began; `units` is what its `Progressed` events count up to, 0 if it is not counted."""

    name: str
    units: int = 0


@dataclass(frozen=True)
class Progressed(Event):
    """`done` of the phase's units are done."""

    done: int


@dataclass(frozen=True)
class ModelLoaded(Event):
    """L, D, V and sizes of the dense model. `layer_parameters` has L entries; `bytes` counts the weights."""

    model: str
    architecture: str
    n_layers: int
    width: int
    vocabulary: int
    parameters: int
    layer_parameters: list[int]
    bytes: int
    dtype: str
    device: str


@dataclass(frozen=True)
class TextPrepared(Event):
    """Blocks cut from one text for one role: `calibration` (trained on) or `measure` (only measured)."""

    domain: str
    role: str
    text: str
    articles: int
    blocks: int
    block_length: int
    tokens: int
    fingerprint: str


@dataclass(frozen=True)
class PerplexityMeasured(Event):
    """exp of the mean loss per token, with its protocol. `losses` are mean nats per token of each block."""

    state: str
    domain: str
    perplexity: float
    losses: list[float]
    text: str
    blocks: int
    block_length: int
    tokens: int
    dtype: str


@dataclass(frozen=True)
class DivergenceMeasured(Event):
    """Mean KL from the dense model's predictions to this state's, in nats a token, on the first of the measured
    blocks; `divergences` are those of each block."""

    state: str
    domain: str
    kl: float
    divergences: list[float]
    blocks: int
    tokens: int


@dataclass(frozen=True)
class SpeedMeasured(Event):
    """Tokens per second, medians with [lowest, highest] of the repeats; peak is the process's memory in bytes so
    far."""

    state: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill: float = _volatile()
    prefill_range: list[float] = _volatile()
    decode: float = _volatile()
    decode_range: list[float] = _volatile()


@dataclass(frozen=True)
class ImportanceMeasured(Event):
    """How much the loss rises when a layer alone is left out, in nats a token: L values, each with all others there."""

    state: str
    rises: list[float]
    loss: float
    text: str
    blocks: int
    tokens: int


@dataclass(frozen=True)
class TextGenerated(Event):
    """A greedy continuation of the sample prompt."""

    state: str
    prompt: str
    text: str


@dataclass(frozen=True)
class StageOneStepped(Event):
    """One step of stage 1. `weights` are the L layer weights s after it; `l1` is the sum of |s| over candidates."""

    step: int
    round: int
    lm_loss: float
    l1: float
    weights: list[float]


@dataclass(frozen=True)
class LayerChosen(Event):
    """One layer moved into P. `margin` is the runner-up's score minus the winner's; None where nothing was scored."""

    round: int
    layer: int
    score: float | None = None
    runner_up: int | None = None
    margin: float | None = None


@dataclass(frozen=True)
class LayersScored(Event):
    """A method's score for each of the L layers; lower goes first. None for a protected layer."""

    method: str
    scores: list[float | None]


@dataclass(frozen=True)
class LayersChosen(Event):
    """P is complete, in order of choice."""

    method: str
    layers: list[int]


@dataclass(frozen=True)
class StageTwoStepped(Event):
    """One step of stage 2. `gaps` are the relative gaps of the chosen layers (mean over tokens of
    |X_out - X_in| / |X_in|), in the order of `LayersChosen`; `penalty` is the sum of R before lambda_2, which is
    0 where it does not act: behind a gate that is shut, and after deletion."""

    step: int
    lm_loss: float
    penalty: float
    lambda_2: float
    learning_rate: float
    gaps: list[float]


@dataclass(frozen=True)
class RepairPlanned(Event):
    """The repair goes through these kept layers, in this order. Older runs have no such event."""

    layers: list[int]


@dataclass(frozen=True)
class LayerRefitted(Event):
    """A kept layer was solved to hand on what the dense model had there. `before` and `after`: how far its output lies
    from that state in the pruned model, the mean over calibration tokens of |T - x| / |T|."""

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class DeletionProbed(Event):
    """Perplexity on the probe's sample of a domain if the chosen layers were deleted now; step 0 is before the first
    step. `losses` are the mean nats a token of each of its blocks."""

    step: int
    perplexity: float
    blocks: int
    tokens: int
    domain: str = "calibration"
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RepairProbed(Event):
    """Perplexity on the probe's sample of a domain if the repair stopped now: without the chosen layers, and with
    the first `layers` of its layers as it left them. `losses` are the mean nats a token of each of its blocks."""

    layers: int
    perplexity: float
    blocks: int
    tokens: int
    domain: str
    losses: list[float]


@dataclass(frozen=True)
class LayersRemoved(Event):
    """The layers are gone. Parameters and bytes of the whole model."""

    removed: list[int]
    kept: list[int]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int


@dataclass(frozen=True)
class LayersNarrowed(Event):
    """No layer goes, all of them got narrower: counts in each layer, `[before, after]`. `parameters` of the whole
    model, of which `aim` is what deleting K layers of mean size would leave."""

    layers: int
    heads: list[int]
    key_value_heads: list[int]
    channels: list[int]
    aim: int
    parameters: int

    @property
    def sentence(self) -> str:
        counts = {"heads": self.heads, "key-value heads": self.key_value_heads, "channels": self.channels}
        parts = [f"{pair[-1]} of {pair[0]} {what}" for what, pair in counts.items() if pair]  # a damaged line has none
        return "in each layer " + ", ".join(parts)


@dataclass(frozen=True)
class ModelSaved(Event):
    """What was to be kept is in the run folder: the pruned model in `model/`, the one before deletion in
    `trained-model/`; `bytes` of both."""

    bytes: int


@dataclass(frozen=True)
class Noted(Event):
    """A plain sentence that the reader should see: something was done differently, and why."""

    message: str


@dataclass(frozen=True)
class KnobTurned(Event):
    """A person turned a knob while the run went on, after `step` of `stage` (0 before its first step): the next step
    takes it. `name` is a setting's, or "pause" (`after` is 1 for paused, 0 for gone on). `request` is the line of
    steer.jsonl, from 1, that asked for it; 0 where none did."""

    stage: int
    step: int
    name: str
    before: float
    after: float
    request: int = 0


@dataclass(frozen=True)
class Resumed(Event):
    """A run that broke off goes on at the event numbered `place`: those from there up to this one are overtaken and do
    not count any more, but stay in the file."""

    place: int


@dataclass(frozen=True)
class RunFinished(Event):
    """The end of a run that did all it was asked to."""

    peak_bytes: int = _volatile()


@dataclass(frozen=True)
class RunCancelled(Event):
    """The end of a run that was stopped; `reason` is a sentence where it was not a person who stopped it."""

    phase: str
    reason: str = ""


@dataclass(frozen=True)
class RunFailed(Event):
    """The end of a run that could not go on. `trace` is empty for an error that a person can mend."""

    message: str
    remedy: str
    trace: str


KINDS: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}
ENDINGS = (RunFinished, RunCancelled, RunFailed)


@dataclass(frozen=True)
class EventsMissing(Event):
    """`count` events from the one numbered `first` on cannot be read: their lines are damaged or gone. No run tells
    this, and it stands in no file: whoever reads one finds it."""

    first: int
    count: int

    @property
    def sentence(self) -> str:
        which = f"Event {self.first}" if self.count == 1 else f"Events {self.first} to {self.first + self.count - 1}"
        return f"{which} of the record cannot be read, and what stood there is missing here: the file is damaged."


_SUM = ', "crc": "'  # before the eight digits and `"}` that end a line


@dataclass(frozen=True)
class _EventHead:
    """What a line says besides the fields of its event."""

    n: int
    at: float
    event: str


def to_line(event: Event, n: int, at: float) -> str:
    """One JSON line, without the newline."""
    head, fields = codec.encode(_EventHead(n, round(at, 3), type(event).__name__))[:-1], codec.encode(event)[1:-1]
    body = f"{head}, {fields}" if fields else head
    return f'{body}{_SUM}{zlib.crc32(body.encode()):08x}"}}'


def from_line(line: str) -> tuple[int, float, Event]:
    """`(n, at, event)` of one line.

    Raises:
        TrspError: no JSON, an unknown event, fields that do not fit, or another checksum than its own.
    """
    try:
        fields = codec.decode(line, dict)
        body, mark, rest = line.rpartition(_SUM)
        if "crc" in fields and (not mark or rest != f'{zlib.crc32(body.encode()):08x}"}}'):
            raise ValueError("another checksum than its own")
        fields.pop("crc", None)
        head = codec.build(_EventHead, {name: fields.pop(name, None) for name in ("n", "at", "event")})
        if head.event not in KINDS or math.isnan(head.at):
            raise ValueError("an unknown event, or no time")
        return head.n, head.at, codec.build(KINDS[head.event], fields)
    except ValueError as error:
        raise TrspError(f"This is no event: {line[:80]!r}.", "The line is left out.") from error


def stable(event: Event) -> dict[str, Any]:
    """The fields that are equal in two runs of equal seed on one machine."""
    fields = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if not f.metadata.get("volatile")}
    return {"event": type(event).__name__, **fields}
