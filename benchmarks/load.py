"""Many at once on the real server: sessions that watch one live run, and others that take layers out by hand.

The sessions speak the server's own protocol, protobuf messages over a WebSocket, as a browser does: they open a page,
run its fragments again on the timers that the server sets, and press its buttons. Nothing is drawn, so the figures hold
no browser's time; and all of them take only what the server and the run leave of the cores, since visitors bring
machines of their own. A rerun lasts from the request until the server says that the script has ended, all messages
read.
The run trains the default model; how much it is slowed is told by its own steps, alone before and after the visit. The
server is in demo mode, which is what strangers meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import Row, row
from trsp_core.errors import TrspError
from trsp_core.models import catalog
from trsp_core.pruning import validate
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Run, Store
from trsp_core.schema import events as ev

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m"
ALONE = 60.0  # seconds of training without visitors, before and after; less where the visit itself is shorter
LONG = 30.0  # seconds without an ending of a rerun after which a session counts as lost
# Below figures: of the set at hand, or still of an earlier one.
SHOWN = re.compile(r"(Removed|Shown): ((?:\d|to|[ ,])*\d|none)")
PAUSE = (2.0, 6.0)  # seconds that a person looks before the next click


@dataclass
class Visitor:
    """One session, and what it met with.

    Attributes:
        address: page and query, such as `run?run=ID`.
        clicks: presses a layer's button now and then.
        ticks, presses: seconds of each rerun of a fragment by its timer, and of each rerun by a click.
        figures: seconds from a click to the figures of its set, where the next click did not come first.
        sets: how often figures of another set appeared.
        lost: why the session ended before it should; "" where it did not.
    """

    address: str
    clicks: bool = False
    ticks: list[float] = field(default_factory=list)
    presses: list[float] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)
    sets: int = 0
    shown: str = ""
    clicked: float = 0.0  # when, while its figures are awaited
    lost: str = ""
    script: str = ""  # of the page, as the server names it
    timers: dict[str, float] = field(default_factory=dict)
    buttons: dict[str, str] = field(default_factory=dict)  # id of a layer's button to its fragment

    async def visit(self, port: int, until: float, dice: random.Random) -> None:
        """Be there until `until` on the monotonic clock."""
        import websockets
        from streamlit.proto.BackMsg_pb2 import BackMsg

        page, _, query = self.address.partition("?")
        try:
            address = f"ws://127.0.0.1:{port}/_stcore/stream"
            async with websockets.connect(address, subprotocols=["streamlit"], max_size=None) as line:  # type: ignore[list-item]

                async def rerun(fragment: str = "", pressed: str = "") -> float:
                    message = BackMsg()
                    asked = message.rerun_script
                    asked.query_string, asked.page_name, asked.fragment_id = query, page, fragment
                    asked.page_script_hash = self.script
                    asked.is_auto_rerun = bool(fragment) and not pressed
                    if pressed:
                        asked.widget_states.widgets.add(id=pressed, trigger_value=True)
                    began = time.perf_counter()
                    await line.send(message.SerializeToString())
                    await asyncio.wait_for(self._read(line), LONG)
                    return time.perf_counter() - began

                await rerun()
                due = {name: time.monotonic() + every for name, every in self.timers.items()}
                click = time.monotonic() + dice.uniform(*PAUSE)
                while (now := time.monotonic()) < until:
                    due = {n: due.get(n, now + every) for n, every in self.timers.items()}
                    name = min(due, key=due.__getitem__, default=None)
                    if self.clicks and self.buttons and now >= click:
                        pressed = dice.choice(sorted(self.buttons))
                        self.clicked = time.monotonic()
                        self.presses.append(await rerun(self.buttons[pressed], pressed))
                        click = time.monotonic() + dice.uniform(*PAUSE)
                    elif name and now >= due[name]:
                        due[name] = now + self.timers[name]
                        self.ticks.append(await rerun(name))
                    else:
                        await asyncio.sleep(min([0.05, *(max(at - now, 0.0) for at in due.values())]))
        except TimeoutError:
            self.lost = f"a rerun did not end within {LONG:.0f} s"
        except (OSError, websockets.exceptions.WebSocketException) as error:
            self.lost = f"{type(error).__name__}: {error}"
        except RuntimeError as error:
            self.lost = str(error)

    async def _read(self, line: Any) -> None:
        """Take the messages of one rerun in, of a fragment or of the whole page, until the script has ended."""
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        while True:
            message = ForwardMsg.FromString(await line.recv())
            kind = message.WhichOneof("type")
            if kind == "new_session" and not message.metadata.run.fragment_ids:  # the whole page
                self.timers, self.buttons = {}, {}
            elif kind == "navigation":
                self.script = message.navigation.page_script_hash
            elif kind == "auto_rerun":
                self.timers[message.auto_rerun.fragment_id] = message.auto_rerun.interval
            elif kind == "stop_auto_rerun":
                for gone in message.stop_auto_rerun.fragment_ids:
                    self.timers.pop(gone, None)
            elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
                element = message.delta.new_element
                if element.WhichOneof("type") == "exception":
                    raise RuntimeError(f"the page shows an exception: {element.exception.type}")
                if element.WhichOneof("type") == "button" and "-layer-" in element.button.id:
                    self.buttons[element.button.id] = message.delta.fragment_id
                if (found := SHOWN.search(element.markdown.body)) and found[2] != self.shown:
                    self.sets, self.shown = self.sets + 1, found[2]
                    if self.clicked and found[1] == "Removed":
                        self.figures.append(time.monotonic() - self.clicked)
                        self.clicked = 0.0
            elif kind == "script_finished" and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                return


def run(minutes: float = 10.0, watchers: int = 20, togglers: int = 5) -> Iterator[Row]:
    """One visit of all sessions at once, `minutes` long."""
    try:
        import websockets  # noqa: F401
    except ImportError as error:
        raise TrspError("This benchmark needs websockets.", "Install requirements-dev.txt.") from error
    alone = min(ALONE, minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        made, other = _runs(Store(Path(folder)))
        with _served(Path(folder)) as (port, server):
            _wait(made, 6)
            _rest(made, alone)
            begun, memory = len(_steps(made)), Memory(server)
            visitors = [Visitor(f"run?run={made.id}") for _ in range(watchers)]
            visitors += [Visitor(f"layers?run={other.id}&off=13", clicks=True) for _ in range(togglers)]
            with ThreadPoolExecutor(1, initializer=os.nice, initargs=(19,)) as elsewhere:  # of that thread alone
                elsewhere.submit(lambda: asyncio.run(_visit_all(visitors, port, minutes * 60, memory))).result()
            ended = len(_steps(made))
            _rest(made, alone)
            steps = _steps(made)
            made.cancel()
            while made.held():
                time.sleep(0.2)
    ticks = [s for v in visitors if not v.clicks for s in v.ticks]
    answers = [s for v in visitors if v.clicks for s in v.ticks]
    presses = [s for v in visitors for s in v.presses]
    figures = [s for v in visitors for s in v.figures]
    both, quiet = [*ticks, *answers, *presses], steps[2:begun] + steps[ended + 1 :]
    facts = {
        "protocol": "the server's own (protobuf over WebSocket)",
        "minutes": minutes,
        "watching": watchers,
        "toggling": togglers,
        "reruns": len(both),
        "ticks_median_ms": _ms(ticks, 0.5),
        "ticks_p95_ms": _ms(ticks, 0.95),
        "answers_median_ms": _ms(answers, 0.5),  # of those who toggle: the page waits 300 ms for news before it draws
        "answers_p95_ms": _ms(answers, 0.95),
        "clicks": len(presses),
        "clicks_median_ms": _ms(presses, 0.5),
        "clicks_p95_ms": _ms(presses, 0.95),
        "sets_with_figures": sum(v.sets for v in visitors if v.clicks),
        "clicks_with_figures": len(figures),
        "seconds_to_figures_median": round(_share(figures, 0.5), 1) if figures else None,
    }
    yield row("load_rerun_median_seconds", [_share(both, 0.5)], 0.1, "lower", **facts)
    yield row("load_rerun_p95_seconds", [_share(both, 0.95)], 0.4, "lower")
    lost = [v.lost for v in visitors if v.lost]
    yield row("load_sessions_lost", [len(lost)], 0, "lower", sessions=len(visitors), why=sorted(set(lost)))
    watched = steps[begun + 1 : ended]
    yield row(
        "load_step_over_unwatched",
        [statistics.median(watched) / statistics.median(quiet)] if watched and quiet else [float("inf")],
        1.1,
        "lower",
        step_seconds_unwatched=round(statistics.median(quiet), 3) if quiet else None,
        step_seconds_watched=round(statistics.median(watched), 3) if watched else None,
        steps_unwatched=len(quiet),
        steps_watched=len(watched),
    )
    first, last = memory.ends(min(60.0, minutes * 30))
    yield row(
        "load_memory_last_over_first_minute",
        [last / first],
        1.05,
        "lower",
        server_mb_first_minute=round(first / 1e6, 1),
        server_mb_last_minute=round(last / 1e6, 1),
        server_mb_by_minute=memory.by_minute(),
    )


async def _visit_all(visitors: list[Visitor], port: int, seconds: float, memory: Memory) -> None:
    """All come within ten seconds and stay."""
    spread, until = min(10.0, seconds / 5), time.monotonic() + seconds

    async def come(number: int, visitor: Visitor) -> None:
        await asyncio.sleep(spread * number / len(visitors))
        await visitor.visit(port, until, random.Random(number))  # noqa: S311 - to repeat it

    looking = asyncio.create_task(memory.look())
    await asyncio.gather(*(come(n, v) for n, v in enumerate(visitors)))
    looking.cancel()


class Memory:
    """The server's resident bytes, each second; its children are not in it."""

    def __init__(self, server: subprocess.Popen[bytes]):
        self._process, self._seen = psutil.Process(server.pid), list[tuple[float, int]]()

    async def look(self) -> None:
        while True:
            self._seen.append((time.monotonic(), self._process.memory_info().rss))
            await asyncio.sleep(1.0)

    def ends(self, seconds: float) -> tuple[float, float]:
        """Mean bytes of the first and of the last `seconds`."""
        begin, end = self._seen[0][0], self._seen[-1][0]
        first = [rss for at, rss in self._seen if at - begin <= seconds]
        return statistics.fmean(first), statistics.fmean(rss for at, rss in self._seen if end - at <= seconds)

    def by_minute(self) -> list[float]:
        """Mean megabytes of each minute."""
        begin = self._seen[0][0]
        minutes = itertools.groupby(self._seen, lambda seen: int((seen[0] - begin) // 60))
        return [round(statistics.fmean(rss for _, rss in part) / 1e6, 1) for _, part in minutes]


def _runs(store: Store) -> tuple[Run, Run]:
    """One that the server is to begin, with steps for hours, and one that has finished, whose layers are toggled."""
    settings = {"model": MODEL, "stage1_steps": 1, "stage2_steps": 20_000, "resume_minutes": 0}
    made, other = (store.create(validate.from_values(settings, "quick")) for _ in range(2))
    facts = catalog.facts(MODEL)
    sizes = (facts.n_layers, facts.width, facts.vocabulary, facts.parameters, list(facts.layer_parameters), facts.bytes)
    told = [ev.ModelLoaded(MODEL, facts.architecture, *sizes, "float32", "cpu"), ev.RunFinished(0)]
    record(other, (event for event in told))
    (made.folder / "queued").touch()
    return made, other


def _steps(run: Run) -> list[float]:
    """Seconds of each step of stage 2; probes between them are not in it."""
    times, before = [], 0.0
    for _, at, event in run.read()[0]:
        if isinstance(event, ev.StageTwoStepped):
            times.append(at - before)
        before = at
    return times


def _wait(run: Run, steps: int) -> None:
    """Until the run trains."""
    end = time.monotonic() + 900
    while len(_steps(run)) < steps:
        if run.state().ended or time.monotonic() > end:
            why = run.state().failure
            raise TrspError("The run does not train.", why.message if why else "Look at the machine, and try again.")
        time.sleep(0.5)


def _rest(run: Run, seconds: float) -> None:
    time.sleep(seconds)
    if run.state().ended:
        raise TrspError("The run ended too soon.", "Give it more steps.")


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Port and process of a fresh server over the runs in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    environment = {**os.environ, "TRSP_RUNS": str(folder), "TRSP_DEMO": "1"}
    server = subprocess.Popen(
        [*command, "--server.address=127.0.0.1"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health"):
                break
            time.sleep(0.1)
        yield port, server
    finally:
        server.terminate()
        server.wait()


def _share(values: list[float], share: float) -> float:
    """The value below which `share` of them are; infinity where there are none."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("inf")


def _ms(values: list[float], share: float) -> float | None:
    return round(1000 * _share(values, share), 1) if values else None
