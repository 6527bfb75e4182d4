"""States, times and names in words; how numbers look is in `trsp_core.formatting`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

from trsp_core import escaping, formatting
from trsp_core.schema.config import KNOBS, RunConfig

PHASES = {
    "load": "Loading the model",
    "text": "Reading the texts",
    "dense": "Measuring the dense model",
    "importance": "Weighing each layer",
    "choose": "Stage 1: learning the layer weights",
    "direct": "Measuring direct deletion",
    "repair": "Stage 2: repairing the kept layers",
    "repaired": "Measuring the repaired model",
    "transfer": "Stage 2: moving the knowledge",
    "trained": "Measuring before deletion",
    "importance after": "Weighing each layer again",
    "pruned": "Deleting and measuring",
    "speed": "Measuring the speed",
    "save": "Saving",
}

SHORT_PHASES = {
    "load": "Load",
    "text": "Read",
    "dense": "Measure",
    "importance": "Weigh",
    "choose": "Stage 1: choose",
    "direct": "Measure",
    "repair": "Stage 2: repair",
    "repaired": "Measure",
    "transfer": "Stage 2: transfer",
    "trained": "Measure",
    "importance after": "Weigh",
    "pruned": "Delete",
    "speed": "Speed",
    "save": "Save",
}

MODEL_STATES = {
    "dense": "Dense (as it came)",
    "direct": "Layers deleted at once",
    "repaired": "Repaired, not yet trained",
    "trained": "After stage 2, all layers still there",
    "pruned": "Pruned: after stage 2, layers deleted",
}

NARROWED_STATES = {
    "dense": "Dense (as it came)",
    "direct": "Narrowed, not trained",
    "pruned": "Pruned: as this run left it",
}

DOMAINS = {"calibration": "calibration domain", "heldout": "held-out domain"}

TEXTS = {"wikipedia": "Wikipedia", "news": "news stories", "wikitext2": "WikiText-2", "c4": "C4"}

STEERED = ":violet-badge[:material/tune: Steered]"  # of a run whose knobs were turned while it ran

_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:$<>&^=])")
_FLAG = re.compile(r"(?P<flag>--[a-z][a-z0-9-]*)(?P<value> (?!to\b)[\w.]*\w)?")
_KNOB_OF = {knob.flag: knob for knob in KNOBS.values()}
_KEPT_NAME = re.compile(r"\.[0-9a-f]{20}(?=\.(txt|jsonl)\b)")  # see `uploads.keep`
_JOINED = re.compile(r"(?<=:)(?=/|material|streamlit)|(?<=www)(?=\.)|(?=@)|(?<=[-<>=~])(?=[-<>=])", re.IGNORECASE)


def plain(text: str) -> str:
    """`text` in one line, so that Markdown shows it letter by letter: for what people typed and what errors quote."""
    return letters(" ".join(str(text).split()))


def lines(text: str) -> str:
    """The same with its lines and indents kept: for what models write."""
    first, *others = letters(text).replace("\t", "    ").split("\n")
    indented = ["\u00a0" * (len(line) - len(line.lstrip(" "))) + line.lstrip(" ") for line in others]
    return "  \n".join([first, *indented])


def letters(text: str) -> str:
    """Escaped for Markdown, each letter visible. Icons, addresses and arrows are looked for after a backslash has done
    its work, so a sign without width parts them."""
    return _MARKS.sub(r"\\\1", _JOINED.sub("\u2060", escaping.lines(text)))


def in_form(text: str) -> str:
    """What a check says, in the words of the form: a flag becomes the name of its control, `--learn-weights false` what
    the control shows, and a file that was brought has its own name. Escaped as `plain` does."""
    return plain(_KEPT_NAME.sub("", _FLAG.sub(_control, text)))


def _control(match: re.Match[str]) -> str:
    """The control of a flag, and the value that may follow it, in words."""
    knob = _KNOB_OF.get(match["flag"])
    if knob is None:
        return match[0]
    value = (match["value"] or "").strip()
    if value in ("true", "false"):
        return f"“{knob.label}” {'on' if value == 'true' else 'off'}"
    if value and (value in knob.choices or value.replace(".", "", 1).isdecimal()):
        return f"“{knob.label}” to {value}"
    return f"“{knob.label}”{match['value'] or ''}"


def states_of(config: RunConfig) -> dict[str, str]:
    """What the models that a run measures are called."""
    if not config.deletes_first and config.stage2_steps:
        return MODEL_STATES
    steps = f", then {config.stage2_steps} steps of training" if config.stage2_steps else ""
    repair = ", kept layers repaired" if config.transfer not in ("penalty", "none") else ""
    return MODEL_STATES | {"pruned": f"Pruned: layers deleted{repair}{steps}"}


def phase(name: str) -> str:
    return PHASES.get(name, plain(name.replace("_", " ").capitalize()))


def perplexity_or_wait(figures: Mapping[str, float], name: str, live: bool) -> str:
    """The perplexity of the model in state `name`, of `RunState.figures`. One that is missing is no bad number: while
    the run is `live` it is still to come."""
    if name in figures:
        return formatting.perplexity(figures[name])
    return "being measured" if live else "not measured"


def times(value: float) -> str:
    """A multiple: `2.41 ×`."""
    return f"{formatting.ratio(value)} ×"


def ordinal(count: int) -> str:
    """`1st`, `22nd`, `13th`."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def share(part: float, whole: float) -> str:
    """`18 %`."""
    return formatting.percent(part / whole if whole else 0.0)


def layers(numbers: list[int]) -> str:
    """`3, 13 to 18, 26`."""
    parts: list[str] = []
    ordered = sorted(numbers)
    start = 0
    for i in range(len(ordered)):
        if i + 1 < len(ordered) and ordered[i + 1] == ordered[i] + 1:
            continue
        low, high = ordered[start], ordered[i]
        parts.append(f"{low}" if low == high else f"{low}, {high}" if high == low + 1 else f"{low} to {high}")
        start = i + 1
    return ", ".join(parts) or "none"


def when(run_id: str, modified: float) -> str:
    """The time a run was asked for: from its name, or from its folder."""
    match = re.match(r"(\d{8}-\d{6})", run_id)
    try:
        moment = datetime.strptime(match[1], "%Y%m%d-%H%M%S") if match else datetime.fromtimestamp(modified)
    except ValueError:
        moment = datetime.fromtimestamp(modified)
    return moment.strftime("%d %b %Y, %H:%M")
