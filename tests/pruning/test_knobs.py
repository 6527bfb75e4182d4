"""Every setting does something: a run on a tiny model with that setting changed is another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.models import loading
from trsp_core.pruning import engine, validate
from trsp_core.schema import events
from trsp_core.schema.config import KNOBS

pytestmark = pytest.mark.usefixtures("unproved")
BASE = {
    "block_length": 16, "measure_length": 24, "measure_blocks": 3, "calibration_blocks": 12, "batch_blocks": 1,
    "probe_every": 2, "probe_blocks": 2, "kl_blocks": 2, "importance_blocks": 1, "score_blocks": 2, "speed_repeats": 1,
    "stage1_steps": 2, "stage2_steps": 4, "ratio": 0.4, "sample_tokens": 3, "stage2_lr": 1e-3, "threads": 1,
    "resume_minutes": 0.0, "save_model": False, "device": "cpu",
}  # fmt: skip
PACKED = {"precision": "nf4", "adapter_rank": 2}
# What a setting is changed to, and the settings in which it matters.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("{other model}", {}), "text": ("{other text}", {}), "heldout": ("{other text}", {}), "ratio": (0.2, {}),
    "lambda_1": (0.5, {}), "lambda_2": (1.0, {}), "method": ("last", {}), "layers": ("1, 2", {"method": "manual",
    "layers": "3"}), "protect_first": (3, {"method": "random"}), "protect_last": (3, {"method": "random"}),
    "no_neighbours": (True, {"method": "last"}), "score_blocks": (4, {"method": "shortgpt"}), "gate": ("output",
    {"protect_last": 1}), "stage1_steps": (3, {}), "stage1_average": (2, {}), "stage1_stretch": (3, {"stage1_steps":
    1}), "shortlist": (6, {}), "stage1_lr": (0.05, {}), "l1": ("proximal", {}), "learn_weights": (True, {}),
    "stage1_weight_lr": (1e-3, {"learn_weights": True}), "one_shot": (True, {}), "transfer": ("refit", {}), "ridge":
    (0.1, {"transfer": "refit"}), "refit": ("mlp", {"transfer": "refit"}), "control": ("delete_first", {}),
    "stage2_steps": (3, {}), "stage2_lr": (1e-2, {}), "output_rate": (1.0, {}), "penalty": ("l2", {}), "penalty_reach":
    ("model", {}), "anneal": (0.5, {}), "cycles": (2, {}), "distil": (0.5, {}), "distil_from": ("states", {"distil":
    0.5}), "adapter_rank": (2, {}), "adapter_lr": (1e-2, {"adapter_rank": 2}), "lambda_2_schedule": ("constant", {}),
    "lr_schedule": ("cosine", {}), "block_length": (20, {}), "batch_blocks": (2, {}), "calibration_blocks": (6, {}),
    "measure_blocks": (4, {}), "measure_length": (20, {}), "probe_every": (1, {}), "probe_blocks": (1, {}),
    "importance_blocks": (0, {}), "kl_blocks": (0, {}), "speed_repeats": (0, {}), "prompt": ("Another", {}),
    "sample_tokens": (2, {}), "seed": (1, {}), "precision": ("bfloat16", {}), "compute_dtype": ("bfloat16", PACKED),
    "recompute": (True, {}), "fuse": (True, {"device": "cuda"}), "save_as": ("adapters", {**PACKED, "save_model":
    True}), "device": ("cuda", {}), "threads": (2, {}), "resume_minutes": (1e-9, {}), "save_model": (True, {}),
    "save_trained": (True, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by the names that stand in `CHANGES`. Files of one kind have one name: the runs are told apart by more."""
    paths = {}
    for seed, part in enumerate(("", "other ")):
        folder = tmp_path_factory.mktemp("knobs")
        paths[f"{{{part}model}}"], paths[f"{{{part}text}}"] = folder / "model", folder / "text.txt"
        tiny.build(seed=seed).save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        (folder / "text.txt").write_text(tiny.text(1200)[4000 * seed :], "utf-8")
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def baselines():
    """What has been seen of runs without a change, by their settings."""
    return {}


def observe(settings: dict[str, Any], files: dict[str, str], folder: Path) -> dict[str, Any]:
    """All that a run shows: its events, the files it writes, the passes of a layer, its threads, its graphs."""
    folder.mkdir()
    values = {"model": "{model}", "text": "{text}", "heldout": "{text}", **BASE, **settings}
    config = validate.from_values({k: files.get(v, v) if isinstance(v, str) else v for k, v in values.items()})
    passes, names, threads, load = [], set(), set(), loading.load

    def counted(*arguments, **more):
        model, tokenizer = load(*arguments, **more)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
        return model, tokenizer

    counters.clear()
    events_seen, refusal = [], ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", counted)
        try:
            for event in engine.execute(config, folder):
                events_seen.append({k: v for k, v in events.stable(event).items() if k != "model"})
                names |= {str(path.relative_to(folder)) for path in folder.rglob("*")}
                threads.add(torch.get_num_threads())
        except TrspError as error:
            refusal = error.message
    graphs = counters["stats"]["unique_graphs"]
    return {"events": events_seen, "refusal": refusal, "files": names, "passes": len(passes), "threads": threads,
            "graphs": graphs}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu) if name == "fuse" else name for name in KNOBS]
)
def test_a_changed_setting_is_another_run(name, files, baselines, tmp_path):
    value, context = CHANGES[name]
    key = str(context)
    if key not in baselines:
        baselines[key] = observe(context, files, tmp_path / "as it is")
        assert not baselines[key]["refusal"], "the run without a change has to work"
    assert observe({**context, name: value}, files, tmp_path / "changed") != baselines[key]


def test_two_runs_without_a_change_are_the_same(files, tmp_path):
    assert observe({}, files, tmp_path / "one") == observe({}, files, tmp_path / "two")
