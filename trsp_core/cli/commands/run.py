"""`run`: prune a model. Its flags are made from the knobs; what can be refused is refused before there is a folder."""

import click

from trsp_core import formatting, paths
from trsp_core.cli import output, run_figures
from trsp_core.cli.command import command
from trsp_core.cli.commands import fetch
from trsp_core.data import special_tokens
from trsp_core.errors import TrspError, refuse
from trsp_core.models import catalog
from trsp_core.preparation import preflight
from trsp_core.preparation.preflight import RunSetup
from trsp_core.pruning import validate
from trsp_core.runs import steering, worker
from trsp_core.runs.store import Run, Store
from trsp_core.schema import config, run_state, turns
from trsp_core.schema.config import GROUPS, KNOBS, PRESETS, RunConfig
from trsp_core.schema.events import Event, PhaseStarted
from trsp_core.schema.knobs import Knob
from trsp_core.schema.run_state import RunState


class GroupedFlags(click.Command):
    """A command whose help lists the flags of the knobs under the titles of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {knob.name: GROUPS[knob.group] for knob in KNOBS.values()}
        for section in ("Options", *GROUPS.values()):
            flags = [flag for flag in self.get_params(ctx) if titles.get(flag.name or "", "Options") == section]
            with formatter.section(section):
                formatter.write_dl([record for flag in flags if (record := flag.get_help_record(ctx))])


def _flag(knob: Knob) -> click.Option:
    """The flag of a knob. Its value stays text here: `config.parse` reads it, as it does for the page."""
    facts = [f"paper: {knob.paper}"] if knob.paper else []
    if knob.low is not None or knob.high is not None:
        facts.append(knob.bounds)
    facts.append(f"default {knob.default!r}" if knob.kind is str else f"default {str(knob.default).lower()}")
    text = f"{knob.label}. {knob.help} ({'; '.join(facts)})"
    if knob.kind is bool:
        return click.Option([knob.flag], is_flag=False, flag_value="true", metavar="[true|false]", help=text)
    return click.Option([knob.flag], metavar="|".join(knob.choices) or knob.kind.__name__.upper(), help=text)


@command("run", json="the summary, at the end", cls=GroupedFlags, params=[_flag(knob) for knob in KNOBS.values()])
@click.option("--preset", type=click.Choice(tuple(PRESETS)), help="start from these settings; flags change them")
@click.option(
    "--steer",
    "words",
    multiple=True,
    metavar="STAGE:STEP:SETTING=VALUE",
    help="turn a knob after this step of this stage, for example 1:7:lambda_1=0.1; any number of them",
)
@click.option("--out", metavar="FOLDER", help="the run's folder; default a new one under runs/")
def main(preset: str | None, out: str | None, words: tuple[str, ...], as_json: bool, **flags: str | None) -> int:
    wanted = [turns.from_word(word) for word in words]
    setup = _setup(config.parse({name: value for name, value in flags.items() if value is not None}, preset))
    from trsp_core.models import loading  # torch comes in here, which the run needs anyway

    special_tokens.begun(loading.check(setup.facts), setup.config.prompt)
    steering.refuse_scheduled(setup.config, wanted)
    run = Store().create(setup.config, paths.named(out, "place") if out else None)
    steering.schedule(run, wanted)
    roughly = " (a rough figure: nothing was timed on this machine yet)" if setup.forecast.rough else ""
    output.tell(f"Run {run.id} in {run.folder}")
    seconds, memory = formatting.clock(setup.forecast.seconds), formatting.size(setup.forecast.peak_bytes)
    output.tell(f"About {seconds}{roughly}, {memory} of memory. Ctrl-C stops.")
    return drive(run, as_json, setup)


def _setup(settings: RunConfig) -> RunSetup:
    """The run as `preflight` lets it pass. A model that is not here is fetched first."""
    try:
        return preflight.preflight(settings)
    except TrspError:
        if not catalog.is_fetchable(settings.model) or catalog.is_ready(settings.model):
            raise
    refuse(validate.check(settings))
    fetch.fetch(settings.model)
    return preflight.preflight(settings)


def drive(run: Run, as_json: bool, setup: RunSetup | None = None) -> int:
    """Execute and record the config in a run folder, from where it broke off; the exit code says how it ended.

    Args:
        setup: of this config, where `preflight` has been asked already.
    """
    line = output.ProgressLine()

    def watch(state: RunState, event: Event) -> None:
        line.tell(run_figures.progress(state), passing=line.live or not isinstance(event, PhaseStarted))

    state = worker.drive(run, watch, setup)
    line.close()
    figures = {"run": run.id, "folder": str(run.folder), **run_state.summary(state)}
    output.show_either(figures, run_figures.account(figures), as_json)
    if state.failure:
        output.tell(state.failure.message, state.failure.remedy, *state.failure.trace.splitlines())
    return worker.CODES[state.ended]
