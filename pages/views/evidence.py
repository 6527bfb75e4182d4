"""Evidence: methods and controls on the same blocks, with intervals; and what these data support, in words."""

import contextlib

import streamlit as st

from pages.ui.app_state import server, url_state
from pages.ui.charts import drawing, intervals_chart
from pages.ui.evidence import lost_steps, plan_runs, published, sentences, settings_tab
from pages.ui.style import theme, words
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.experiments import plan_results, plans
from trsp_core.experiments.plan_results import Record
from trsp_core.schema.events import DOMAINS

PLANS = {"ablation": "Does the knowledge move?", "methods": "Which layers?", "transfers": "Which transfer?"}
HERE, SHIPPED = "Runs on this machine", "Recorded with this app"


def records_of(plan: str) -> dict[str, Record]:
    """The plan's records: of the runs here, and the one that ships."""
    records = {}
    file = plan_results.shipped(plan)
    if file.is_file():
        records[SHIPPED] = plan_results.load(file)
    with contextlib.suppress(TrspError):  # none has finished here, or not on the same blocks
        runs, its_plan = server.runs(), plans.read(plan)
        ends = plans.earlier_ends(its_plan, runs) | plans.ends(its_plan, runs)
        records[HERE] = plan_results.gather(its_plan, ends)
    return records


def show(record: Record) -> None:
    """Sentences, pictures, table."""
    for n, sentence in enumerate(sentences.sentences(record)):
        st.markdown(f"#### {sentence}" if n == 0 else sentence)
    for column, domain in zip(st.columns(2, gap="large"), DOMAINS, strict=True):
        with column:
            st.markdown(f"**{words.DOMAINS[domain].capitalize()}**")
            draw(record, intervals_chart.ladder, intervals_chart.rungs(record, domain), "ladder", domain)
    left_column, right_column = st.columns(2, gap="large")
    with left_column:
        st.markdown("**The two domains against each other**")
        draw(record, intervals_chart.domains, intervals_chart.both(record), "domains")
        st.caption("The numbers are those of the rows above.")
    times = intervals_chart.speeds(record)
    with right_column:
        if len(times):
            st.markdown("**Measured speed, and its ceiling**")
            draw(record, intervals_chart.speed, times, "speed")
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


def draw(record: Record, spec, frame, name: str, more: str = "") -> None:
    drawing.show(spec(theme.mode()), frame, f"{name}-{record.plan}-{more}", intervals_chart.ALT[name])


url_state.title("Evidence")
names = [*PLANS.values(), "How the settings matter", "Published figures"]
part = url_state.linked("evidence-part", names[0], url_state.one_of(names))
*tabs, settings, others = st.tabs(names, key=part, on_change="rerun")
for tab, plan in zip(tabs, PLANS, strict=True):
    with tab:
        st.markdown("Every row is a run with the same seed, texts and order of blocks, measured on the same blocks.")
        records = records_of(plan)
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
with settings:
    settings_tab.tab()
    lost_steps.section()
with others:
    st.caption(published.SOURCE)
    st.dataframe(published.table(), hide_index=True, alt="Published perplexities and accuracies.")
    st.caption(published.DOUBTS)
