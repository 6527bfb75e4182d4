"""A recorded run shown again, faster: the same events, on a clock that is squeezed and has its pauses cut.

What is seen at a moment of the replay is the fold of the first n events, as it was while the run went on.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from trsp_core.schema import events
from trsp_core import paths
from trsp_core.schema.run_state import Line, RunState, fold
from trsp_core.runs.store import Run

RECORDED = "20261125-032000-recorded"  # the id of the run that ships with the app
FOLDER = paths.ASSETS / "demo_run"
SECONDS = 36.0  # a whole run
PAUSES = {"choose": 1.0, "repair": 0.6, "transfer": 0.6, "pruned": 1.0}  # the longest wait for an event, recorded seconds, by phase
PAUSE = 0.2  # in phases where little moves on the screen


@dataclass(frozen=True)
class Timeline:
    """A run's events with the moments at which a replay shows them, in squeezed seconds from 0 on."""

    lines: list[Line]
    times: list[float]

    @property
    def seconds(self) -> float:
        """How long the whole replay takes at its plain speed; 0 where there is nothing to tell."""
        return self.times[-1] if self.times else 0.0

    def count(self, moment: float) -> int:
        """How many events have happened at `moment`; the first one has from the start."""
        return bisect_right(self.times, moment + 1e-9)

    def state(self, moment: float) -> RunState:
        """The run as it was at `moment`, seconds into the replay."""
        return fold(RunState(), self.lines[: self.count(moment)])


def timeline(run: Run) -> Timeline:
    """The events of `run` so far that count, on the squeezed clock: never slower than they happened."""
    lines, times, now, before, longest = run.state().lines, [], 0.0, None, PAUSE
    for _, at, event in lines:
        gap = 0.0 if before is None else max(at - before, 0.0)
        now, before = now + min(gap, longest), at
        times.append(now)
        if isinstance(event, events.PhaseStarted):
            longest = PAUSES.get(event.name, PAUSE)
    scale = min(SECONDS / now, 1.0) if now else 1.0
    return Timeline(lines, [moment * scale for moment in times])


LONGEST_LOOK = 1.5  # seconds: a longer silence between two looks is a tab in the background, not time that was watched
MOST_ECHOES = 4  # positions that a slow browser may still report back


@dataclass(frozen=True)
class Playhead:
    """Where one visitor's replay stands.

    Attributes:
        at: the moment shown, in squeezed seconds. `end`: the last one.
        speed: squeezed seconds a second.
        last_look: the clock at the last look, None before the first.
        recent: the latest positions that were shown. A browser sends its slider's position with whatever else is
            clicked, and one that lags behind sends an old one; that is nobody's wish to go back.
    """

    end: float
    at: float = 0.0
    playing: bool = True
    speed: float = 1.0
    last_look: float | None = None
    recent: tuple[float, ...] = ()

    @property
    def position(self) -> float:
        """`at` for a slider: between the whole hundredths that a person can choose."""
        return min(round(self.at, 2) + 0.001, self.end)

    def look(self, clock: float) -> Playhead:
        """The head at `clock`, seconds of a monotonic clock; it stops at the end."""
        seconds = min(max(clock - self.last_look, 0.0), LONGEST_LOOK) if self.playing and self.last_look is not None else 0.0
        at = min(self.at + seconds *  self.speed, self.end)
        next_head = replace(self, at=at, last_look=clock, playing=self.playing and at < self.end)
        return replace(next_head, recent=(*self.recent, next_head.position)[-MOST_ECHOES:])

    def play(self) -> Playhead:
        """Go on; from the start again where it has ended."""
        return replace(self, playing=True, at=0.0 if self.at >= self.end else self.at, last_look=None)

    def pause(self) -> Playhead:
        return replace(self, playing=False)

    def restart(self) -> Playhead:
        return replace(self, playing=True, at=0.0, last_look=None)

    def at_speed(self, speed: float) -> Playhead:
        return replace(self, speed=speed)

    def seek(self, position: float) -> Playhead:
        """Stand still at `position`; an echo of what was shown changes nothing."""
        if position in self.recent:
            return self
        return replace(self, playing=False, at=min(max(position, 0.0), self.end))
