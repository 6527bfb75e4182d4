"""The trainer against its plain twin: the same steps, whatever stage 2 is told to do."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests import tiny
from tests.pruning.test_stages import drain, lab_of
from trsp_core.pruning import stage2
from trsp_core.schema.schedules import Span
from trsp_core.surgery import discovery, removal
from trsp_core.training.trainer import PlainTrainer, Trainer

VARIANTS = {
    "as it is": {},
    "the paper's": {"penalty": "sum", "penalty_reach": "model", "output_rate": 1.0, "lambda_2": 1e-3},
    "l1": {"penalty": "l1", "lambda_2_schedule": "constant"},
    "local": {"penalty": "l2", "penalty_reach": "local", "output_rate": 5.0, "lr_schedule": "constant"},
    "no penalty": {"lambda_2": 0.0},
    "faded": {"anneal": 0.5},
    "faded from the first step": {"anneal": 1e-6},
    "distilled": {"distil": 0.5},
    "distilled from states": {"distil": 0.5, "distil_from": "states"},
    "adapters": {"adapter_rank": 2, "batch_blocks": 4},
    "adapters, local": {"adapter_rank": 2, "batch_blocks": 4, "penalty_reach": "local"},
    "adapters, faded": {"adapter_rank": 2, "batch_blocks": 4, "anneal": 0.5, "distil": 0.5},
    "recomputed": {"recompute": True},
}


def steps(trainer: type[PlainTrainer], deleted: bool = False, **settings):
    """Every step's figures, and the weights in the end."""
    lab, config = lab_of(**{"lambda_2": 0.3, "stage2_lr": 1e-3, **settings})
    if config.distil:
        lab.teacher = discovery.find(tiny.build(seed=1))
    with removal.removed(lab.stack, [1, 3]) if deleted else contextlib.nullcontext():
        events, _ = drain(stage2.transfer(lab, config, [1, 3], deleted=deleted, trainer_class=trainer))
    figures = [[e.step, e.lm_loss, e.penalty, e.lambda_2, e.learning_rate, *e.gaps] for e in events]
    return torch.tensor(figures), dict(lab.model.named_parameters())


@pytest.fixture(autouse=True)
def _two_cores():
    """So that adapters are trained on parts of a batch side by side."""
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(cores)


@pytest.mark.parametrize("deleted", [False, True], ids=["", "deleted first"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_takes_the_steps_of_its_plain_twin(variant, deleted):
    ours, weights = steps(Trainer, deleted, **VARIANTS[variant])
    plain, plain_weights = steps(PlainTrainer, deleted, **VARIANTS[variant])
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert weights.keys() == plain_weights.keys()
    moved = 0.0
    for (name, ours), start in zip(weights.items(), tiny.build().parameters(), strict=True):
        if "anneal" in VARIANTS[variant] and (".1." in name or ".3." in name):
            continue  # nothing reads what is behind a shut gate, and AdamW's momentum moves it on in the plain way
        assert torch.allclose(ours, plain_weights[name], rtol=0, atol=2e-5), name
        moved = max(moved, float((ours - start).detach().abs().max()))
    assert moved > 1e-4  # steps were taken


def test_a_part_of_the_steps_is_a_part_of_the_schedule():
    lab, config = lab_of(lambda_2=0.3)
    events, _ = drain(stage2.transfer(lab, config, [1, 3], Span(2, 2), trainer_class=PlainTrainer))
    assert [e.step for e in events] == [3, 4]
    assert events[-1].lambda_2 == pytest.approx(0.3)


@pytest.mark.parametrize("trainer", [PlainTrainer, Trainer])
def test_a_trainer_that_cannot_begin_leaves_nothing_behind(trainer, monkeypatch):
    lab, config = lab_of(adapter_rank=2, anneal=0.5)
    names = [name for name, _ in lab.model.named_parameters()]

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(type(lab), "tapped", fails)
    with pytest.raises(MemoryError):
        drain(stage2.transfer(lab, config, [1, 3], trainer_class=trainer))
    assert [name for name, _ in lab.model.named_parameters()] == names
    assert not any(module._forward_hooks for module in lab.model.modules())
