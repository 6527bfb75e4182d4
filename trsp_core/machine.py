"""What this machine has: free memory, and how fast it multiplies matrices, as measured by earlier runs."""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path

from trsp_core import formatting, paths
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic

MOST_RATES = 5  # measurements that are remembered; their median counts, so that one busy moment changes little


def require_memory(least_bytes: int, what: str) -> None:
    """Check that `least_bytes` of memory are free now.

    Args:
        what: what needs them, the subject of the message, such as "This run".

    Raises:
        TrspError: they are not.
    """
    free = available_memory()
    if least_bytes > free:
        raise TrspError(
            f"{what} needs about {formatting.size(least_bytes)} of memory, {formatting.size(free)} are free.",
            "Choose a smaller model, shorter or fewer blocks a step, no training of W (--stage2-steps 0), or bfloat16.",
        )


def available_memory() -> int:
    """Bytes of memory that a new process may still take: what is free on the machine, or less where the container
    (cgroup) has a limit."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used, stat in CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            cached = [line.split()[1] for line in stat.read_text().splitlines() if line.startswith(_RECLAIMED)]
            used_bytes = int(used.read_text()) - sum(int(n) for n in cached)
            free = min(free, int(limit.read_text()) - used_bytes)  # "max" is no number: no limit
    return max(free, 0)


_CGROUP = Path("/sys/fs/cgroup")
_RECLAIMED = ("inactive_file ", "total_inactive_file ")
CGROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat"),
    (
        _CGROUP / "memory/memory.limit_in_bytes",
        _CGROUP / "memory/memory.usage_in_bytes",
        _CGROUP / "memory/memory.stat",
    ),
)


def read_rate() -> float | None:
    """GFLOP/s of float32 matrix products: the median of the last five measurements on this machine; None where nothing
    was measured yet."""
    rates = _rates()
    return statistics.median(rates) if rates else None


def write_rate(gflops: float) -> None:
    """Remember a measured rate, in GFLOP/s, in the cache folder. Where that cannot be written nothing is raised:
    forecasts stay rough, nothing worse."""
    path = paths.home() / "machine.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"gflops": [*_rates(), round(gflops, 1)][-MOST_RATES:]}))


def _rates() -> list[float]:
    try:
        rates = json.loads((paths.home() / "machine.json").read_text("utf-8"))["gflops"]
        return [float(r) for r in rates if float(r) > 0][-MOST_RATES:]
    except (OSError, ValueError, KeyError, TypeError):
        return []
