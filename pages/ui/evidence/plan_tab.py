"""A plan's tab: its records, as sentences, pictures and a table, and the panel that runs it. One split each."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import streamlit as st

from pages.ui.app_state import server, url_state
from pages.ui.charts import drawing, intervals_chart
from pages.ui.evidence import plan_runs, sentences
from pages.ui.style import theme, words
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.experiments import plan_results, plans
from trsp_core.experiments.plan_results import Record
from trsp_core.runs.store import Run
from trsp_core.schema.events import DOMAINS

HERE, SHIPPED = "Runs on this machine", "Recorded with this app"


def tab(plan: str) -> None:
    """Everything about a built-in plan."""
    st.markdown("Every row is a run with the same seed, texts and order of blocks, measured on the same blocks.")
    records = _records(plan)
    if len(records) > 1:
        key = url_state.linked(f"figures-{plan}", SHIPPED, url_state.one_of(list(records)))
        choice = st.segmented_control("Figures", list(records), key=key)
        show(records[choice or SHIPPED])
    elif records:
        st.caption(next(iter(records)))
        show(next(iter(records.values())))
    else:
        st.info("Nothing has been measured yet. The button below does it.", icon=":material/info:")
    plan_runs.panel(plan)


def _records(plan: str) -> dict[str, Record]:
    """The plan's records: the one that ships, and of the runs here."""
    records = {}
    file, runs = plan_results.shipped(plan), server.runs()
    if file.is_file():
        records[SHIPPED] = _shipped(str(file), file.stat().st_mtime_ns)
    here = _of_runs(plan, plans.fingerprint(runs), runs)
    return records | ({HERE: here} if here else {})


@st.cache_resource(show_spinner=False, max_entries=8)
def _shipped(path: str, changed: int) -> Record:
    return plan_results.load(Path(path))


@st.cache_resource(show_spinner=False, max_entries=8)
def _of_runs(plan: str, fingerprint: tuple[Any, ...], _runs: list[Run]) -> Record | None:
    """None where none of the plan's has finished, or not on the same blocks."""
    with contextlib.suppress(TrspError):
        built_in = plans.read(plan)
        return plan_results.gather(built_in, plans.earlier_ends(built_in, _runs) | plans.ends(built_in, _runs))
    return None


def show(record: Record) -> None:
    """Sentences, pictures, table."""
    for n, sentence in enumerate(sentences.sentences(record)):
        st.markdown(f"#### {sentence}" if n == 0 else sentence)
    for column, domain in zip(st.columns(2, gap="large"), DOMAINS, strict=True):
        with column:
            st.markdown(f"**{words.DOMAINS[domain].capitalize()}**")
            _draw(record, intervals_chart.ladder, intervals_chart.rungs(record, domain), "ladder", domain)
    left_column, right_column = st.columns(2, gap="large")
    with left_column:
        st.markdown("**The two domains against each other**")
        _draw(record, intervals_chart.domains, intervals_chart.both(record), "domains")
        st.caption("The numbers are those of the rows above.")
    times = intervals_chart.speeds(record)
    with right_column:
        if len(times):
            st.markdown("**Measured speed, and its ceiling**")
            _draw(record, intervals_chart.speed, times, "speed")
            st.caption(
                "The line is L / (L − K), what removing K of L equal layers can give at most; spread of repeats."
            )
    st.dataframe(intervals_chart.table(record), hide_index=True, placeholder="–", alt="Every figure of every row.")
    home = [row.title for row in record.rows[1:] if plan_results.only_at_home(record, row, "direct")]
    if home:
        st.badge("Gain in the calibration domain only", icon=":material/home:", color="orange")
        st.caption(f"Beside deleting at once: {words.plain(', '.join(home))}.")
    protocol = "; ".join(f"{words.DOMAINS[d]}: {words.plain(text)}" for d, text in record.protocol.items())
    st.caption(
        f"Perplexity and KL: {intervals.direction('kl')}; KL is of the first few blocks alone. Brackets and bars: 95 % "
        "t intervals over blocks; differences are taken block by block. "
        f"{words.plain(record.model)}, {protocol}. One seed. Made {words.plain(record.made)}."
    )


def _draw(record: Record, spec, frame, name: str, more: str = "") -> None:
    drawing.show(spec(theme.mode()), frame, f"{name}-{record.plan}-{more}", intervals_chart.ALT[name])
