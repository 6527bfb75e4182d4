"""What may be asked of the workbench, and what it answers: frozen values, each one JSON line on its pipes. No torch.

A request is answered by any number of answers and exactly one ending: `Answered`, `Stopped`, `Refused` or `Broken`.
All limits of interactive work stand here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trsp_core import formatting
from trsp_core.errors import Problem, TrspError, refuse
from trsp_core.schema import codec

MAX_PROMPT = 8_000  # characters
MAX_NEW_TOKENS = 256  # a column
MAX_COLUMNS = 3
MAX_LAYERS = 2_000
MAX_TEXT = 20_000  # characters of a text to read along
QUICK_TOKENS = 256  # of each domain in a what-if, so 512 in all
ALTERNATIVES = 5  # likeliest tokens told beside the one that stands there
SAMPLE_TOKENS = 48  # most of a what-if's sample


@dataclass(frozen=True)
class Variant:
    """One model to look at.

    Attributes:
        model: as in `models.locate`: a catalogue name, a hub id, or a folder, such as a run's `model/`.
        removed: layers to leave out of it.
        base, kept: the model that it was made of and the layers it kept, where known: equal tensors are then held once.
        label: for people.
    """

    model: str
    removed: list[int] = field(default_factory=list)
    base: str = ""
    kept: list[int] = field(default_factory=list)
    label: str = ""


class Request:
    """Base of all requests."""


@dataclass(frozen=True)
class Generate(Request):
    """Continue `prompt` with up to three models at once, a token of each in turn; then read each text with all models.

    Attributes:
        columns: the first one is what the others are compared with.
        chat: put the prompt into the model's chat template, where it has one.
        temperature: 0 takes the likeliest token.
        trace: read along afterwards: one `TextTraced` for each text and model.
    """

    columns: list[Variant]
    prompt: str
    chat: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    new_tokens: int = 64
    trace: bool = True


@dataclass(frozen=True)
class Trace(Request):
    """Read `text` after `prompt` with each of `columns`: what each would have said at every token."""

    columns: list[Variant]
    prompt: str
    text: str
    chat: bool = False


@dataclass(frozen=True)
class WhatIf(Request):
    """Measure `model` without `removed`, on `QUICK_TOKENS` tokens of each domain, then continue `prompt`.

    Attributes:
        text, heldout, seed: which texts, and how they are split: as in `RunConfig`.
        sample_tokens: 0 for no sample.
        figures: False where the set's figures are known, and the sample alone is wanted.
    """

    model: str
    removed: list[int]
    text: str = "wikipedia"
    heldout: str = "news"
    seed: int = 0
    prompt: str = "The history of the city begins"
    sample_tokens: int = 24
    figures: bool = True


@dataclass(frozen=True)
class Importance(Request):
    """The rise of the loss when each layer of the model alone is left out, one `LayerRated` each."""

    model: Variant
    text: str = "wikipedia"
    heldout: str = "news"
    seed: int = 0


@dataclass(frozen=True)
class Influence(Request):
    """Block influence of each layer: 1 - mean cosine of X_in and X_out (ShortGPT, arXiv:2403.03853)."""

    model: Variant
    text: str = "wikipedia"
    heldout: str = "news"
    seed: int = 0


@dataclass(frozen=True)
class Prepare(Request):
    """Load `model` before anybody asks for something of it.

    Attributes:
        text, heldout, seed: as in `WhatIf`: the dense model is measured on these texts too; with "" it is only loaded.
    """

    model: str
    text: str = ""
    heldout: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Cancel(Request):
    """Stop the request of the same ticket. It has no answer of its own."""


class Answer:
    """Base of all answers."""


@dataclass(frozen=True)
class ModelReady(Answer):
    """A model is in memory. `shared` of its `bytes` are tensors of a model that was there before."""

    model: str
    n_layers: int
    parameters: int
    bytes: int
    shared: int
    seconds: float


@dataclass(frozen=True)
class PromptRead(Answer):
    """The prompt as tokens of column `column`, with the chat template where it was asked for and exists."""

    column: int
    tokens: int
    chat: bool


@dataclass(frozen=True)
class TokenGenerated(Answer):
    """One more token. `piece` is the text that it completes, which may be empty in the middle of a letter; `seconds`
    since the request was begun."""

    column: int
    token: int
    piece: str
    seconds: float


@dataclass(frozen=True)
class ColumnFinished(Answer):
    """A column's text is complete, by its end token (`end`) or by its length (`length`). `prefill` and `decode` are
    tokens per second of its own computing time. `repetition` stands in comparisons that older versions kept: the share
    of four-token runs that occurred before."""

    column: int
    tokens: int
    reason: str
    prefill: float
    decode: float
    repetition: float = 0.0


@dataclass(frozen=True)
class TextTraced(Answer):
    """The text of column `text` read by the model of column `column`; every list has one entry for each token.

    Attributes:
        pieces: the tokens as text.
        probabilities: of the token that stands there.
        alternatives, alternative_probabilities: the likeliest tokens at its position.
        kl: KL divergence from the first column's model to this one, in nats.
        nats: mean of -log of the probabilities.
    """

    text: int
    column: int
    tokens: list[int]
    pieces: list[str]
    probabilities: list[float]
    alternatives: list[list[str]]
    alternative_probabilities: list[list[float]]
    kl: list[float]
    nats: float


@dataclass(frozen=True)
class SetMeasured(Answer):
    """What a set of removed layers costs: perplexity and KL (nats a token) by domain, over `tokens` tokens of each.

    Attributes:
        dense: perplexity of the whole model, by domain.
        ceiling: L / (L - K), the most that it can speed up.
        layers_run: layers computed for this answer; the others' results were kept from before.
        cached: the set had been measured already.
        recorded: the figures come from the record that ships with the app, not from this machine.
    """

    removed: list[int]
    n_layers: int
    perplexity: dict[str, float]
    dense: dict[str, float]
    kl: dict[str, float]
    tokens: int
    parameters: int
    parameters_dense: int
    ceiling: float
    layers_run: int
    cached: bool
    seconds: float
    recorded: bool = False


@dataclass(frozen=True)
class LayerRated(Answer):
    """One figure of one layer: its importance (nats) or its influence (0 to 2)."""

    layer: int
    value: float


@dataclass(frozen=True)
class Answered(Answer):
    """The request is answered."""

    seconds: float


@dataclass(frozen=True)
class Stopped(Answer):
    """The request was stopped: by whoever asked, or because the workbench closed."""


@dataclass(frozen=True)
class Refused(Answer):
    """The request cannot be answered, and why; a person can mend it."""

    message: str
    remedy: str


@dataclass(frozen=True)
class Broken(Answer):
    """The workbench failed. `trace` is empty where its process died."""

    message: str
    remedy: str
    trace: str = ""


REQUESTS: dict[str, type[Request]] = {cls.__name__: cls for cls in Request.__subclasses__()}
ANSWERS: dict[str, type[Answer]] = {cls.__name__: cls for cls in Answer.__subclasses__()}
RECORDS: dict[str, type[Request] | type[Answer]] = REQUESTS | ANSWERS
ENDINGS = (Answered, Stopped, Refused, Broken)


@dataclass(frozen=True)
class _MessageHead:
    """What a line says besides the fields of its record; `ticket` is the request that it belongs to."""

    ticket: str
    kind: str


def to_values(ticket: str, record: Request | Answer) -> dict[str, Any]:
    """`record` in the types of JSON, with its ticket and its kind in front."""
    return {**codec.plain(_MessageHead(ticket, type(record).__name__)), **codec.plain(record)}


def from_values(values: dict[str, Any]) -> tuple[str, Request | Answer]:
    """`(ticket, record)`, read from what `to_values` gave.

    Raises:
        ValueError: an unknown kind, or fields that do not fit.
    """
    fields = dict(values)
    head = codec.build(_MessageHead, {name: fields.pop(name, None) for name in ("ticket", "kind")})
    if head.kind not in RECORDS:
        raise ValueError(f"an unknown kind, {head.kind[:40]!r}")
    return head.ticket, codec.build(RECORDS[head.kind], fields)


def pack(ticket: str, record: Request | Answer) -> str:
    """One JSON line, without the newline."""
    return codec.encode(to_values(ticket, record))


def unpack(line: str) -> tuple[str, Request | Answer]:
    """`(ticket, record)` of one line.

    Raises:
        TrspError: no JSON, an unknown kind, or fields that do not fit.
    """
    try:
        return from_values(codec.decode(line, dict))
    except ValueError as error:
        raise TrspError(f"This is no line of the workbench: {line[:80]!r}.", "Please report this.") from error


def check(request: Request) -> None:
    """Refuse a request that is beyond a limit; all problems at once.

    Raises:
        TrspError: with what was given, what is allowed, and what to do.
    """
    problems: list[Problem] = []

    def within(name: str, words: str, value: float, low: float, high: float, unit: str = "") -> None:
        if not low <= value <= high:  # nor is what is not a number
            limits = f"{formatting.setting(low)} to {formatting.setting(high)}{unit}"
            value_in_words = f"{formatting.setting(value)}{unit}" if abs(value) < 1e300 else "no number"
            problems.append(Problem(name, f"{words}: {value_in_words} was given, {limits} is possible.",
                                    f"Take {limits}."))  # fmt: skip

    if isinstance(request, Generate):
        within("temperature", "Temperature", request.temperature, 0.0, 5.0)
        within("top_p", "Top-p", request.top_p, 0.01, 1.0)
        within("seed", "Seed", request.seed, 0, 2**31 - 1)
        within("new_tokens", "Length", request.new_tokens, 1, MAX_NEW_TOKENS, " tokens")
    if isinstance(request, Generate | Trace):
        within("columns", "Columns", len(request.columns), 1, MAX_COLUMNS)
        models = request.columns
    else:
        models = [request.model] if isinstance(request, Importance | Influence) else []
    if any(max(len(model.removed), len(model.kept)) > MAX_LAYERS for model in models):
        problems.append(
            Problem("model", f"A model of more than {formatting.count(MAX_LAYERS)} layers.", "Choose another model.")
        )
    if isinstance(request, Trace):
        within("text", "Text", len(request.text), 1, MAX_TEXT, " characters")
    if isinstance(request, WhatIf):
        within("sample_tokens", "Sample", request.sample_tokens, 0, SAMPLE_TOKENS, " tokens")
        layers = request.removed
        if len(layers) > MAX_LAYERS or any(not 0 <= i < MAX_LAYERS for i in layers) or len(set(layers)) < len(layers):
            problems.append(Problem("removed", "A layer is named twice, or does not exist.", "Name each layer once."))
    if isinstance(request, Generate | Trace | WhatIf):
        within("prompt", "Prompt", len(request.prompt), 1, MAX_PROMPT, " characters")
        if request.prompt and not request.prompt.strip():
            problems.append(Problem("prompt", "The prompt is empty.", "Write a prompt."))
        halves = [c for c in request.prompt + getattr(request, "text", "") if "\ud800" <= c <= "\udfff"]
        if halves:
            problems.append(Problem("prompt", "Half of a letter was given, which no text can hold.", "Leave it out."))
    refuse(problems)
