"""What one tab remembers: the run it looks at and the form it fills. The only door to `st.session_state`.

The run's id also stands in the address, so that a refresh, a second tab and a shared link show the same run; so do the
settings of an unfinished form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from trsp_core.config import KNOBS, PRESETS

START = {name: knob.default for name, knob in KNOBS.items()} | PRESETS["quick"]  # an untouched form
KEPT_BY_PRESETS = ("model", "text", "heldout", "ratio", "prompt", "seed", "device", "threads")


def run_id() -> str | None:
    """The run in the address, or else the one this tab showed last; it is written to both."""
    wanted = st.query_params.get("run") or st.session_state.get("run")
    if wanted:
        show_run(wanted)
    return wanted


def show_run(wanted: str) -> None:
    """Look at this run from now on."""
    st.session_state["run"] = wanted
    if st.query_params.get("run") != wanted:
        st.query_params.from_dict({"run": wanted})


def leave_run() -> None:
    """Look at no run: the form comes back as it was left."""
    st.session_state["left_out"] = []
    st.session_state.pop("run", None)
    st.query_params.clear()


def replay_id() -> str | None:
    """The run that the address asks to replay."""
    return st.query_params.get("replay")


def form() -> dict[str, Any]:
    """Knob name to value, as typed so far, the latest change included. The first call of a tab reads the address."""
    if "form" not in st.session_state:
        given = {k: v for k, v in st.query_params.items() if k in KNOBS}
        read = {name: KNOBS[name].parse(value) for name, value in given.items()}
        st.session_state["form"] = _fresh(given) | {name: value for name, (value, _) in read.items()}
        st.session_state["left_out"] = [problem for _, problem in read.values() if problem]
    values = st.session_state["form"]
    values.update({name: st.session_state[widget(name)] for name in KNOBS if widget(name) in st.session_state})
    return values


def left_out() -> list[Any]:
    """Problems with settings in the address, which the form did without."""
    form()
    return st.session_state["left_out"]


def fill(values: Mapping[str, Any]) -> None:
    """Put `values` into the form; for callbacks, before the controls are drawn."""
    form().update(values)
    for name, value in values.items():
        st.session_state[widget(name)] = value


def apply_preset(name: str) -> None:
    """Set every knob that the preset means to decide; model, texts, ratio and machine stay."""
    defaults = {k: v.default for k, v in KNOBS.items()}
    wanted = defaults | PRESETS[name]
    fill({k: v for k, v in wanted.items() if k not in KEPT_BY_PRESETS or k in PRESETS[name]})


def preset() -> str | None:
    """The preset that the form agrees with, if any."""
    values = form()
    defaults = {k: v.default for k, v in KNOBS.items()}
    for name, chosen in PRESETS.items():
        wanted = defaults | chosen
        if all(values[k] == wanted[k] for k in KNOBS if k not in KEPT_BY_PRESETS or k in chosen):
            return name
    return None


def widget(name: str) -> str:
    """The key of a knob's control. A control that is not drawn for a while forgets its value; the form does not."""
    return f"knob-{name}"


def seed_widget(name: str) -> str:
    """Make sure that the control about to be drawn starts with the form's value; return its key."""
    key = widget(name)
    if key not in st.session_state:
        st.session_state[key] = form()[name]
    return key


def put(key: str, value: Any) -> None:
    """Set the state of a control before it is drawn."""
    st.session_state[key] = value


def get(key: str) -> Any:
    """The state of a control by its key; None where it has none."""
    return st.session_state.get(key)


def start_with(key: str, value: Any) -> None:
    """Set the state of a control that has none yet."""
    st.session_state.setdefault(key, value)


def write_address() -> None:
    """Keep the form in the address: nothing for an untouched form, else every setting that is not a default."""
    values = form()
    if values == START:
        wanted = {}
    else:
        wanted = {k: _written(v) for k, v in values.items() if v != KNOBS[k].default and v is not None}
        wanted = wanted or {"ratio": _written(values["ratio"])}
    if dict(st.query_params) != wanted:
        st.query_params.from_dict(wanted)


def _fresh(given: Mapping[str, str]) -> dict[str, Any]:
    return {name: knob.default for name, knob in KNOBS.items()} if given else dict(START)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def ticket() -> str | None:
    """The workbench's ticket in the address: the answers that this tab reads."""
    return st.query_params.get("ask")


def show_ticket(wanted: str | None) -> None:
    """Read the answers to this ticket from now on; None reads none."""
    _set_address("ask", wanted)
    _set_address("kept", None)


def kept() -> str | None:
    """The kept comparison in the address."""
    return st.query_params.get("kept")


def show_kept(wanted: str | None) -> None:
    """Look at this kept comparison from now on; None at none."""
    _set_address("kept", wanted)
    _set_address("ask", None)


def _set_address(name: str, wanted: str | None) -> None:
    if wanted is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != wanted:
        st.query_params[name] = wanted


def show_set(removed: frozenset[int]) -> None:
    """Keep the layers that are taken out by hand in the address."""
    _set_address("off", ",".join(map(str, sorted(removed))) or None)


def set_in_address() -> frozenset[int]:
    """The layers that the address takes out; none where it cannot be read."""
    words = (st.query_params.get("off") or "").split(",")
    return frozenset(int(word) for word in words if word.isdecimal() and len(word) < 5)
