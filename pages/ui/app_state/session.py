"""What one tab remembers: the run it looks at and the form it fills. The only door to `st.session_state`.

The run's id also stands in the address, so that a refresh, a second tab and a shared link show the same run; so do the
settings of an unfinished form.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import streamlit as st
from streamlit.runtime import Runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import UploadedFile

from trsp_core import formatting
from trsp_core.errors import Problem
from trsp_core.runs import limits
from trsp_core.schema.config import KNOBS, PRESETS

START = {name: knob.default for name, knob in KNOBS.items()} | PRESETS["quick"]  # an untouched form
KEPT_BY_PRESETS = ("model", "text", "heldout", "ratio", "prompt", "seed", "device", "threads")
GUIDE = ("lesson", "step")  # in the address of whatever page a lesson leads to
OF_FORM = (*KNOBS, "preset")
OF_RUN = ("run", "replay", "ask", "kept", "off", "safe")
FOREIGN = ("utm_", "_", "fbclid", "gclid")  # what names begin with that others attach to a link
MOST_UNKNOWN = 5  # names that a link is told of


def run_id() -> str | None:
    """The run in the address, or else the one this tab showed last; it is written to both."""
    run = st.query_params.get("run") or st.session_state.get("run")
    if run:
        show_run(run)
    return run


def mine() -> list[str]:
    """Ids of the runs that this tab has started or opened by their address, newest first."""
    return list(reversed(st.session_state.get("mine", [])))


def visitor() -> str:
    """Who has opened this tab, to the limits."""
    context = st.context
    return limits.visitor(context.ip_address or "127.0.0.1", "X-Forwarded-For" in context.headers)


def listening() -> Callable[[], bool]:
    """A function that tells, on any thread, whether this tab is still connected."""
    context = get_script_run_ctx()
    if context is None:
        return lambda: False
    session_id = context.session_id
    return lambda: Runtime.exists() and Runtime.instance().is_active_session(session_id)


def let_go(file: UploadedFile) -> None:
    """Free the memory of an uploaded file. Its control goes on showing it, as a `DeletedFile`."""
    if context := get_script_run_ctx():
        assert isinstance(context.uploaded_file_mgr, MemoryUploadedFileManager)
        context.uploaded_file_mgr.remove_file(context.session_id, file.file_id)


def show_run(run: str) -> None:
    """Look at this run from now on. What the address says of another run or of an unfinished form goes out of it."""
    st.session_state["run"] = run
    runs = st.session_state.setdefault("mine", [])
    if run not in runs:
        runs.append(run)
    now = st.query_params.get("run")
    if now != run:
        _rewrite((k for k in st.query_params if (k in GUIDE if now else k not in OF_FORM)), {"run": run})


def _rewrite(names: Iterable[str], more: Mapping[str, str]) -> None:
    """Leave the parameters `names` in the address as they are, and put `more` there; no others."""
    st.query_params.from_dict({k: st.query_params.get_all(k) for k in names} | dict(more))


def leave_run() -> None:
    """Look at no run: the form comes back as it was left."""
    st.session_state["left_out"] = []
    st.session_state.pop("run", None)
    _rewrite((k for k in st.query_params if k in GUIDE), {})


def replay_id() -> str | None:
    """The run that the address asks to replay."""
    return st.query_params.get("replay")


def form() -> dict[str, Any]:
    """Every knob's value as typed so far, the latest change included. The settings in the address are read when the tab
    comes to the form by a link."""
    address = {k: v for k, v in st.query_params.items() if k in OF_FORM}
    entered = widget("model") not in st.session_state  # the controls were not drawn just before
    if "form" not in st.session_state or (address and (entered or address not in st.session_state["own"])):
        # what is in the session and no setting is the control of another page
        names = [name for name in st.query_params if name in OF_FORM or name not in st.session_state]
        values, st.session_state["left_out"] = read_settings({name: st.query_params[name] for name in names})
        st.session_state["form"] = values
        st.session_state.update({widget(name): value for name, value in values.items()})
        _note(address)
    values = st.session_state["form"]
    controls = [name for name in KNOBS if widget(name) in st.session_state]
    values.update({name: whole(st.session_state[widget(name)]) for name in controls if KNOBS[name].kind is int})
    values.update({name: st.session_state[widget(name)] for name in controls if KNOBS[name].kind is not int})
    return values


def whole(value: Any) -> Any:
    """What was typed into a number's field, as an int where it is whole; the check speaks about all else."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_settings(address: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """A link as a form, and a problem for each of its settings that cannot be used; those are left out.

    A link without a setting means an untouched form; one with settings says all that is no default, or all that
    differs from the `preset` it names.
    """
    settings, preset, problems = {k: v for k, v in address.items() if k in KNOBS}, address.get("preset"), []
    values = {name: knob.default for name, knob in KNOBS.items()} if settings or preset else dict(START)
    if preset in PRESETS:
        values |= PRESETS[preset]
    elif preset is not None:
        message = f"There is no preset {preset[:40]!r}."
        problems.append(Problem("preset", message, f"Take one of {', '.join(PRESETS)}."))
        values = values if settings else dict(START)
    for name, text in settings.items():
        value, problem = KNOBS[name].parse(text)
        if problem:
            problems.append(problem)
        else:
            values[name] = value
    unknown_names = [name for name in address if name not in (*OF_FORM, *OF_RUN, *GUIDE)]
    for name in [name for name in unknown_names if not name.startswith(FOREIGN)][:MOST_UNKNOWN]:
        meant = difflib.get_close_matches(name.replace("-", "_"), KNOBS, 1, 0.8)
        remedy = f"Did the link mean {meant[0]}?" if meant else "The rest of the link is used."
        problems.append(Problem(name, f"There is no setting {name[:40]!r}.", remedy))
    return values, problems


def _note(address: dict[str, str]) -> None:
    """Remember an address that this tab has written or read. A browser that lags behind may send it once more, and it
    is then not taken for a new link."""
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
    values = defaults | PRESETS[name]
    fill({k: v for k, v in values.items() if k not in KEPT_BY_PRESETS or k in PRESETS[name]})


def preset() -> str | None:
    """The preset that the form agrees with, if any."""
    values = form()
    defaults = {k: v.default for k, v in KNOBS.items()}
    for name, chosen in PRESETS.items():
        expected = defaults | chosen
        if all(values[k] == expected[k] for k in KNOBS if k not in KEPT_BY_PRESETS or k in chosen):
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


def write_address() -> None:
    """Keep the form in the address: nothing for an untouched form, else every setting that is not a default."""
    values = form()
    parameters = {} if values == START else as_parameters(values)
    if {k: v for k, v in st.query_params.items() if k in OF_FORM} != parameters:
        _note(parameters)
        _rewrite((k for k in st.query_params if k not in (*OF_FORM, *OF_RUN)), parameters)


def as_parameters(values: Mapping[str, Any]) -> dict[str, str]:
    """A form as the parameters of a link, which `read_settings` reads: every value that is no default, at least one."""
    parameters = {k: write(v) for k, v in values.items() if v != KNOBS[k].default and v is not None}
    return parameters or {"ratio": write(values["ratio"])}


def write(value: Any) -> str:
    """A value as a word of the address, exactly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{formatting.setting(value)}") == value else repr(value)
    return str(value)


def ticket() -> str | None:
    """The workbench's ticket in the address: the answers that this tab reads."""
    return st.query_params.get("ask")


def show_ticket(name: str | None) -> None:
    """Read the answers to this ticket from now on; None reads none."""
    _set_address("ask", name)
    _set_address("kept", None)


def kept_comparison() -> str | None:
    """The kept comparison in the address."""
    return st.query_params.get("kept")


def show_kept(name: str | None) -> None:
    """Look at this kept comparison from now on; None at none."""
    _set_address("kept", name)
    _set_address("ask", None)


def _set_address(name: str, value: str | None) -> None:
    if value is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != value:
        st.query_params[name] = value


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
    word, current = st.query_params.get("lesson"), st.session_state.get("lesson")
    if not word:
        return current or ("", None)
    number = st.query_params.get("step") or ""
    if number.isdecimal() and len(number) < 4:
        return word, int(number) - 1
    return (word, current[1]) if current and current[0] == word else (word, None)


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
