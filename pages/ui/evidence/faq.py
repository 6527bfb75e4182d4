"""What a reviewer would ask of the method, each with an answer made from the recorded figures. Pure; a question whose
record is missing says how to make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from pages.ui.charts import intervals_chart, training_lengths
from pages.ui.evidence import published, sentences
from pages.ui.style import words
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results, plan_results
from trsp_core.experiments.grid_results import Point, Sweep
from trsp_core.experiments.plan_results import Record
from trsp_core.schema.events import DOMAINS


@dataclass(frozen=True)
class Evidence:
    """The records that ship with the app, by name."""

    records: Mapping[str, Record]
    sweeps: Mapping[str, Sweep]

    def row(self, plan: str, name: str):
        """A row of a record, which has to be there."""
        row = self.records[plan].row(name)
        if row is None:
            raise KeyError(name)
        return row


@lru_cache(maxsize=1)
def shipped() -> Evidence:
    """What can be read of them."""
    records, sweeps = {}, []
    for plan in ("ablation", "methods"):
        try:
            records[plan] = plan_results.load(plan_results.shipped(plan))
        except TrspError:
            continue
    for file in sorted(grid_results.shipped().glob("*.json")):
        try:
            sweeps.append(grid_results.load(file))
        except TrspError:
            continue
    return Evidence(records, grid_results.joined(sweeps))


def answers(evidence: Evidence) -> list[tuple[str, list[str]]]:
    """Every question with the sentences of its answer."""
    answers = []
    for question, answer in QUESTIONS.items():
        try:
            lines = answer(evidence)
        except (KeyError, IndexError, StopIteration):
            lines = ["The record of this is not here. The page Evidence says how to make it."]
        answers.append((question, lines))
    return answers


def _domains(evidence: Evidence) -> list[str]:
    one, other = evidence.row("ablation", "trsp"), evidence.row("ablation", "direct")
    lines = [sentences.against(evidence.records["ablation"], one, other)]
    if intervals.only_at_home(one.losses, other.losses):
        return [*lines, "So the gain is the calibration text's alone."]
    return [*lines, "Every figure here is taken in two domains: a gain in one alone would be marked as such."]


def _control(evidence: Evidence) -> list[str]:
    lines = [sentences.sentences(evidence.records["ablation"])[0]]
    if sweep := evidence.sweeps.get("length"):
        longer = training_lengths.sentence(training_lengths.duels(sweep), "heldout")
        lines.append(f"Longer, and the best way of TRSP against the best control: {longer[:1].lower()}{longer[1:]}")
    return lines


def _penalty(evidence: Evidence) -> list[str]:
    record = evidence.records["ablation"]
    return [sentences.against(record, evidence.row("ablation", "trsp"), evidence.row("ablation", "no_penalty"))]


def _greedy(evidence: Evidence) -> list[str]:
    record = evidence.records["ablation"]
    return [sentences.against(record, evidence.row("ablation", "trsp"), evidence.row("ablation", "one_shot"))]


def _rivals(evidence: Evidence) -> list[str]:
    record = evidence.records["methods"]
    trsp, lines = evidence.row("methods", "trsp"), []
    rivals = [row for row in record.rows if row.name not in ("dense", "trsp")]
    for domain in DOMAINS:
        best = min(rivals, key=lambda row: sum(row.losses[domain]))
        figures = [formatting.perplexity(intervals.perplexity(row.losses[domain]).value) for row in (trsp, best)]
        apart = sentences.change(intervals.factor(trsp.losses[domain], best.losses[domain]))
        lines.append(
            f"In the {words.DOMAINS[domain]}, deleted at once, TRSP's choice leaves {figures[0]} and the best of "
            f"the {len(rivals)} others in the record, {words.plain(best.title)}, {figures[1]}: {apart}."
        )
    return lines


def _seeds(evidence: Evidence) -> list[str]:
    sweep = evidence.sweeps["seeds"]
    fade, control = (sweep.of(arm) for arm in ("fade", "control"))
    lines = []
    for seed in sorted({p.seed for p in fade}):
        ours, theirs = ([p for p in side if p.seed == seed] for side in (fade, control))
        parts = [f"{sentences.change(_factor(ours, theirs, d))} in the {words.DOMAINS[d]}" for d in DOMAINS]
        lines.append(f"Seed {seed}: {words.plain(sweep.arms['fade'])} is {' and '.join(parts)}, beside the control.")
    return [*lines, f"{len(lines)} seeds are few; another seed draws other blocks to train and to measure on."]


def _strengths(evidence: Evidence) -> list[str]:
    path, grid = evidence.sweeps["path"], evidence.sweeps["map"]
    by_l1 = {p.at["lambda_1"]: grid_results.perplexity([p], "heldout").value for p in path.points}
    best, worst = min(by_l1, key=by_l1.__getitem__), max(by_l1, key=by_l1.__getitem__)
    spans = []
    for l1 in grid.axes["lambda_1"]:
        values = [grid_results.perplexity([p], "heldout").value for p in grid.of("trsp") if p.at["lambda_1"] == l1]
        spans.append(max(values) / min(values) - 1)
    low, high = min(grid.axes["lambda_2"]), max(grid.axes["lambda_2"])
    steps = grid.of("trsp")[0].steps
    return [
        f"λ₁: deleted at once, held-out perplexity runs from {formatting.perplexity(by_l1[best])} at λ₁ "
        f"{formatting.setting(best)} to "
        f"{formatting.perplexity(by_l1[worst])} at λ₁ {formatting.setting(worst)}.",
        f"λ₂: after {steps} steps of stage 2, held-out perplexity differs by at most "
        f"{formatting.percent(max(spans))} between λ₂ "
        f"{formatting.setting(low)} and {formatting.setting(high)} at the same λ₁.",
    ]


def _speed(evidence: Evidence) -> list[str]:
    times = intervals_chart.speeds(evidence.records["ablation"])
    ceiling = times["ceiling"].iloc[0]
    lines = [
        f"{what}: {formatting.ratio(factor)} times as fast as the dense model "
        f"{formatting.ends(low, high, formatting.ratio)}, of at most {formatting.ratio(ceiling)} times."
        for what, factor, low, high in zip(*(times[name] for name in ("what", "times", "low", "high")), strict=True)
    ]
    if (times["times"] > ceiling).any():
        lines.append("A figure above its ceiling is the measurement's noise; brackets are the spread of the repeats.")
    return lines


def _published(evidence: Evidence) -> list[str]:
    rows = published.table()
    theirs = rows[(rows["Model"] == "LLaMA2-7B") & rows["Method"].str.startswith("TRSP")]
    by = dict(zip(theirs["Method"], theirs["Perplexity, WikiText-2"], strict=True))
    whole = by.pop("TRSP")
    record = evidence.records["ablation"]
    lines = []
    for method, ours in (("TRSP without stage 2 (w/o R)", "direct"), ("TRSP, all chosen at once (w/o W)", "one_shot")):
        here = (plan_results.compared(record, "trsp", ours) or {})["calibration"]
        lines.append(
            f"{words.plain(method)}: the paper's TRSP has {formatting.ratio(whole / by[method])} times its "
            "perplexity (LLaMA2-7B, "
            f"WikiText-2, calibrated there too), ours {formatting.ratio(here.value)} times "
            f"{formatting.ends(here.low, here.high, formatting.ratio)}."
        )
    return [
        *lines,
        "Another model, another text, far fewer steps: directions can be held against the paper's, sizes not.",
    ]


def gates(evidence: Evidence) -> list[str]:
    """What the paper's gate costs, beside ours at the same steps."""
    try:
        sweep = evidence.sweeps["choice"]
        theirs = sweep.of("output")
        ours = [p for p in sweep.of("branch") if p.at["stage1_steps"] == theirs[0].settings["stage1_steps"]]
        ends = theirs[0].settings
        lines = []
        for domain in DOMAINS:
            figures = [formatting.perplexity(grid_results.perplexity(side, domain).value) for side in (theirs, ours)]
            level = formatting.perplexity(intervals.perplexity(sweep.dense[theirs[0].blocks[domain]]).value)
            lines.append(
                f"In the {words.DOMAINS[domain]}, deleted at once, perplexity is **{figures[0]}** with the paper's "
                f"gate and **{figures[1]}** with ours: {_times(_factor(theirs, ours, domain))}. Dense: {level}."
            )
        gone = [words.layers(side[0].removed) for side in (theirs, ours)]
        lines.append(f"The paper's gate gives up layers {gone[0]}, ours layers {gone[1]}.")
        spared = f"first {ends['protect_first']} and last {ends['protect_last']} layers"
        lines.append(f"And that is with the {spared} protected. What happens without, a run shows in about a minute.")
    except (KeyError, IndexError):
        return ["The record of both gates is not here. Run both by the buttons below."]
    return lines


def _times(factor: intervals.Interval) -> str:
    ends = formatting.ends(factor.low, factor.high, formatting.ratio)
    return f"{formatting.ratio(factor.value)} times as high {ends}"


def _factor(ones: list[Point], others: list[Point], domain: str) -> intervals.Interval:
    """Perplexity of `ones` as a multiple of that of `others`, on the blocks that they share."""
    losses, other_losses = grid_results.paired(ones, others, domain)
    return intervals.factor(losses, other_losses)


QUESTIONS: dict[str, Callable[[Evidence], list[str]]] = {
    "Is it moved knowledge, or training in the measured domain?": _domains,
    "Would it not be as good to delete first, and then to train as long?": _control,
    "What is the penalty itself worth?": _penalty,
    "Does it matter that layers are chosen one at a time?": _greedy,
    "Are there simpler ways to choose that do as well?": _rivals,
    "Does it hold for another seed?": _seeds,
    "How much depends on λ₁ and λ₂?": _strengths,
    "Is it faster, and by how much?": _speed,
    "How does that stand beside the published figures?": _published,
}
