"""Independent passes side by side: each in a thread of its own, with its share of the cores.

Passes that share every matrix product among the cores wait for each other some hundred times; side by side they wait
once, at the end. On two cores two passes take about a sixth less time so (`python -m benchmarks what_if`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def lanes(device: torch.device, tasks: int) -> int:
    """How many of `tasks` should run at once on `device`."""
    return min(tasks, torch.get_num_threads()) if device.type == "cpu" else 1


def run(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """What each task returns, in order. A task sets its own grad mode (torch keeps that by thread).

    Raises:
        whatever a task raises, after all have ended.
    """
    cores, wide = torch.get_num_threads(), lanes(device, len(tasks))
    if wide < 2:
        return [task() for task in tasks]
    torch.set_num_threads(cores // wide)
    try:
        with ThreadPoolExecutor(wide, "pass") as pool:  # new threads: a thread takes the number of cores at its start
            return [future.result() for future in [pool.submit(task) for task in tasks]]
    finally:
        torch.set_num_threads(cores)
