"""What the commands of the shell have in common: a summary, the flag --json, and a run or a file to name."""

from collections.abc import Callable
from typing import Any

import click

from trsp_core import paths

HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
EPILOG = "Exit codes: 0 done, 2 bad input, 3 failed, 130 stopped."
SUMMARIES = {
    "run": "prune a model, and write all that happens into a run folder",
    "resume": "go on with a run that was stopped, lost or failed, to the end that it would have had",
    "steer": "turn the knobs of a run while it runs; pause it, let it take one step, go on, end its stage",
    "list": "the runs, newest first",
    "show": "the figures of one run",
    "methods": "the ways to choose layers",
    "transfers": "the ways to move the chosen layers' work into the kept ones",
    "families": "which architectures can be pruned, and the families with something particular to them",
    "compare": "run a plan: a base and its variations, each once, and print them in one table",
    "sweep": "run a grid: every point of it once, here or on a cluster, and write one small record of them",
    "eval": "let a model answer questions by likelihood: multiple choice, or the last word of a passage",
    "export": "a run's model to take away: a checkpoint folder with a card, proved by a fresh process",
    "report": "a run as one HTML file, charts inside, that opens offline",
    "curves": "a run's curves as CSV",
    "doctor": "what is installed, which models and texts are there, what the machine can do",
    "models": "the models that are there; with words, those of the hub; with owner/name, what the hub says of it",
    "fetch": "get a model onto this machine",
}

out_file = click.option("--out", type=paths.writable, required=True, metavar="FILE", help="where it is written")


def command(name: str, json: str = "", **settings: Any) -> Callable[[Callable[..., int | None]], click.Command]:
    """A decorator that makes a function the command `name`; it returns an exit code, or None for 0.

    Args:
        json: what exactly --json prints, where that is not plain.
        settings: of `click.command`.
    """
    summary = SUMMARIES[name]
    settings |= {"help": f"{summary[0].upper()}{summary[1:]}.", "epilog": EPILOG, "context_settings": HELP_FLAGS}
    json_flag = click.option("--json", "as_json", is_flag=True, help=f"print JSON on stdout{json and f': {json}'}")
    return lambda function: click.command(name, **settings)(json_flag(function))
