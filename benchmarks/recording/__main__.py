"""`python -m benchmarks.recording what-if` and `python -m benchmarks.recording run`: records made anew."""

from __future__ import annotations

import sys

import click

from benchmarks.recording import demo_run, what_if
from trsp_core import formatting
from trsp_core.errors import TrspError
from trsp_core.files import write_atomic
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema import codec
from trsp_core.schema.config import KNOBS
from trsp_core.schema.messages import WhatIf
from trsp_core.workbench import recorded


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("what-if")
def record_what_if() -> None:
    """The default model without each layer alone, and without the layers of the recorded run: about a minute."""
    request = WhatIf(str(KNOBS["model"].default), [])
    record = what_if.record(request, Run(replay.FOLDER).state().chosen)
    write_atomic(recorded.FILE, codec.encode_document(record, recorded.SCHEMA) + "\n")
    click.echo(f"{recorded.FILE.name}: {len(record.sets)} sets, {formatting.size(recorded.FILE.stat().st_size)}")


@main.command("run", context_settings={"ignore_unknown_options": True})
@click.option("--from", "folder", help="a finished run that keeps its model, instead of a new one")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def record_run(folder: str | None, flags: tuple[str, ...]) -> None:
    """A run of the default model, and what its models write; FLAGS are those of `run`, `demo_run.FLAGS` by default."""
    try:
        report = demo_run.record(folder, list(flags or demo_run.FLAGS))
    except TrspError as error:
        click.echo(f"{error.message} {error.remedy}", err=True)
        sys.exit(2)
    click.echo(report)


if __name__ == "__main__":
    main()
