"""What is looked up and checked before a run is looked up and checked once."""

import dataclasses
from pathlib import Path

import pytest

from tests import tiny
from trsp_core.cli import main
from trsp_core.data import text_check
from trsp_core.errors import TrspError
from trsp_core.models import inspection
from trsp_core.preparation import execution, preflight
from trsp_core.pruning import validate
from trsp_core.runs import worker
from trsp_core.runs.store import Store

VALUES = tiny.SETTINGS | {
    "stage2_steps": 0,
    "probe_blocks": 0,
    "speed_repeats": 0,
    "sample_tokens": 0,
    "kl_blocks": 2,
    "save_model": False,
}


@pytest.fixture
def values(tiny_model, text, tmp_path, monkeypatch) -> dict:
    """Settings of a run in folders of its own."""
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    return {"model": str(tiny_model), "text": text, "heldout": text, **VALUES}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the checks, in the order in which they are made."""
    names: list[str] = []

    def spy(module, name):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (names.append(name), plain(*args, **kwargs))[1])

    for module, name in ((validate, "check"), (inspection, "read"), (text_check, "check")):
        spy(module, name)
    return names


def test_a_run_of_the_shell_checks_its_config_and_reads_the_headers_once(values, calls):
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main.main(["run", *flags]) == 0
    assert Store().runs()[0].status() == "finished"
    assert sorted(calls) == ["check", "check", "read"], "the settings, the texts, the headers"


def test_the_child_of_a_server_looks_only_at_what_can_have_changed(values, calls, monkeypatch):
    run = Store().create(preflight.preflight(validate.from_values(values)).config)
    Path(run.folder / "queued").touch()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr("trsp_core.machine.available_memory", lambda: 10**6)
        state = worker.drive(run)
        assert state.failure
        assert "are free" in state.failure.message
    assert calls == ["check", "read"], "config.json as any file that is read, and the headers; no texts"
    assert worker.drive(Store().create(run.config())).ended == "finished", "not queued: all is checked"


def test_a_setup_of_another_config_is_refused(values):
    config = validate.from_values(values)
    setup = preflight.preflight(config)
    with pytest.raises(TrspError, match="another config"):
        next(execution.execute(dataclasses.replace(config, seed=7), setup=setup))
