"""Several runs that belong together: a base, and named variations of it that share seed, texts and order of blocks.

A variation's run folder is named for it and for a digest of its settings, so a finished one is found again and never
run twice, and a changed one is another run. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from trsp_core import paths
from trsp_core.errors import TrspError
from trsp_core.models import catalog
from trsp_core.preparation import forecast
from trsp_core.pruning import methods, transfers, validate
from trsp_core.runs.store import Run, Store
from trsp_core.schema import codec
from trsp_core.schema.config import RunConfig, to_json
from trsp_core.schema.run_state import RunState

Ends = dict[str, tuple[Run, RunState]]  # variation to its finished run, and the state of that
MOST = 1_000  # variations
_NAME = re.compile(r"[a-z0-9_]{1,24}")
_RUN = re.compile(r"\d{8}-\d{6}-([a-z0-9_]+)-([a-z0-9_]+)-([0-9a-f]{8})")


@dataclass(frozen=True)
class Variation:
    """One run of a plan.

    Attributes:
        settings: knobs that differ from the plan's base.
        layers_of: the variation whose chosen layers this one removes, without choosing again; "" for its own choice.
        as_long_as: the variation that this one's stage 2 takes as long as; that decides its number of steps. Times
            are forecast from counts of operations, so that a busy machine does not change that number.
    """

    name: str
    title: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers_of: str = ""
    as_long_as: str = ""


@dataclass(frozen=True)
class Plan:
    """Variations in the order they run."""

    name: str
    variations: tuple[Variation, ...]
    title: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None


_LEAN = {"measure_blocks": 12, "sample_tokens": 0, "save_model": False, "importance_blocks": 0}


def _methods_plan() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"name": m.name, "title": m.title} for m in methods.all_methods().values() if m.name != "manual"
    ]
    plus = {"protect_first": 4, "protect_last": 2}
    rows.append({"name": "taylor_plus", "title": "Taylor+, ends protected", "settings": {"method": "taylor", **plus}})
    for row in rows:
        row["settings"] = row.get("settings") or {"method": row["name"]}
    return {
        "name": "methods",
        "title": "Which layers: every method, deleted at once",
        "preset": "two-stage",
        "base": _LEAN | {"anneal": 0.0, "stage2_steps": 0, "speed_repeats": 0},
        "variations": rows,
    }


def _transfers_plan() -> dict[str, Any]:
    """Repairs alone, and transfers and the control at so many steps. A refit took as long as 75 steps of training on
    two cores: the control of 90 steps has the time of a refit and ten steps."""
    rows = [("direct", "Deleted at once", "none", 0)]
    repairs = [t for t in transfers.all_transfers().values() if t.repair and transfers.OWN_HEAD not in t.needs]
    rows += [(t.name, t.title, t.name, 0) for t in repairs]
    rows += [(f"refit_{steps}", f"Refit, then {steps} steps", "refit", steps) for steps in (10, 30)]
    rows += [(f"none_{steps}", f"Delete, then {steps} steps", "none", steps) for steps in (10, 30, 90)]
    rows += [("penalty_30", "Penalty (TRSP), 30 steps", "penalty", 30)]
    own_choice = {t.name for t in repairs if methods.LAYER_WEIGHTS in t.needs}  # the same layers, chosen once more
    variations = [
        {"name": name, "title": title, "settings": {"transfer": transfer, "stage2_steps": steps}}
        | ({} if name == "direct" or name in own_choice else {"layers_of": "direct"})
        for name, title, transfer, steps in rows
    ]
    variations.append(
        {
            "name": "fade_30",
            "title": "Faded out (TRSP), 30 steps",
            "settings": {"anneal": 0.25, "stage2_steps": 30},
            "layers_of": "direct",
        }
    )
    return {
        "name": "transfers",
        "title": "How the knowledge moves: every transfer of the same layers",
        "preset": "two-stage",
        "base": _LEAN | {"anneal": 0.0, "speed_repeats": 0, "probe_blocks": 0},
        "variations": variations,
    }


def built_in() -> dict[str, dict[str, Any]]:
    """Plans that need no file, as they would stand in one."""
    ablation = {
        "name": "ablation",
        "title": "What each part of TRSP is worth",
        "preset": "two-stage",
        "base": _LEAN | {"anneal": 0.0},
        "variations": [
            {"name": "trsp", "title": "TRSP"},
            {
                "name": "direct",
                "title": "Without stage 2 (w/o R)",
                "settings": {"stage2_steps": 0, "speed_repeats": 9},
                "layers_of": "trsp",
            },
            {
                "name": "one_shot",
                "title": "All chosen at once (w/o W)",
                "settings": {"one_shot": True, "speed_repeats": 0},
            },
            {
                "name": "no_penalty",
                "title": "Same steps, λ₂ = 0",
                "settings": {"lambda_2": 0.0, "speed_repeats": 0},
                "layers_of": "trsp",
            },
            {
                "name": "fade",
                "title": "TRSP, chosen layers faded out",
                "settings": {"anneal": 0.25, "speed_repeats": 0},
                "layers_of": "trsp",
            },
            {
                "name": "delete_first",
                "title": "Delete, then the same steps",
                "settings": {"control": "delete_first", "speed_repeats": 0},
                "layers_of": "trsp",
            },
            {
                "name": "equal_time",
                "title": "Delete, then the same time",
                "settings": {"control": "delete_first", "speed_repeats": 0},
                "layers_of": "trsp",
                "as_long_as": "trsp",
            },
        ],
    }
    return {"ablation": ablation, "methods": _methods_plan(), "transfers": _transfers_plan()}


def read(name: str) -> Plan:
    """A built-in plan by name, or the JSON file at this path.

    Raises:
        TrspError: no such plan, no JSON, or something in it that cannot be used.
    """
    if name in built_in():
        return parse(built_in()[name])
    file = paths.file(name, "plan", f"Take {', '.join(built_in())}, or the path of a JSON file.")
    try:
        return parse(codec.decode(paths.content(file), dict))
    except ValueError as error:
        raise TrspError(f"The plan {name[:80]} is no JSON: {error}.", "Mend the file.") from error


def parse(document: Any) -> Plan:
    """A plan from decoded JSON.

    Raises:
        TrspError: a part is missing, unknown or of a wrong kind; every variation's settings are checked.
    """
    try:
        plan = _titled(codec.build(Plan, document))
        if len(plan.variations) > MOST or not all(
            map(_NAME.fullmatch, (plan.name, *(v.name for v in plan.variations)))
        ):
            raise ValueError(f"more than {MOST} variations, or a name that cannot be one")
    except ValueError as error:
        raise TrspError(
            f"This is no plan: {str(error)[:80]}.",
            'It wants {"name", "base", "variations": [{"name", "settings"}]}; names of small letters, digits and _.',
        ) from error
    names: list[str] = []
    for variation in plan.variations:
        earlier = {variation.layers_of, variation.as_long_as} - {""}
        if variation.name in names or not earlier <= set(names):
            raise TrspError(
                f"Variation {variation.name} stands twice, or refers to one that does not stand before it.",
                "Give each its own name, and put what it refers to first.",
            )
        names.append(variation.name)
        validate.from_values({**plan.base, **variation.settings}, plan.preset)
    if not names:
        raise TrspError("The plan has no variations.", "Name at least one.")
    return plan


def _titled(plan: Plan) -> Plan:
    """`plan` with its name as title where one is missing."""
    variations = tuple(replace(v, title=v.title or v.name) for v in plan.variations)
    return replace(plan, title=plan.title or plan.name, variations=variations)


def config_of(plan: Plan, variation: Variation, done: Mapping[str, RunState]) -> RunConfig:
    """The settings of a variation, given the states of those that it refers to.

    Raises:
        TrspError: settings that cannot be used, or a model that is not here.
    """
    values = {**plan.base, **variation.settings}
    if variation.layers_of:
        values |= {"method": "manual", "layers": ",".join(map(str, sorted(done[variation.layers_of].chosen)))}
    config = validate.from_values(values, plan.preset)
    if variation.as_long_as:
        other = next(v for v in plan.variations if v.name == variation.as_long_as)
        theirs, facts = config_of(plan, other, done), catalog.facts(config.model)
        ratio = forecast.training_step(theirs, facts) / forecast.training_step(config, facts)
        steps = max(1, round(theirs.stage2_steps * ratio))
        config = validate.from_values(values | {"stage2_steps": steps}, plan.preset)
    return config


def find(store: Store, plan: Plan, variation: Variation, config: RunConfig) -> Run | None:
    """The newest run of this variation with these settings, however it ended; none that was steered while it ran. A
    setting that is younger than the run counts with its default."""
    mine = (plan.name, variation.name)
    runs = (run for run in store.runs() if belongs(run) == mine and _settings(run) == config)
    return next((run for run in runs if run.waits_or_runs() or not run.summary()["turns"]), None)


def finished(runs: Sequence[Run]) -> dict[RunConfig, Run]:
    """For each settings the newest run that has finished, whichever plan it belongs to; none that was steered while it
    ran, since its settings do not say what it did.

    Args:
        runs: newest first.
    """
    newest = {}
    for run in reversed(runs):
        config = _finished_settings(run, _stamp(run))
        if config:
            newest[config] = run
    return newest


def fingerprint(runs: Sequence[Run]) -> tuple[Any, ...]:
    """What is the same as long as no run finishes, goes or is changed after it has: then `ends` is too."""
    stamps = [(run, _stamp(run)) for run in runs]
    return tuple((run.id, stamp) for run, stamp in stamps if _finished_settings(run, stamp))


def _stamp(run: Run) -> tuple[tuple[int, int], ...]:
    """Time in nanoseconds and size in bytes of the files that say what a run is, and how it ended."""
    stamps = []
    for file in (run.events_file, run.folder / "config.json", run.folder / "summary.json"):
        try:
            facts = file.stat()
            stamps.append((facts.st_mtime_ns, facts.st_size))
        except OSError:
            stamps.append((0, -1))
    return tuple(stamps)


@lru_cache(maxsize=4096)
def _finished_settings(run: Run, stamp: tuple[tuple[int, int], ...]) -> RunConfig | None:
    """The settings of a run that has finished and was not steered, else None; each file is read once, until its `stamp`
    changes."""
    config = _settings(run)
    if config is None or (figures := run.summary())["ended"] != "finished" or figures["turns"]:
        return None
    return config


def ends(plan: Plan, runs: Sequence[Run]) -> Ends:
    """The finished run of each variation, looked up by its settings: one run serves all variations and plans that ask
    for the same.

    Args:
        runs: newest first.
    """
    by_settings, known = finished(runs), Ends()
    for variation in plan.variations:
        states = {name: state for name, (_, state) in known.items()}
        if needs(plan, variation) <= set(states):
            with contextlib.suppress(TrspError):  # its model has gone since; the driver tells it when its turn comes
                run = by_settings.get(config_of(plan, variation, states))
                if run and (state := run.state()).ended == "finished":
                    known[variation.name] = run, state
    return known


def earlier_ends(plan: Plan, runs: Sequence[Run]) -> Ends:
    """The newest finished run that was made for each variation, be it with settings that the plan does not have any
    more.

    Args:
        runs: newest first.
    """
    known = Ends()
    for run in runs:
        name, variation = belongs(run) or ("", "")
        if name == plan.name and variation not in known:
            state = run.state()
            if state.ended == "finished" and not state.turns:
                known[variation] = run, state
    return known


def needs(plan: Plan, variation: Variation) -> set[str]:
    """Names of the variations that have to finish first, since this one takes over their layers."""
    other = next((v for v in plan.variations if v.name == variation.as_long_as), None)
    return {variation.layers_of} - {""} | (needs(plan, other) if other else set())


def _settings(run: Run) -> RunConfig | None:
    try:
        return run.config()
    except TrspError:
        return None


def create(store: Store, plan: Plan, variation: Variation, config: RunConfig) -> Run:
    """A new run folder for this variation."""
    return store.create(config, store.root / name_of(plan, variation, config))


def name_of(plan: Plan, variation: Variation, config: RunConfig) -> str:
    """The name of a new run folder: time, plan, variation, settings."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.name}-{variation.name}-{digest(config)}"


def digest(config: RunConfig) -> str:
    """8 hex digits, the same for the same settings."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:8]


def belongs(run: Run) -> tuple[str, str] | None:
    """`(plan, variation)` of a run that a plan made."""
    match = _RUN.fullmatch(run.id)
    return (match[1], match[2]) if match else None
