"""Over splits: a study's sentences, its pictures with a dot a split, its table, and how far choices depend on the
split."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import url_state
from pages.ui.charts import drawing, splits_charts
from pages.ui.evidence import split_sentences, sweep_records
from pages.ui.style import theme, words
from trsp_core.experiments import studies
from trsp_core.experiments.studies import SplitStudy
from trsp_core.schema.events import DOMAINS

COMMAND = "python -m trsp_core sweep --grid FILE"


def tab() -> None:
    """Every study that is recorded, one at a time."""
    st.markdown(
        "Every row was run on every split: other articles to calibrate and to measure, in another order. What holds on "
        "one split need not hold on the next, so the intervals here are over splits."
    )
    there = sweep_records.over_splits()
    if there:
        names = {name: words.plain(study.sweep.title) for name, study in there.items()}
        name = next(iter(names))
        if len(names) > 1:
            key = url_state.linked("study", name, url_state.one_of(list(names)))
            name = st.pills("Study", list(names), format_func=names.__getitem__, key=key) or name
        show(there[name])
    else:
        st.info("No study has been recorded yet. The command below makes one of a grid.", icon=":material/info:")
    st.markdown("Run a grid with a `seed` axis here or on a cluster; a stopped one goes on where it was:")
    st.code(COMMAND, language="bash")


def show(study: SplitStudy) -> None:
    """Sentences, pictures, table."""
    for n, sentence in enumerate(split_sentences.lines(study)):
        st.markdown(f"#### {sentence}" if n == 0 else sentence)
    if splits_charts.ticks(study):
        _by_ratio(study)
    else:
        _rows(study)
    _choices(study)
    _caption(study)


def _rows(study: SplitStudy) -> None:
    reference = study.reference
    beside = words.plain(reference.title) if reference else "the control"
    pictures = {
        "pairs": (splits_charts.pairs, f"Within each split, beside {beside}"),
        "levels": (splits_charts.levels, "Perplexity"),
    }
    for name, (frame_of, title) in pictures.items():
        for column, domain in zip(st.columns(2, gap="large"), DOMAINS, strict=True):
            frame = frame_of(study, domain)
            if len(frame):
                with column:
                    st.markdown(f"**{title}: {words.DOMAINS[domain]}**")
                    _draw(study, splits_charts.rows(theme.mode(), name), frame, name, domain)
    better = (beside, "the other method") if study.of_choices else ("the row", beside)
    st.caption(
        "A small dot is a split; the large one is the mean over splits (of logarithms), the bar its 95 % t interval. "
        "Splits differ in their texts, so the bars of perplexity are wide: which of two rows is better is to be read "
        f"from the ratios within each split. There green says that {better[0]} is better for sure, blue that "
        f"{better[1]} is, grey that they are not told apart."
    )
    _table(studies.cells(study))


def _by_ratio(study: SplitStudy) -> None:
    for column, domain in zip(st.columns(2, gap="large"), DOMAINS, strict=True):
        with column:
            st.markdown(f"**{words.DOMAINS[domain].capitalize()}**")
            spec = splits_charts.ratio_lines(theme.mode(), splits_charts.ticks(study))
            _draw(study, spec, splits_charts.ratios(study, domain), "ratios", domain)
    st.caption(
        "A small dot is a split, a line goes through their means (of logarithms). The dashed line is ten times the "
        "dense model's perplexity. Orange: deleted at once; blue: deleted, then trained; green: with a transfer. The "
        "table has both domains in each cell, calibration first."
    )
    _table(studies.ratio_cells(study))
    with st.expander("Every row, with intervals"):
        _table(studies.cells(study))


def _table(cells: list[list[str]]) -> None:
    st.dataframe(splits_charts.table(cells), hide_index=True, placeholder="–", alt="Every row's figures over splits.")


def _choices(study: SplitStudy) -> None:
    if not study.spreads:
        return
    st.markdown("#### How often each layer goes")
    _draw(study, splits_charts.strips(theme.mode()), splits_charts.strip(study), "strip")
    st.markdown("\n".join(f"- {sentence}" for sentence in split_sentences.spreads(study)))


def _draw(study: SplitStudy, spec, frame, name: str, more: str = "") -> None:
    drawing.show(spec, frame, f"{name}-{study.sweep.name}-{more}", splits_charts.ALT[name])


def _caption(study: SplitStudy) -> None:
    sweep = study.sweep
    protocol = "; ".join(f"{words.DOMAINS[d]}: {words.plain(text)}" for d, text in sweep.protocol.items())
    missing = sweep.planned - len(sweep.points)
    unfinished = f" {missing} of its {sweep.planned} runs are not done." if missing > 0 else ""
    seeds = ", ".join(map(str, study.splits))
    st.caption(
        f"{words.plain(sweep.model)}, {split_sentences.count(len(study.splits))} (seeds {seeds}), each {protocol}. "
        f"Made {words.plain(sweep.made)}.{unfinished}"
    )
