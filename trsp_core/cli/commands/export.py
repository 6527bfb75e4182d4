"""`export`: a run's model to take away. The token for the hub is read here and passed on in memory alone."""

import signal

import click

from trsp_core import paths
from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.cli.run_figures import run_argument
from trsp_core.export import checkpoint, hub_upload
from trsp_core.runs.store import Run

OUT = "a new folder, or a file that ends in .zip; default a folder in the run's exports"
DTYPE = "convert the weights; default as the run saved them"
PUSH = "also upload to this private repository of the hub, with the token in HF_TOKEN or of the hub's own login"


@command("export", json="one object a line, as it goes")
@run_argument
@click.option("--out", metavar="FOLDER", help=OUT)
@click.option("--dtype", type=click.Choice(checkpoint.DTYPES), help=DTYPE)
@click.option("--push", metavar="OWNER/NAME", default="", help=PUSH)
def main(run: Run, out: str | None, dtype: str | None, push: str, as_json: bool) -> None:
    token = hub_upload.own_token() if push else ""
    target = paths.named(out, "place") if out else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for progress in checkpoint.export(run, target, dtype or "", push, token):
        if as_json or progress.fraction < 1:
            output.tell_progress(progress.message, progress.fraction, as_json)
        else:
            output.show(progress.message)
