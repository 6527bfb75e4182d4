"""A comparison of models on one prompt: folded from the workbench's answers, live or kept with a run. No torch.

A kept one is `comparisons/ID.json` in the run folder: the request and the answers as they came.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trsp_core import escaping, formatting
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs.store import Run
from trsp_core.schema import codec, messages
from trsp_core.schema.messages import Answer, Generate

MOST_KEPT = 100  # in one run folder
REPEATS = 0.3  # from this repetition on a text is said to repeat itself: 19 of 20 articles of 220 words stay below
LONG_WORD = 5  # letters from which on a word counts as said before wherever it stood
UNLIKELY = 100.0  # from this perplexity under the first model on a text is said to read like gibberish
_ID = re.compile(r"[0-9a-f]{12}")
_WORD = re.compile(r"\w+")


@dataclass
class Column:
    """One model's text so far.

    Attributes:
        tokens, pieces: its tokens and the text that each completes; `seconds` when each came.
        finished: its figures, once it is complete.
        chat: whether its prompt stood in a chat template.
    """

    label: str
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    finished: messages.ColumnFinished | None = None
    prompt_tokens: int = 0
    chat: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def rate(self) -> float | None:
        """Tokens per second: of its own computing once it is complete, else by the clock."""
        if self.finished:
            return self.finished.decode or None
        spent = self.seconds[-1] - self.seconds[0] if len(self.seconds) > 1 else 0.0
        return (len(self.seconds) - 1) / spent if spent else None


@dataclass
class Comparison:
    """What has been answered to `request`. `traces` are by (number of the text, number of the reader)."""

    request: Generate
    columns: list[Column]
    traces: dict[tuple[int, int], messages.TextTraced] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """Whether a chat template was around the prompt of any column."""
        return any(column.chat for column in self.columns)

    def parting(self, column: int) -> int | None:
        """Index of the first token at which `column` differs from the first column; None while they agree."""
        return first_difference(self.columns[0].tokens, self.columns[column].tokens)

    def verdict(self, column: int) -> str:
        """What is wrong with a text, in words; "" where nothing is."""
        finished, trace = self.columns[column].finished, self.traces.get((column, 0))
        faults = []
        again = repetition(self.columns[column].text)
        if finished and again >= REPEATS:
            faults.append(f"repeats itself: {formatting.percent(again)} of its words had been said before")
        if trace and column and math.exp(min(trace.nats, 700)) >= UNLIKELY:
            perplexity = math.exp(min(trace.nats, 700))
            faults.append(f"reads like gibberish: perplexity {formatting.count(perplexity)} to {self.columns[0].label}")
        return "; ".join(faults)


def repetition(text: str) -> float:
    """Share of the words of `text` that had been said before, 0 to 1. A word of at least `LONG_WORD` letters counts if
    it stood anywhere before; a shorter one, which any text uses again, only if it stood after the same word before."""
    words = [word.casefold() for word in _WORD.findall(text)]
    said, pairs, again = set(), set(), 0
    for pair in zip(["", *words], words, strict=False):
        again += pair in pairs or (len(pair[1]) >= LONG_WORD and pair[1] in said)
        pairs.add(pair)
        said.add(pair[1])
    return again / len(words) if words else 0.0


def gather(request: Generate, answers: Sequence[Answer]) -> Comparison:
    """The comparison that `answers` tell so far."""
    columns = [Column(variant.label or f"Model {n + 1}") for n, variant in enumerate(request.columns)]
    comparison = Comparison(request, columns)
    for answer in answers:
        match answer:
            case messages.PromptRead():
                columns[answer.column].prompt_tokens = answer.tokens
                columns[answer.column].chat = answer.chat
            case messages.TokenGenerated():
                column = columns[answer.column]
                column.tokens.append(answer.token)
                column.pieces.append(answer.piece)
                column.seconds.append(answer.seconds)
            case messages.ColumnFinished():
                columns[answer.column].finished = answer
            case messages.TextTraced():
                comparison.traces[answer.text, answer.column] = answer
    return comparison


def until(answers: Sequence[Answer], seconds: float) -> list[Answer]:
    """Of complete `answers`, those that had come `seconds` after the request was begun; what follows the last token
    comes with it."""
    tokens = [answer for answer in answers if isinstance(answer, messages.TokenGenerated)]
    if not tokens or tokens[-1].seconds <= seconds:
        return list(answers)
    early = [answer for answer in tokens if answer.seconds <= seconds]
    return [*(answer for answer in answers if isinstance(answer, messages.PromptRead)), *early]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """First index at which two texts differ, as far as both go; None where there is none."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def keep(run: Run, request: Generate, answers: Sequence[Answer]) -> str:
    """Store the comparison with `run`; returns its id.

    Raises:
        TrspError: there are many already, or the folder cannot be written.
    """
    folder = run.folder / "comparisons"
    if len(comparisons(run)) >= MOST_KEPT:
        raise TrspError(f"This run keeps {MOST_KEPT} comparisons already.", "Delete files in its comparisons folder.")
    lines = [messages.to_values("", record) for record in (request, *answers)]
    name = secrets.token_hex(6)
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{name}.json", codec.encode(lines))
    except OSError as error:
        raise TrspError(f"The comparison could not be kept: {error.strerror}.", "Free some space.") from error
    return name


def comparisons(run: Run) -> list[str]:
    """Ids of the comparisons kept with `run`, newest first."""
    files = [p for p in (run.folder / "comparisons").glob("*.json") if _ID.fullmatch(p.stem) and p.is_file()]
    return [p.stem for p in sorted(files, key=lambda p: (-p.stat().st_mtime, p.stem))]


def read(run: Run, name: str) -> tuple[Generate, list[Answer]]:
    """The request and answers of the comparison `name`.

    Raises:
        TrspError: there is none, or its file is damaged.
    """
    gone = TrspError(f"There is no comparison {name[:40]!r} with this run.", "Write a new one.")
    if not _ID.fullmatch(name):
        raise gone
    try:
        text = (run.folder / "comparisons" / f"{name}.json").read_text("utf-8")
        records = [messages.from_values(codec.build(dict, values))[1] for values in codec.decode(text, list)]
    except (OSError, ValueError) as error:
        raise gone from error
    if not records or not isinstance(records[0], Generate):
        raise gone
    request, answers = records[0], [r for r in records[1:] if isinstance(r, Answer)]
    messages.check(request)
    if not all(_belongs(answer, len(request.columns)) for answer in answers):
        raise gone
    return request, answers


def _without_nan(value: Any) -> bool:
    """Whether every number in `value` is one."""
    return all(map(_without_nan, value)) if isinstance(value, list) else value == value


def _belongs(answer: Answer, columns: int) -> bool:
    """Whether `answer` speaks of columns that there are, of each token in the same way, in numbers."""
    if not all(map(_without_nan, vars(answer).values())):
        return False
    if not 0 <= getattr(answer, "column", 0) < columns:
        return False
    if not isinstance(answer, messages.TextTraced):
        return True
    of_each = (answer.pieces, answer.probabilities, answer.alternatives, answer.alternative_probabilities, answer.kl)
    pairs = zip(answer.alternatives, answer.alternative_probabilities, strict=False)
    return (
        0 <= answer.text < columns
        and all(len(entries) == len(answer.tokens) for entries in of_each)
        and all(len(words) == len(chances) for words, chances in pairs)
    )


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, to paste elsewhere."""
    ask = comparison.request
    how = (
        f"temperature {formatting.setting(ask.temperature)}, top-p {formatting.setting(ask.top_p)}, seed {ask.seed}"
        if ask.temperature
        else "greedy"
    )
    template = ", in the chat template" if comparison.chat else ""
    parts = [f"**Prompt** ({how}{template}, at most {ask.new_tokens} tokens)", escaping.fenced(ask.prompt, "text")]
    for n, column in enumerate(comparison.columns):
        facts = [f"{len(column.tokens)} tokens"]
        if column.rate:
            facts.append(f"{formatting.rate(column.rate)} tokens/s")
        if n and (position := comparison.parting(n)) is not None:
            facts.append(f"parts from {comparison.columns[0].label} at token {position + 1}")
        if words := comparison.verdict(n):
            facts.append(words)
        parts += [f"**{escaping.markdown(column.label)}** ({escaping.markdown('; '.join(facts))})"]
        parts += [escaping.fenced(column.text, "text")]
    return "\n\n".join(parts) + "\n"
