"""What Layers and Compare look at: a run, or the default model as it came, which needs none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import streamlit as st

from pages.ui.app_state import server, session
from pages.ui.run import run_list, run_status
from pages.ui.run.form import title_of
from pages.ui.style import words
from trsp_core.errors import TrspError
from trsp_core.models.catalog import Facts
from trsp_core.pruning import validate
from trsp_core.runs import replay
from trsp_core.runs.store import Run
from trsp_core.schema.config import KNOBS, RunConfig
from trsp_core.schema.events import ModelLoaded
from trsp_core.schema.run_state import RunState
from trsp_core.workbench import recorded

DEFAULT = "default"  # in the address, instead of a run


@dataclass(frozen=True)
class Subject:
    """A run, or a model as it came.

    Attributes:
        run: None for the default model, of which this tab has no run.
        state: of the run; without one, of a run that has loaded its model and done nothing yet.
        status: of the run; "" without one.
    """

    run: Run | None
    config: RunConfig
    state: RunState
    status: str = ""

    @property
    def id(self) -> str:
        """Under which a tab keeps what belongs to it."""
        return self.run.id if self.run else DEFAULT

    @property
    def depth(self) -> int:
        """L, or 0 where no model was loaded."""
        return self.state.model.n_layers if self.state.model else 0

    @property
    def is_recorded(self) -> bool:
        """Whether the run that ships belongs to it: it is that run, or the model that it began with."""
        return self.run is None or self.run.id == replay.RECORDED

    @property
    def chooser(self) -> str:
        """Who chose `reference`, in words."""
        if self.run is None:
            return "The recorded run"
        return run_status.chooser(self.config)

    @property
    def reference(self) -> list[int]:
        """Layers that a run chose of this model: this one, or the recorded one."""
        return self.state.chosen if self.run else shipped().state.chosen


def choose() -> Subject | None:
    """The run in the address, or one picked from the newest; the default model where there is none, or it is picked.
    None where the run cannot be read, which the page then says."""
    run_id = session.run_id()
    if run_id:
        try:
            return of(server.get_run(run_id))
        except TrspError as error:
            st.warning(f"{words.plain(error.message)} It may have been deleted.", icon=":material/link_off:")
    titles: dict[str, Run | None] = {run.id: run for run in server.runs()[:50]}
    if not titles:
        return default()
    titles[DEFAULT] = None

    def title(name: str) -> str:
        run = titles[name]
        return run_list.title(run) if run else f"{title_of(str(KNOBS['model'].default))}, as it came"

    choice = st.selectbox("Run, or the model as it came", list(titles), format_func=title, key="chosen-run")
    run = titles.get(choice)
    return of(run) if run else default()


def of(run: Run) -> Subject | None:
    """The subject that `run` is; None, with a word on the page, where its settings cannot be read."""
    config = run_status.config_of(run)
    return Subject(run, config, *server.look(run)) if config else None


def default() -> Subject:
    """The default model as it came, with the settings of an untouched form. It need not be on this machine: its sizes
    ship with the recorded figures."""
    config = validate.from_values(session.START)
    facts = server.facts(config.model)
    record = recorded.read()
    sizes = list(facts.layer_parameters) if isinstance(facts, Facts) else record.layer_parameters
    parameters = facts.parameters if isinstance(facts, Facts) else record.parameters
    model = ModelLoaded(config.model, "", len(sizes), 0, 0, parameters, sizes, 0, config.precision, "cpu")
    return Subject(None, config, RunState(model=model))


@st.cache_resource(show_spinner=False)
def shipped() -> Subject:
    """The run that ships with the app, read where it lies."""
    run = Run(replay.FOLDER)
    return Subject(run, run.config(), run.state(), "finished")


def recorded_default() -> Subject:
    """The default model, with what the run that ships has done to it: its layers, but no folder to write to."""
    return replace(shipped(), run=None)


def title(subject: Subject) -> None:
    """Which it is, and how it stands."""
    if subject.run:
        run_status.title(subject.run, subject.config, subject.state, subject.status)
        return
    texts = " and ".join(words.TEXTS[text] for text in (subject.config.text, subject.config.heldout))
    st.markdown(f"#### {words.plain(title_of(subject.config.model))}, as it came")
    st.caption(f"{subject.depth} layers. Figures are of a block each of {texts}. No run is needed.")
