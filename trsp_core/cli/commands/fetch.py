"""`fetch`: get a model onto this machine."""

import click

from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.models import download
from trsp_core.runs import limits


def fetch(model: str, accept_terms: bool = False, as_json: bool = False) -> None:
    """Get a model, all news of it printed once.

    Raises:
        TrspError: it cannot be had, or its terms have to be accepted first.
    """
    last_progress = None
    for progress in download.fetch(model, limits.current(), accept_terms):
        if progress != last_progress:
            output.tell_progress(progress.message, progress.fraction, as_json)
        last_progress = progress


@command("fetch", json="one object a line, as it goes")
@click.argument("model", metavar="MODEL", help="a name of the catalogue, or a hub id (owner/name)")
@click.option("--accept-terms", is_flag=True, help="of a model that has some; read them first")
def main(model: str, accept_terms: bool, as_json: bool) -> None:
    fetch(model, accept_terms, as_json)
