"""What one tab remembers: the run it looks at and the form it fills. The only door to `st.session_state`.

The run's id also stands in the address, so that a refresh, a second tab and a shared link show the same run; so do the
settings of an unfinished form.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import UploadedFile

from trsp_core.errors import Problem
from trsp_core.runs import limits
from trsp_core.schema.config import KNOBS, PRESETS

START = {name: knob.default for name, knob in KNOBS.items()} | PRESETS["quick"]  # an untouched form
KEPT_BY_PRESETS = ("model", "text", "heldout", "ratio", "prompt", "seed", "device", "threads")
GUIDE = ("lesson", "step")  # in the address of whatever page a lesson leads to
OF_FORM = (*KNOBS, "preset")
OF_RUN = ("run", "ask", "kept", "off", "safe")


def run_id() -> str | None:
    """The run in the address, or else the one this tab showed last; it is written to both."""
    wanted = st.query_params.get("run") or st.session_state.get("run")
    if wanted:
        show_run(wanted)
    return wanted


def mine() -> list[str]:
    """Ids of the runs that this tab has started or opened by their address, newest first."""
    return list(reversed(st.session_state.get("mine", [])))


def visitor() -> str:
    """Who has opened this tab, to the limits."""
    context = st.context
    return limits.visitor(context.ip_address or "127.0.0.1", "X-Forwarded-For" in context.headers)


def let_go(file: UploadedFile) -> None:
    """Give back the memory of a file that was brought; its control shows it on, as `DeletedFile`."""
    if context := get_script_run_ctx():
        context.uploaded_file_mgr.remove_file(context.session_id, file.file_id)


def show_run(wanted: str) -> None:
    """Look at this run from now on. What the address says of another run or of an unfinished form goes out of it."""
    st.session_state["run"] = wanted
    known = st.session_state.setdefault("mine", [])
    if wanted not in known:
        known.append(wanted)
    now = st.query_params.get("run")
    if now != wanted:
        _rewrite((k for k in st.query_params if (k in GUIDE if now else k not in OF_FORM)), {"run": wanted})


def _rewrite(kept: Iterable[str], more: Mapping[str, str]) -> None:
    """Leave the parameters `kept` in the address as they are, and put `more` there; no others."""
    st.query_params.from_dict({k: st.query_params.get_all(k) for k in kept} | dict(more))


def leave_run() -> None:
    """Look at no run: the form comes back as it was left."""
    st.session_state["left_out"] = []
    st.session_state.pop("run", None)
    _rewrite((k for k in st.query_params if k in GUIDE), {})


def replay_id() -> str | None:
    """The run that the address asks to replay."""
    return st.query_params.get("replay")


def form() -> dict[str, Any]:
    """Knob name to value, as typed so far, the latest change included. A link's settings are read where the tab comes
    to the form by it, at first or later."""
    address = {k: v for k, v in st.query_params.items() if k in OF_FORM}
    entered = widget("model") not in st.session_state  # the controls were not drawn just before
    if "form" not in st.session_state or (address and (entered or address not in st.session_state["own"])):
        values, st.session_state["left_out"] = read_settings(st.query_params.to_dict())
        st.session_state["form"] = values
        st.session_state.update({widget(name): value for name, value in values.items()})
        _note(address)
    values = st.session_state["form"]
    drawn = [name for name in KNOBS if widget(name) in st.session_state]
    values.update({name: whole(st.session_state[widget(name)]) for name in drawn if KNOBS[name].kind is int})
    values.update({name: st.session_state[widget(name)] for name in drawn if KNOBS[name].kind is not int})
    return values


def whole(value: Any) -> Any:
    """What was typed into a number's field, as an int where it is whole; the check speaks about all else."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_settings(address: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """The form that a link means, and what in it cannot be used: that is left out, and all else is taken.

    A link without a setting means an untouched form; one with settings says all that is no default, or all that
    differs from the `preset` it names.
    """
    given, preset, problems = {k: v for k, v in address.items() if k in KNOBS}, address.get("preset"), []
    values = {name: knob.default for name, knob in KNOBS.items()} if given or preset else dict(START)
    if preset in PRESETS:
        values |= PRESETS[preset]
    elif preset is not None:
        said = f"There is no preset {preset[:40]!r}."
        problems.append(Problem("preset", said, f"Take one of {', '.join(PRESETS)}."))
        values = values if given else dict(START)
    for name, text in given.items():
        value, problem = KNOBS[name].parse(text)
        if problem:
            problems.append(problem)
        else:
            values[name] = value
    for name in set(address) - {*OF_FORM, *OF_RUN, *GUIDE}:
        if meant := difflib.get_close_matches(name.replace("-", "_"), KNOBS, 1, 0.8):
            said = f"There is no setting {name[:40]!r}."
            problems.append(Problem(name, said, f"Did the link mean {meant[0]}?"))
    return values, problems


def _note(address: dict[str, str]) -> None:
    """Remember that this tab has written `address`, or read it: told again by a browser that lags behind, it is no
    news."""
    st.session_state["own"] = [*st.session_state.get("own", []), address][-200:]


def left_out() -> list[Problem]:
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


def knows(key: str) -> bool:
    """Whether a control has a state by now."""
    return key in st.session_state


def start_with(key: str, value: Any) -> None:
    """Set the state of a control that has none yet."""
    st.session_state.setdefault(key, value)


def write_address() -> None:
    """Keep the form in the address: nothing for an untouched form, else every setting that is not a default."""
    values = form()
    wanted = {} if values == START else written(values)
    if {k: v for k, v in st.query_params.items() if k in OF_FORM} != wanted:
        _note(wanted)
        _rewrite((k for k in st.query_params if k not in (*OF_FORM, *OF_RUN)), wanted)


def written(values: Mapping[str, Any]) -> dict[str, str]:
    """A form as parameters of a link, as `read_settings` reads them: all that is no default, at least one."""
    found = {k: write(v) for k, v in values.items() if v != KNOBS[k].default and v is not None}
    return found or {"ratio": write(values["ratio"])}


def write(value: Any) -> str:
    """A value as a word of the address, exactly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


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


def show_set(removed: frozenset[int], protected: frozenset[int] = frozenset()) -> None:
    """Keep the layers that are taken out by hand, and those that no preset may take out, in the address."""
    _set_address("off", ",".join(map(str, sorted(removed))) or None)
    _set_address("safe", ",".join(map(str, sorted(protected))) or None)


def set_in_address(name: str = "off") -> frozenset[int]:
    """The layers that the address takes out, or with `safe` protects; none where it cannot be read."""
    words = (st.query_params.get(name) or "").split(",")
    return frozenset(int(word) for word in words if word.isdecimal() and len(word) < 5)


def tab() -> str:
    """A name of this tab that no other tab has."""
    if "tab" not in st.session_state:
        st.session_state["tab"] = secrets.token_hex(8)
    return st.session_state["tab"]


def lesson() -> tuple[str, int | None]:
    """The lesson in the address, or else the one this tab is in; "" for none. Its step from 0; None where the address
    names a lesson that this tab is not in yet, and no step."""
    given, kept = st.query_params.get("lesson"), st.session_state.get("lesson")
    if not given:
        return kept or ("", None)
    number = st.query_params.get("step") or ""
    if number.isdecimal() and len(number) < 4:
        return given, int(number) - 1
    return (given, kept[1]) if kept and kept[0] == given else (given, None)


def show_lesson(word: str, step: int) -> None:
    """Be in this lesson, at `step` from 0."""
    st.session_state["lesson"] = (word, step)
    _set_address("lesson", word)
    _set_address("step", str(step + 1))


def leave_lesson() -> None:
    """Be in no lesson."""
    st.session_state.pop("lesson", None)
    _set_address("lesson", None)
    _set_address("step", None)
