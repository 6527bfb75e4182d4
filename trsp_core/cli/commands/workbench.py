"""`workbench`: the app's child process that answers what-if and generation requests on stdin. Not for people."""

import os

import click

from trsp_core.runs import limits


@click.command("workbench", hidden=True)
def main() -> int:
    stands_back = limits.current().workbench_yields
    if stands_back:
        _stand_back()
    from trsp_core.workbench import worker  # torch comes in here

    return worker.serve(stands_back)


def _stand_back() -> None:
    """Take only what other processes leave of the cores, and of those one. A kernel that groups processes by their
    session ("autogroup") heeds this within a session alone, so the server starts no session for its children."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif hasattr(os, "nice"):
        os.nice(19)
