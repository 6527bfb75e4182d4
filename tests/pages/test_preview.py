"""The form shows which layers would go, and says how it knows."""

from __future__ import annotations

import pytest

from pages.ui.run import preview, subjects
from tests.pages.test_compare import Script, open_page, shown, texts
from trsp_core.runs.recorder import record
from trsp_core.runs.store import Store
from trsp_core.schema import events as ev
from trsp_core.schema.config import KNOBS, RunConfig


@pytest.fixture
def script(page_store, monkeypatch):
    made = Script()
    monkeypatch.setattr("pages.ui.app_state.workbench.Workbench", lambda: made)
    return made


def would_go(app) -> str:
    return next((m.value for m in app.markdown if "would go" in m.value), "")


def told(layers: tuple[int, ...]):
    """Events of a run that chose these layers of the default model and stopped there."""
    yield ev.ModelLoaded("smollm2-135m", "LlamaForCausalLM", 30, 576, 49152, 134_515_008, [3_540_096] * 30, 1, "", "")
    for n, layer in enumerate(layers):
        yield ev.LayerChosen(n, layer, 0.5, 1, 0.1)
    yield ev.LayersChosen("trsp", list(layers))
    yield ev.RunFinished(1)


def test_the_recorded_run_tells_what_its_settings_would_do(script):
    recorded = subjects.shipped()
    name = {k: str(v).lower() for k, v in recorded.config.as_dict().items() if v != KNOBS[k].default}
    sentence = would_go(open_page("run", **name))
    assert "As the recorded run chose" in sentence
    guess = preview.known(recorded.config, 3)
    assert guess is not None
    assert guess.layers == tuple(recorded.state.chosen[:3])


def test_an_earlier_run_of_the_same_settings_comes_before_the_recorded_one(script):
    config = subjects.shipped().config
    record(Store().create(config), told((1, 2, 3)))
    guess = preview.known(config, 2)
    assert guess is not None
    assert guess.layers == (1, 2)
    assert guess.source.startswith("As the run of")


def test_without_a_run_the_recorded_influence_is_a_guess_that_says_so(script):
    config = RunConfig(ratio=0.2, seed=0, lambda_1=0.4, stage1_steps=3, stage1_lr=0.5, protect_first=1)
    guess = preview.known(config, 6)
    assert guess is not None
    assert "guess by block influence alone" in guess.source
    assert 0 not in guess.layers
    assert len(set(guess.layers)) == 6


def test_layers_named_by_hand_are_those_that_go(script):
    app = open_page("run", method="manual", layers="3,5")
    assert "Layers 3, 5 would go" in would_go(app).replace("\\", "")
    assert "28 of 30 layers stay" in texts(app)


def test_what_no_record_tells_is_asked_of_the_workbench(script):
    app = open_page("run", model="smollm2-135m", text="news", heldout="wikipedia")
    assert [type(r).__name__ for r in script.asked.values()] == ["Influence"]
    assert "guess by block influence alone" in would_go(app)
    shown(app.run())
    assert len(script.asked) == 1
