"""`resume`: go on with a run that was stopped, lost or failed."""

from trsp_core.cli import output
from trsp_core.cli.command import command
from trsp_core.cli.commands.run import drive
from trsp_core.cli.run_figures import run_argument
from trsp_core.runs import resume
from trsp_core.runs.store import Run


@command("resume", json="the summary, at the end")
@run_argument
def main(run: Run, as_json: bool) -> int:
    outlook = resume.outlook(run)
    resume.reopen(run)
    output.tell(f"Run {run.id}. {outlook} Ctrl-C stops.")
    return drive(run, as_json)
