"""A run that breaks off anywhere goes on to the end that it would have had, and what it has told is never rewritten."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from trsp_core import config as configs
from trsp_core import engine, events, record, resume, state, waypoint
from trsp_core.errors import TrspError
from trsp_core.store import Run, Store

TINY = {
    "model": "tiny",
    "block_length": 16,
    "measure_length": 24,
    "measure_blocks": 3,
    "calibration_blocks": 12,
    "probe_every": 2,
    "probe_blocks": 2,
    "importance_blocks": 1,
    "kl_blocks": 2,
    "stage1_steps": 2,
    "stage2_steps": 5,
    "ratio": 0.4,
    "speed_repeats": 1,
    "sample_tokens": 3,
    "stage2_lr": 1e-3,
    "threads": 1,
    "save_model": True,
}
OFTEN = 1e-9  # minutes


class Killed(BaseException):
    """As if the process had gone: nothing is written any more."""


@pytest.fixture(autouse=True)
def _a_point_at_every_step(monkeypatch):
    monkeypatch.setattr(waypoint, "PATIENCE", 0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny.text(1200), "utf-8")
    return str(file)


def config_of(text, **settings):
    return configs.from_values({**TINY, "text": text, "heldout": text, **settings})


def go(run, stop=None):
    """Execute `run` from where it is; killed after `stop` events."""
    seen = itertools.count(1)

    def watch(folded, event):
        if next(seen) == stop:
            raise Killed

    story = engine.execute(run.config(), run.folder, (tiny.build(), tiny.tokenizer()), resume.find(run))
    return record.record(run, story, watch)


def told(run):
    """All that counts of a run, but for times and the plan's seconds."""
    return [events.stable(e) for _, _, e in run.state().told]


def weights(run):
    return load_file(run.model_folder / "model.safetensors")


CASES = {
    "usual": {"resume_minutes": OFTEN},
    "no points kept": {"resume_minutes": 0},
    "distilled, faded out": {"resume_minutes": OFTEN, "distil": 0.5, "anneal": 0.5},
    "cycles": {"resume_minutes": OFTEN, "cycles": 2},
    "adapters in cycles": {"resume_minutes": OFTEN, "cycles": 2, "adapter_rank": 2},
    "delete first": {"resume_minutes": OFTEN, "control": "delete_first"},
    "W learns in stage 1": {"resume_minutes": OFTEN, "learn_weights": True},
    "no stage 2": {"stage2_steps": 0, "method": "shortgpt"},
    "merged layers": {"resume_minutes": OFTEN, "method": "laco", "control": "delete_first"},
    "narrow": {"method": "width", "stage2_steps": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_at_every_event_it_ends_the_same(case, text, tmp_path):
    store, config = Store(tmp_path), config_of(text, **CASES[case])
    whole = store.create(config)
    go(whole)
    expected, learnt = told(whole), weights(whole)
    assert whole.status() == "finished"
    every = len(expected) if case == "usual" else None
    stops = range(1, len(expected)) if every else sorted({1 + k * len(expected) // 9 for k in range(9)})
    for stop in stops:
        run = store.create(config)
        with pytest.raises(Killed):
            go(run, stop)
        assert run.status() == "lost"
        before = run.events_file.read_bytes()
        resume.reopen(run)
        go(run)
        assert run.events_file.read_bytes().startswith(before)
        assert run.status() == "finished", f"after event {stop}: {run.state().failure}"
        assert told(run) == expected, f"after event {stop}"
        assert all(torch.equal(learnt[name], value) for name, value in weights(run).items()), f"after event {stop}"
        assert not run.checkpoint_file.exists()
        assert not list(run.folder.glob(".*"))
        store.delete(run.id)
