"""From a run's state to the rows that charts draw, on pages and in reports. Pure; long histories are thinned, so that a
redraw stays quick.

Every frame has the columns that its spec names, also when it is empty, and rows of kind `frame` that hold the axes
still while the data grow.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from trsp_core import formatting
from trsp_core.schema import schedules, turns
from trsp_core.schema.config import RunConfig, count_to_remove
from trsp_core.schema.run_state import RunState

MOST = 240  # steps drawn of one history
MOST_LABELS = 48  # layers whose bars are high enough for a line of text
LANGUAGE = "language modelling"
NOW = "now"  # at the layer that a repair is at
PULLS = {1: "λ₁ × sum of weights", 2: "λ₂ × penalty"}  # what each stage adds to it


def fates(state: RunState) -> list[str]:
    """The fate of each of the L layers so far: kept, chosen or removed."""
    count = state.model.n_layers if state.model else len(state.weights)
    fate = np.full(count, "kept", dtype=object)
    fate[[i for i in state.chosen if i < count]] = "chosen"
    if state.removed:
        fate[[i for i in state.removed.removed if i < count]] = "removed"
    return list(fate)


def chosen_at(state: RunState) -> dict[int, int]:
    """Layer to the number of stage 1 steps that were done when it was chosen."""
    last = {s.round: n for n, s in enumerate(state.weight_steps, start=1)}
    return {c.layer: last[c.round] for c in state.rounds if c.round in last}


def weights(state: RunState, expected: int) -> pd.DataFrame:
    """A line a layer over the steps of stage 1, ending where it is chosen. `expected`: steps of the whole stage."""
    columns = ["kind", "step", "weight", "layer", "fate"]
    steps, ends, fate = state.weight_steps, chosen_at(state), fates(state)
    frame = pd.DataFrame(
        [("frame", 0, 0.0, 0, "kept"), ("frame", max(expected, len(steps), 1), 1.0, 0, "kept")], columns=columns
    )
    if not steps:
        return frame
    picked = thin(len(steps), {n - 1 for n in ends.values()})
    table = np.array([steps[i].weights for i in picked], dtype=float)  # (steps drawn, L)
    start = np.ones((1, table.shape[1]))
    table, at = np.vstack([start, table]), np.concatenate([[0], np.array(picked) + 1])
    layer = np.arange(table.shape[1])
    drawn_points = at[:, None] <= np.array([ends.get(i, np.inf) for i in layer])[None, :]
    rows = pd.DataFrame(
        {
            "kind": "line",
            "step": np.repeat(at, len(layer))[drawn_points.ravel()],
            "weight": np.round(table.ravel()[drawn_points.ravel()], 4),
            "layer": np.tile(layer, len(at))[drawn_points.ravel()],
        }
    )
    rows["fate"] = np.array(fate, dtype=object)[rows["layer"]]
    marks = [("mark", n, round(abs(steps[n - 1].weights[i]), 4), i, fate[i]) for i, n in ends.items()]
    rows = pd.concat([frame, rows, pd.DataFrame(marks, columns=columns)], ignore_index=True)
    return _with_turns(rows, state, 1)


def stack(state: RunState) -> pd.DataFrame:
    """A bar a layer: its weight now; of a chosen one as it was when it was chosen, with its number, since the others
    sink on after that (`frozen`). A row of kind `now` stands for the layer that a repair is at."""
    columns = ["kind", "layer", "weight", "fate", "frozen", "label"]
    now = repairing(state)
    fate, ends, has_labels = fates(state), chosen_at(state), len(state.weights) <= MOST_LABELS
    rows = [
        ("bar", i, round(abs(w), 4), fate[i], i in ends, choice(state, i) if i in ends and has_labels else "")
        for i, w in enumerate(weights_at_choice(state))
    ]
    if now is not None:
        rows.append(("now", now, rows[now][2], fate[now], False, NOW))
    return pd.DataFrame([("frame", 0, 1.0, "kept", False, ""), *rows], columns=columns)


def weights_at_choice(state: RunState) -> list[float]:
    """The L layer weights: of a chosen layer when it was chosen, of the others after the latest step."""
    weights = list(state.weights)
    for layer, n in chosen_at(state).items():
        weights[layer] = state.weight_steps[n - 1].weights[layer]
    return weights


def sank_furthest(state: RunState) -> bool:
    """Whether the layer that was chosen last had the smallest weight of those left; of a shortlist the loss takes the
    one that it misses least."""
    last, earlier = state.rounds[-1], {chosen.layer for chosen in state.rounds[:-1]}
    if last.margin is not None or last.score is None:
        return True
    weights = next((step.weights for step in reversed(state.weight_steps) if step.round == last.round), [])
    return all(abs(last.score) <= abs(w) for i, w in enumerate(weights) if i not in earlier)


def choice(state: RunState, layer: int) -> str:
    """Which choice a chosen layer was, and its weight at that moment: `no. 3 at 0.74`; "" of a layer that is kept."""
    if layer not in state.chosen:
        return ""
    weight = weights_at_choice(state)[layer] if layer in chosen_at(state) else math.nan
    at = f" at {formatting.weight(abs(weight))}" if math.isfinite(weight) else ""
    return f"no. {state.chosen.index(layer) + 1}{at}"


def scores(state: RunState) -> pd.DataFrame:
    """A bar a layer: a method's score, none for a protected layer."""
    scored, fate = state.scores.scores if state.scores else [], fates(state)
    rows = [("bar", i, score, fate[i]) for i, score in enumerate(scored) if i < len(fate)]
    return pd.DataFrame(rows, columns=["kind", "layer", "score", "fate"])


def layer_table(state: RunState) -> pd.DataFrame:
    """A row a layer: its weight, what became of it, its size, and the gap that stage 2 left of it; without columns in
    which nothing stands."""
    fate, weights, rows, new_number = fates(state), weights_at_choice(state), [], 0
    order = {layer: n for n, layer in enumerate(state.chosen, start=1)}
    gaps_left = dict(zip(state.chosen, state.gap_steps[-1].gaps, strict=False)) if state.gap_steps else {}
    for i, what in enumerate(fate):
        if what == "kept":
            now = "narrower" if state.narrowed else f"now {new_number}"
            text, new_number = (now if state.removed else "kept so far"), new_number + 1
        else:
            text = f"{what} as no. {order.get(i, 0)}"
        size = state.model.layer_parameters[i] / 1e6 if state.model else None
        rows.append((i, text, weights[i] if state.weight_steps else None, size, gaps_left.get(i)))
    columns = ["Layer", "Fate", "Weight", "Size, M", "Gap left"]
    frame = pd.DataFrame(rows, columns=columns).round({"Weight": 2, "Size, M": 2, "Gap left": 2})
    return frame.dropna(axis=1, how="all") if rows else frame


def losses(state: RunState, config: RunConfig, stage: int) -> pd.DataFrame:
    """The parts of the loss over the steps of a stage, as they enter the sum."""
    if stage == 1:
        lambdas = turns.course(config, state.turns, "lambda_1", len(state.weight_steps))
        pairs = zip(state.weight_steps, lambdas, strict=True)
        parts = [(step.lm_loss, lambda_1 * abs(step.l1)) for step, lambda_1 in pairs]
    else:
        parts = [(step.lm_loss, step.lambda_2 * abs(step.penalty)) for step in state.gap_steps]
    rows: list[tuple] = [("frame", 0, 0.0, LANGUAGE), ("frame", expected_steps(state, config, stage), 1.0, LANGUAGE)]
    for i in thin(len(parts)):
        language, pull = parts[i]
        rows += [("line", i + 1, language, LANGUAGE), ("line", i + 1, pull, PULLS[stage])]
    return _with_turns(pd.DataFrame(rows, columns=["kind", "step", "value", "part"]), state, stage)


def gaps(state: RunState, config: RunConfig) -> pd.DataFrame:
    """A line a chosen layer over the steps of stage 2: how much it still changes what passes through it."""
    columns = ["kind", "step", "gap", "layer", "fate"]
    frame = [("frame", 0, 0.0, 0, "chosen"), ("frame", expected_steps(state, config, 2), 0.5, 0, "chosen")]
    picked, fate = thin(len(state.gap_steps)), fates(state)
    rows = [
        ("line", i + 1, abs(gap), layer, fate[layer])
        for i in picked
        for layer, gap in zip(state.chosen, state.gap_steps[i].gaps, strict=False)
    ]
    last = sorted((row for row in rows[-len(state.chosen) :] if math.isfinite(row[2])), key=lambda row: row[2])
    highest = max([row[2] for row in rows if math.isfinite(row[2])], default=0.0)
    heights = apart([row[2] for row in last], max(0.085 * highest, 0.032), 0.0)  # the axis reaches 0.5 at least
    ends = [("mark", row[1], y, *row[3:]) for row, y in zip(last, heights, strict=True)]
    return _with_turns(pd.DataFrame(frame + rows + ends, columns=columns), state, 2)


def refits(state: RunState, config: RunConfig) -> pd.DataFrame:
    """A bar a kept layer that was solved for: how far its output lay from the dense model's state there, and how far it
    lies now. A row of kind `now` stands for the layer that the repair is at."""
    rows: list[tuple] = [("frame", i, 0.0, 0.0, "") for i in repair_layers(state)]
    if (now := repairing(state)) is not None:
        rows.append(("now", now, 0.0, 0.0, NOW))
    for refit in state.refits:
        before, after = abs(refit.before), abs(refit.after)
        label = f"{formatting.percent(1 - after / before)} nearer" if before and math.isfinite(after / before) else ""
        rows.append(("bar", refit.layer, before, after, label))
    return pd.DataFrame(rows, columns=["kind", "layer", "before", "after", "label"])


def repair_layers(state: RunState) -> list[int]:
    """The layers that the repair goes through. A run that has not said so yet, or an older one, may go through all kept
    layers from the one below the first chosen one on."""
    n_layers = state.model.n_layers if state.model else len(state.weights)
    lowest = max(min(state.chosen, default=1) - 1, 0)
    return state.repair_layers or [i for i in range(lowest, n_layers) if i not in state.chosen]


def repairing(state: RunState) -> int | None:
    """The layer that the repair is at; None where there is none, or where an older run does not say."""
    done = len(state.refits)
    at_work = state.phase == "repair" and not state.ended and done < len(state.repair_layers)
    layer = state.repair_layers[done] if at_work else len(state.weights)
    return layer if 0 <= layer < len(state.weights) else None


def probes(state: RunState, config: RunConfig) -> pd.DataFrame:
    """Perplexity if the chosen layers were deleted now, over the steps of stage 2, between the levels of `_between`."""
    levels, points = times_dense(state, config)
    frame = _between(levels, points, expected_steps(state, config, 2), "deleted now")
    return _with_turns(frame, state, 2) if points else frame


def repair_probes(state: RunState, config: RunConfig) -> pd.DataFrame:
    """Perplexity if the repair stopped here, over its layers, between the levels of `_between`."""
    levels, points = times_dense_in_repair(state, config)
    return _between(levels, points, len(repair_layers(state)), "stopped here")


def _between(levels: dict[str, float], points: list[tuple[int, float]], last: int, line: str) -> pd.DataFrame:
    """A `line` through `points`, and the dense model and deletion at once as level lines up to `last`: all as multiples
    of the dense model's perplexity on the same blocks. No rows without points."""
    columns = ["kind", "step", "times", "model", "label"]
    if not points:
        return pd.DataFrame(columns=columns).astype({"step": float, "times": float})
    rows: list[tuple] = []
    for name, title in (("dense", "dense"), ("direct", "deleted at once")):
        if level := levels.get(name):
            rows += [("level", step, level, title, "") for step in (0, last)]
            rows.append(
                ("name", last, level, title, title if name == "dense" else f"{title} {formatting.ratio(level)} ×")
            )
    rows += [("line", *points[i], line, "") for i in thin(len(points))]
    return pd.DataFrame(rows, columns=columns)


def times_dense(state: RunState, config: RunConfig) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Perplexity as a multiple of the dense model's: by state of the model, and by step, if layers were deleted then.
    All on the blocks that `compared` counts; nothing while the dense model is not measured."""
    blocks, _ = compared(state, config)
    dense = first_blocks(state, "dense", blocks)
    if not dense:
        return {}, []
    perplexities = {name: first_blocks(state, name, blocks) for name in ("dense", "direct", "repaired", "pruned")}
    levels = {name: value / dense for name, value in perplexities.items() if value}
    return levels, [(p.step, p.perplexity / dense) for p in state.probes]


def times_dense_in_repair(state: RunState, config: RunConfig) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """The same for a repair: the points by the number of layers that are repaired, from deletion at once up to the
    repaired model; none in a run without a repair."""
    levels, _ = times_dense(state, config)
    blocks, _ = compared(state, config)
    dense = first_blocks(state, "dense", blocks)
    if not dense or not config.repairs:
        return levels, []
    points = [(0, levels["direct"])] if "direct" in levels else []
    points += [(p.layers, p.perplexity / dense) for p in state.repair_probes if p.domain == "calibration"]
    end = levels.get("repaired" if config.stage2_steps else "pruned")
    return levels, [*points, *([(len(repair_layers(state)), end)] if end else [])]


def compared(state: RunState, config: RunConfig) -> tuple[int, int]:
    """Of the measured blocks of the calibration domain: how many the pictures of stage 2 use, and how many there are.
    They use those that the probes use, or all in a run without probes."""
    whole = next((m.blocks for m in state.measured if m.domain == "calibration"), config.measure_blocks)
    repair_probed = schedules.repair_probes(config, len(repair_layers(state))) if config.repairs else []
    planned = config.stage2_steps or (repair_probed and not state.ended)
    first_probe = next(iter([*state.probes, *state.repair_probes]), None)
    few = first_probe.blocks if first_probe else config.probe_blocks if planned else 0
    return (min(few, whole) or whole), whole


def sample(state: RunState, config: RunConfig) -> str:
    """Those blocks in words: `2 of the 8 measured blocks`."""
    blocks, whole = compared(state, config)
    return f"{blocks} of the {whole} measured blocks" if blocks < whole else f"all {whole} measured blocks"


def first_blocks(state: RunState, model_state: str, blocks: int) -> float | None:
    """Perplexity of the first `blocks` measured blocks of the calibration domain, the sample that probes use."""
    for event in state.measured:
        if event.state == model_state and event.domain == "calibration" and len(event.losses) >= blocks > 0:
            mean = np.mean([abs(x) for x in event.losses[:blocks]])
            return round(float(math.exp(min(mean, 700.0))), 3) if math.isfinite(mean) else None
    return None


def marks(state: RunState, stage: int) -> list[tuple[int, str]]:
    """Steps of a stage after which knobs were turned, each with what it says there: `(7, "λ₁ 0.1")`. What was turned
    for stage 2 before it began stands at its step 0."""
    by_step: dict[int, list[str]] = {}
    for turn in state.turns:
        early = stage == 2 and turn.stage == 1 and turns.STAGE_OF[turn.name] == 2
        if turn.stage == stage or early:
            by_step.setdefault(0 if early else turn.step, []).append(turns.label(turn))
    return [(step, ", ".join(labels)) for step, labels in sorted(by_step.items())]


def _with_turns(frame: pd.DataFrame, state: RunState, stage: int) -> pd.DataFrame:
    """`frame` with a row of kind `turn` for each mark, whose label is in the column `turn`."""
    rows = pd.DataFrame([("turn", *mark) for mark in marks(state, stage)], columns=["kind", "step", "turn"])
    return pd.concat([frame.assign(turn=""), rows], ignore_index=True) if len(rows) else frame.assign(turn="")


def expected_steps(state: RunState, config: RunConfig, stage: int) -> int:
    """Steps that a stage will take, as far as it is known."""
    now = turns.applied(config, turns.values(state.turns))
    if stage == 2:
        return max(now.stage2_steps, len(state.gap_steps), 1)
    if now.stage1_steps != config.stage1_steps:  # rounds of several lengths
        return max(state.units if state.phase == "choose" else 0, len(state.weight_steps), 1)
    return max(expected_rounds(state, config) * config.stage1_steps, len(state.weight_steps), 1)


def expected_rounds(state: RunState, config: RunConfig) -> int:
    return 1 if config.one_shot else max(expected_removals(state, config), 1)


def expected_removals(state: RunState, config: RunConfig) -> int:
    """K of this run; 0 before the model is known."""
    now = turns.applied(config, turns.values(state.turns))
    return count_to_remove(now, state.model.n_layers) if state.model else 0


def thin(count: int, also: set[int] | frozenset[int] = frozenset()) -> list[int]:
    """At most `MOST` indices spread over `range(count)`, the last one and `also` among them."""
    if count <= MOST:
        return list(range(count))
    return sorted({int(i) for i in np.linspace(0, count - 1, MOST)} | {i for i in also if 0 <= i < count})


def apart(heights: list[float], least: float, floor: float = -math.inf) -> list[float]:
    """Ascending `heights` moved until neighbours are `least` apart, for labels that stay legible near their lines; none
    below `floor`."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + least) if moved else height)
    excess = sum(moved) - sum(heights)
    down = min(excess / len(moved), moved[0] - floor) if moved else 0.0
    return [height - down for height in moved]


def caption(name: str, state: RunState, config: RunConfig) -> str:
    """What is to be said under a chart, by its name in `specs.ALT`; of a page and of a report alike."""
    if name == "weights":
        return (
            "A line a layer: its weight sinks the faster, the less the text needs it. A dot: the layer that its round "
            "took; there its line ends, and the others sink on."
        )
    if name == "stack":
        frozen = " Outlined: a chosen one, as it was when its round took it."
        learns = config.method == "trsp"  # said from the start, so that nothing moves when the first one is chosen
        return "The layers now, input at the bottom." + (frozen if learns or chosen_at(state) else "")
    if name == "probes":
        return (
            "Perplexity if the chosen layers were deleted now, as a multiple of the dense model's, on "
            f"{sample(state, config)}."
        )
    if name == "repair-probes":
        return (
            "Perplexity if the repair stopped here: the layers so far as it left them, those above as they came. As a "
            f"multiple of the dense model's, on {sample(state, config)}."
        )
    if name == "gaps":
        return "How much each chosen layer still changes what passes through it."
    if name == "refits":
        return (
            "A bar a kept layer, from below: how far its output is from the dense model's state there, as a share of "
            "that state. The whole bar: before it was solved for. Green: what is left."
        )
    if name == "loss-1":
        return f"Stage 1: language-modelling loss, and {PULLS[1]}."
    if name == "loss-2":
        acts = schedules.lambda_2_in_words(config)
        if any(turn.name in ("lambda_2", "stage2_steps") for turn in state.turns):
            acts = "λ₂, or its number of steps, was turned while the run went on: see the marks."
        return f"Stage 2: language-modelling loss, and {PULLS[2]}. {acts}"
    return ""
