"""A small run told as events, for pages: written by the real recorder in each status a run can have."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator

from trsp_core.errors import TrspError
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import Event
from trsp_core.schema.run_state import RunState, fold

L, CHOSEN, STEPS = 6, (3, 2), 5
CONFIG = RunConfig(ratio=0.34, stage1_steps=STEPS, stage2_steps=10)
SMALL = {
    "block_length": "16",
    "measure_length": "16",
    "measure_blocks": "2",
    "calibration_blocks": "4",
    "probe_blocks": "1",
    "stage1_steps": "2",
    "stage2_steps": "4",
    "save_model": "false",
}
PLAN = ("load", "text", "dense", "choose", "direct", "transfer", "trained", "pruned", "speed", "save")


def tell() -> Generator[Event, None, None]:
    """All events of a run on a model of six layers, of which two are removed."""
    yield ev.RunPlanned([{"name": name, "seconds": 10.0} for name in PLAN], 10**9)
    yield ev.PhaseStarted("load")
    yield ev.ModelLoaded("tiny", "LlamaForCausalLM", L, 32, 128, 60_000, [8_000] * L, 240_000, "float32", "cpu")
    yield ev.PhaseStarted("text")
    yield ev.TextPrepared("calibration", "measure", "wikipedia", 40, 8, 256, 2048, "0123456789abcdef")
    yield from _measured("dense", 20.0)
    yield ev.PhaseStarted("choose", 2 * STEPS)
    weights = [1.0] * L
    for n, layer in enumerate(CHOSEN):
        for step in range(STEPS):
            weights = [w - (0.15 if i == layer else 0.02) for i, w in enumerate(weights)]
            yield ev.StageOneStepped(n * STEPS + step + 1, n, 3.0, sum(weights), list(weights))
        yield ev.LayerChosen(n, layer, weights[layer], 5, 0.5)
    yield ev.LayersChosen("trsp", list(CHOSEN))
    yield from _measured("direct", 90.0)
    yield ev.PhaseStarted("transfer", 10)
    for step in range(11):
        if step:
            yield ev.StageTwoStepped(step, 3.0, 0.8 / step, float(step), 1e-4, [0.5 / step, 0.4 / step])
        yield ev.DeletionProbed(step, 90.0 - 3 * step, 2, 510)
    yield from _measured("trained", 19.0)
    yield ev.LayersRemoved(sorted(CHOSEN), [0, 1, 4, 5], 60_000, 44_000, 240_000, 176_000)
    yield from _measured("pruned", 60.0)
    yield ev.PhaseStarted("speed")
    for state, rate in (("dense", 1.0), ("pruned", 1.4)):
        yield ev.SpeedMeasured(state, 128, 16, 3, 900 * rate, [800.0, 1000.0], 18 * rate, [17.0, 30.0])
    yield ev.Noted("Three articles were shorter than a block and were left out.")
    yield ev.RunFinished(10**9)


NARROW = RunConfig(method="width", ratio=0.34, stage2_steps=0)


def tell_narrow() -> Generator[Event, None, None]:
    """A run on the same model that removes no layer and narrows them all."""
    told = list(tell())
    first = next(n for n, e in enumerate(told) if isinstance(e, ev.PhaseStarted) and e.name == "choose")
    yield from told[:first]
    yield ev.PhaseStarted("choose", 100)
    yield ev.LayersChosen("width", [])
    yield ev.LayersNarrowed(L, [4, 2], [2, 1], [48, 31], 44_000, 43_900)
    yield ev.LayersRemoved([], list(range(L)), 60_000, 43_900, 240_000, 175_600)
    for state in ("pruned", "direct"):
        yield from _measured(state, 70.0)
    yield from (e for e in told if isinstance(e, ev.SpeedMeasured | ev.RunFinished))


REPAIR = dataclasses.replace(CONFIG, transfer="refit", stage2_steps=4)
REPAIRED = (1, 4, 5)


def tell_repair(config: RunConfig = REPAIR) -> Generator[Event, None, None]:
    """The same run with a repair of the layers that stay, probed behind the first two of three; then the training that
    `config` asks for."""
    told = list(tell())
    later = [name for name in PLAN[5:] if name not in ("trained", *(() if config.stage2_steps else ("transfer",)))]
    names = [*PLAN[:5], "repair", *(["repaired"] if config.stage2_steps else []), *later]
    yield ev.RunPlanned([{"name": name, "seconds": 10.0} for name in names], 10**9)
    yield from told[1 : next(n for n, e in enumerate(told) if isinstance(e, ev.PhaseStarted) and e.name == "transfer")]
    yield ev.PhaseStarted("repair", len(REPAIRED))
    yield ev.RepairPlanned(list(REPAIRED))
    for n, layer in enumerate(REPAIRED, 1):
        yield ev.LayerRefitted(layer, 0.3 + 0.1 * n, 0.2 + 0.1 * n)
        for domain in ev.DOMAINS if n < len(REPAIRED) else ():
            yield ev.RepairProbed(n, 90.0 - 10 * n, 2, 510, domain, [math.log(90.0 - 10 * n)] * 2)
        yield ev.Progressed(n)
    if config.stage2_steps:
        yield from _measured("repaired", 60.0)
        yield ev.PhaseStarted("transfer", config.stage2_steps)
    for step in range(config.stage2_steps + 1 if config.stage2_steps else 0):
        if step:
            yield ev.StageTwoStepped(step, 3.0, 0.0, 0.0, 1e-4, [])
        yield ev.DeletionProbed(step, 60.0 - 2 * step, 2, 510)
    yield from told[next(n for n, e in enumerate(told) if isinstance(e, ev.LayersRemoved)) :]


def _measured(state: str, level: float) -> Iterator[Event]:
    yield ev.PhaseStarted(state, 16)
    for domain, text in zip(ev.DOMAINS, ("wikipedia", "news"), strict=True):
        yield ev.Progressed(8)
        yield ev.PerplexityMeasured(state, domain, level, [math.log(level)] * 8, text, 8, 256, 2040, "float32")
        if state != "dense":
            yield ev.DivergenceMeasured(state, domain, level / 100, [level / 100] * 2, 2, 510)
    yield ev.TextGenerated(state, "The *city*", "was # founded <b>long</b> ago.")


def create(store: Store, config: RunConfig = CONFIG) -> Run:
    return store.create(config)


def write(store: Store, status: str, config: RunConfig = CONFIG) -> Run:
    """A run in `status`."""
    run = create(store, config)
    if status == "queued":
        (run.folder / "queued").touch()
    elif status == "lost":
        append(run, 30)
    elif status == "running":
        append(run, 40)
        _held.enter_context(_holder(run))
    elif status == "failed":
        record(run, failing())
    elif status == "cancelled":
        record(run, tell(), lambda state, _: run.cancel() if len(state.gap_steps) == 4 else None)
    else:
        record(run, tell())
    if status == "damaged":
        damage(run, 12)
    return run


def damage(run: Run, number: int) -> None:
    """Flip a bit in the line of the event of this number."""
    lines = run.events_file.read_bytes().split(b"\n")
    lines[number] = lines[number][:30] + bytes([lines[number][30] ^ 1]) + lines[number][31:]
    run.events_file.write_bytes(b"\n".join(lines))


def tell_more(run: Run, more: list[Event]) -> None:
    """Append events to those of a run."""
    written = len(run.read()[0])
    with run.events_file.open("a", encoding="utf-8") as file:
        file.writelines(ev.to_line(event, n, n * 0.5) + "\n" for n, event in enumerate(more, written))


def failing() -> Generator[Event, None, None]:
    yield ev.PhaseStarted("text")
    raise TrspError("The text `my_file.txt` has **0** words.", "Bring at least [384] tokens.")


def append(run: Run, upto: int | None, tell: Callable[[], Iterator[Event]] = tell) -> None:
    """Write the story up to event `upto`, going on from what is there."""
    written = len(run.read()[0])
    with run.events_file.open("a", encoding="utf-8") as file:
        for n, event in enumerate(tell()):
            if n >= written and (upto is None or n < upto):
                file.write(ev.to_line(event, n, n * 0.5) + "\n")


@contextlib.contextmanager
def running(
    store: Store, upto: int = 40, config: RunConfig = CONFIG, tell: Callable[[], Iterator[Event]] = tell
) -> Iterator[Run]:
    """A run told up to event `upto`, held by a living process."""
    run = create(store, config)
    append(run, upto, tell)
    with _holder(run):
        yield run


@contextlib.contextmanager
def _holder(run: Run) -> Iterator[None]:
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        try:
            yield
        finally:
            child.stdin.close()


_held = contextlib.ExitStack()  # of runs that stay running until the tests end


def no_child(run: Run) -> subprocess.Popen:
    """Instead of a run's process: one that ends at once."""
    return subprocess.Popen([sys.executable, "-c", ""])


def long_state(steps: int, layers: int) -> RunState:
    """Stage 1 of many steps on a deep model."""
    weights = [1.0] * layers
    loaded = ev.ModelLoaded("deep", "X", layers, 1, 1, 1, [1] * layers, 1, "float32", "cpu")
    stepped = [ev.StageOneStepped(n, 0, 3.0, float(layers), weights) for n in range(1, steps + 1)]
    return fold(RunState(), [(n, float(n), event) for n, event in enumerate([loaded, *stepped])])
