"""How the settings matter: a sweep's record as sentences and as the pictures that its axes allow."""

from __future__ import annotations

import streamlit as st

from pages.ui.app_state import url_state
from pages.ui.charts import drawing, grid_maps, training_lengths
from pages.ui.evidence import sweep_records
from pages.ui.style import theme, words
from trsp_core.experiments.grid_results import Sweep
from trsp_core.schema.events import DOMAINS

COMMAND = "python -m trsp_core sweep --grid FILE"
BARE = 3  # the place of a sweep that no picture fits


def records() -> dict[str, Sweep]:
    """By name, those with a picture first. A study without one is shown over its splits instead."""
    ordered = sorted(sweep_records.sweeps().values(), key=_order)
    elsewhere = sweep_records.over_splits()
    return {sweep.name: sweep for sweep in ordered if _order(sweep) < BARE or sweep.name not in elsewhere}


def _order(sweep: Sweep) -> int:
    """Those by length first, then maps, then paths, then what no picture fits."""
    return [
        bool(training_lengths.arms(sweep)),
        bool(grid_maps.mappable(sweep)),
        bool(grid_maps.path_points(sweep)),
        True,
    ].index(True)


def tab() -> None:
    """Everything about the settings."""
    there = records()
    if not there:
        st.info("No sweep has been recorded yet. The command below makes one of a grid.", icon=":material/info:")
    elif len(there) > 1:
        first, names = next(iter(there)), {name: words.plain(sweep.title) for name, sweep in there.items()}
        key = url_state.linked("sweep", first, url_state.one_of(list(names)))
        show(there[st.pills("Sweep", list(names), format_func=names.__getitem__, key=key) or first])
    else:
        show(next(iter(there.values())))
    st.markdown("Run a grid here or on a cluster; a stopped one goes on where it was:")
    st.code(COMMAND, language="bash")


def show(sweep: Sweep) -> None:
    """Length first, then the map, then the path: whichever of them this sweep has."""
    pictures = [draw(sweep) for draw in (_length, _map, _path)]
    if not any(pictures):
        st.caption("No picture fits what this sweep varies; its figures:")
    with st.expander(f"All {len(sweep.points)} points", expanded=not any(pictures)):
        st.dataframe(grid_maps.table(sweep), hide_index=True, placeholder="–", alt="Every figure of every point.")
    protocol = "; ".join(f"{words.DOMAINS[d]}: {words.plain(text)}" for d, text in sweep.protocol.items())
    missing = f" {sweep.planned - len(sweep.points)} of its points are not done." if unfinished(sweep) else ""
    seeds = len({p.seed for p in sweep.points})
    st.caption(
        f"{words.plain(sweep.model)}, {len(sweep.points)} points, {seeds} {'seed' if seeds == 1 else 'seeds'}; "
        f"{protocol}. Made {words.plain(sweep.made)}.{missing}"
    )


def unfinished(sweep: Sweep) -> bool:
    return len(sweep.points) < sweep.planned


def _length(sweep: Sweep) -> bool:
    if not training_lengths.arms(sweep):
        return False
    contests = training_lengths.duels(sweep)
    st.markdown(f"#### {training_lengths.sentence(contests, 'heldout')}")
    if contests:
        st.markdown(training_lengths.sentence(contests, "calibration"))
    home = [duel for duel in contests if duel.home]
    if home:
        st.badge("Gain in the calibration domain only", icon=":material/home:", color="orange")
        st.caption(f"TRSP beside the control, after {', '.join(str(d.steps) for d in home)} steps.")
    units = ["steps", "seconds"]
    key = url_state.linked(f"by-{sweep.name}", units[0], url_state.one_of(units))
    by = st.segmented_control("Length in", units, key=key) or units[0]
    for column, domain in zip(st.columns(2, gap="large"), DOMAINS, strict=True):
        with column:
            st.markdown(f"**{words.DOMAINS[domain].capitalize()}**")
            frame = training_lengths.curves(sweep, domain, by)
            spec = training_lengths.length(theme.mode(), by, training_lengths.ticks(frame, by))
            drawing.show(spec, frame, f"length-{sweep.name}-{domain}-{by}", training_lengths.ALT)
    st.caption(training_lengths.legend(sweep))
    return True


def _map(sweep: Sweep) -> bool:
    there = grid_maps.mappable(sweep)
    if not there:
        return False
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.markdown("#### A map of the settings")
        arm = next(iter(there))
        if len(there) > 1:
            key = url_state.linked(f"arm-{sweep.name}", arm, url_state.one_of(list(there)))
            arm = st.selectbox("Arm", list(there), format_func=there.__getitem__, key=key)
        domain = st.segmented_control(
            "Domain",
            list(reversed(DOMAINS)),
            format_func=lambda d: words.DOMAINS[d].capitalize(),
            key=url_state.linked(f"domain-{sweep.name}", "heldout", url_state.one_of(DOMAINS)),
        )
    sides, domain = grid_maps.sides(sweep, arm), domain or "heldout"
    if sides:
        frame = grid_maps.cells(sweep.of(arm), *sides, domain)
        drawing.show(
            grid_maps.heat(theme.mode(), *sides), frame, f"map-{sweep.name}-{arm}-{domain}", grid_maps.ALT["map"]
        )
        st.caption(grid_maps.caption(sweep, arm, domain, frame))
    return True


def _path(sweep: Sweep) -> bool:
    points = grid_maps.path_points(sweep)
    if not points:
        return False
    st.markdown("#### The regularisation path: which layers give way as λ₁ grows")
    spec = grid_maps.paths(theme.mode(), tuple(p.at[grid_maps.PATH_AXIS] for p in points))
    drawing.show(spec, grid_maps.path(points), f"path-{sweep.name}", grid_maps.ALT["path"])
    st.caption(
        "Each line is a layer: its weight when it was chosen, or at the end of stage 1. A dot: chosen under this λ₁. "
        "Orange lines are chosen under most values; numbers stand at the right ends."
    )
    return True
