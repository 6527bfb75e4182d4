"""Runs independent passes side by side: each in a thread of its own, with its share of the cores.

When all cores share each matrix product of a pass, they wait for each other some hundred times; side by side they wait
once, at the end. So two passes on two cores take about a sixth less time (`python -m benchmarks what_if`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def lanes(device: torch.device, tasks: int) -> int:
    """How many of `tasks`, a number of passes, should run at once on `device`: on a CPU one a thread, elsewhere one."""
    return min(tasks, torch.get_num_threads()) if device.type == "cpu" else 1


def run(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """Run `tasks`, and return what each of them returns, in order. Each task has to set its gradient mode itself, since
    torch keeps one for each thread.

    Raises:
        The first error among the tasks, once all of them have ended.
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
