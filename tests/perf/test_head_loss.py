"""The loss that holds no logits, against its plain twin: the same values and the same gradients, within rounding."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from trsp_core.evaluation import perplexity
from trsp_core.evaluation.losses import next_token_loss
from trsp_core.perf import compilation, head_loss
from trsp_core.surgery import discovery, training


def built(dtype=torch.float64, bias=False, tied=True, seed=0):
    model = tiny.build(seed=seed, tie_word_embeddings=tied).to(dtype)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features, dtype=dtype))
    return model


def taught(model, ids, teacher=None, share=0.0):
    with head_loss.withheld(model), head_loss.withheld(teacher) if teacher else contextlib.nullcontext():
        return head_loss.taught(model, ids, teacher, share)


def plain(model, ids, teacher=None, share=0.0):
    logits = model(input_ids=ids, use_cache=False).logits
    lm = next_token_loss(logits, ids).mean()
    if not share or teacher is None:
        return lm, lm
    with torch.no_grad():
        p = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    q = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    return lm, (1 - share) * lm + share * F.kl_div(q, p, reduction="batchmean", log_target=True)


@pytest.fixture(params=[False, True], ids=["in slices", "whole rows"])
def whole(request, monkeypatch) -> bool:
    """Logits in slices of the vocabulary, as on a CPU, and in whole rows, as on a GPU; a few rows at once."""
    monkeypatch.setattr(head_loss, "SLICE", 40)
    monkeypatch.setattr(head_loss, "READ", 16)
    if request.param:
        monkeypatch.setattr(head_loss, "takes_whole", lambda table: True)
        monkeypatch.setattr(head_loss, "ROOM", 9 * 4 * tiny.V)
    return request.param


@pytest.mark.parametrize("rows", [5, 128])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_the_plain_loss(monkeypatch, whole, rows, tied, bias, share):
    monkeypatch.setattr(head_loss, "ROWS", rows)
    model, teacher, ids = built(torch.float32, bias, tied), built(torch.float32, seed=1), tiny.ids(3, 14)
    assert head_loss.projects(model, ids)
    found, wanted = taught(model, ids, teacher, share), plain(model, ids, teacher, share)
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-6)
    assert found[1].item() == pytest.approx(wanted[1].item(), rel=1e-6)
    assert not found[0].requires_grad
    (3 * found[1]).backward()  # not by one: the factor that comes from above counts
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (3 * wanted[1]).backward()
    for name, parameter in model.named_parameters():
        assert (own[name] - parameter.grad).norm() <= 3e-6 * parameter.grad.norm(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_frozen_weights_get_no_gradient_and_states_do():
    model, ids = built(torch.float32), tiny.ids(2, 12)
    with training.learning(model, list(discovery.find(model).layers[0].parameters())):
        taught(model, ids)[1].backward()
        assert model.get_output_embeddings().weight.grad is None
        assert all(p.grad is not None for p in discovery.find(model).layers[0].parameters())


def test_without_gradients_it_is_a_figure_alone():
    model, ids = built(torch.float32), tiny.ids(2, 12)
    with torch.inference_mode():
        assert taught(model, ids)[1].item() == pytest.approx(plain(model, ids)[0].item(), rel=1e-6)


def test_a_head_that_does_more_than_project_is_seen():
    model, ids = built(torch.float32), tiny.ids(2, 12)
    inner = model.forward

    def capped(**given):
        told = inner(**given)
        told.logits = 2.0 * torch.tanh(told.logits / 2.0)
        return told

    model.forward = capped
    assert not head_loss.projects(model, ids)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_loss(whole):
    ids, exact = tiny.ids(3, 14), built(torch.float64)
    truth = plain(exact, ids)[0].item()
    half = built(torch.bfloat16)
    own, theirs = (abs(f(half, ids)[1].item() - truth) for f in (taught, plain))
    assert own <= 2 * theirs + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_before_a_frozen_head_needs_no_logits_at_all(monkeypatch, whole, bias, dtype):
    """Against the plain loss, with rows and slices that do not divide their tables, and a logit beyond exp's range."""
    monkeypatch.setattr(head_loss, "READ", 7)
    model, ids = built(dtype, tied=False), tiny.ids(3, 14)
    layer = discovery.find(model).layers[0]
    with torch.no_grad():
        model.lm_head.weight[-1] *= 1e3
        model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.V, dtype=dtype)) if bias else None
    own, wanted = [], []
    with training.learning(model, list(layer.parameters())):
        for loss, kept in ((taught, own), (plain, wanted)):
            value = loss(model, ids)[1]
            (3 * value).backward()
            kept += [value.item(), *(p.grad.float().flatten() for p in layer.parameters())]
            layer.zero_grad()
    near = 1e-5 if dtype == torch.float32 else 0.05
    assert own[0] == pytest.approx(wanted[0], rel=near)
    for a, b in zip(own[1:], wanted[1:], strict=True):
        assert (a - b).norm() <= 10 * near * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [True, False])
def test_slopes_by_the_logits_are_autograds_and_the_same_compiled(teacher, dtype):
    torch.manual_seed(0)
    logits, wanted = (3 * torch.randn(5, 40)).to(dtype), torch.tensor([0, 39, 7, 7, 1])
    says, share = (torch.randn(5, 40).log_softmax(-1), 0.3) if teacher else (None, 0.0)
    exact = logits.float().clone().requires_grad_()
    logs = exact.log_softmax(-1)
    nats = -logs.gather(1, wanted[:, None]).squeeze(1)
    apart = F.kl_div(logs, says, reduction="none", log_target=True).sum(-1) if teacher else 0 * nats
    ((1 - share) * nats + share * apart).sum().backward()
    for how in (head_loss.slopes, compilation.compiled(head_loss.slopes, "aot_eager")):
        found = how(logits.clone(), wanted, says, share)
        assert torch.allclose(found[0], nats, rtol=1e-5)
        assert torch.allclose(found[1], apart, atol=1e-6)
        assert found[2].dtype == dtype
        assert torch.allclose(found[2].float(), exact.grad, rtol=0.005 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_nats_of_each_token_are_those_of_the_plain_loss(monkeypatch, whole, bias):
    monkeypatch.setattr(head_loss, "READ", 7)
    model, ids = built(torch.float32, bias), tiny.ids(3, 14)
    with torch.inference_mode():
        wanted = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        with head_loss.withheld(model):
            assert torch.allclose(head_loss.nats(model, ids), wanted, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(model.get_output_embeddings())


def test_measuring_holds_no_logits_unless_somebody_watches_them():
    model, ids = built(torch.float32), tiny.ids(6, 14)
    seen = []
    watched = list(perplexity.block_losses(model, ids, seen.append))
    alone = list(perplexity.block_losses(model, ids))
    assert [x for part in alone for x in part] == pytest.approx([x for part in watched for x in part], rel=1e-6)
    assert sum(len(logits) for logits in seen) == 6


@pytest.mark.parametrize(("room", "passes"), [(100, 1), (39, 1), (20, 2), (13, 3), (1, 39)])
def test_whole_rows_are_taken_as_many_at_once_as_there_is_room_for(monkeypatch, room, passes):
    """For a figure and for a gradient: 3 blocks of 14 tokens are 39 rows."""
    monkeypatch.setattr(head_loss, "takes_whole", lambda table: True)
    monkeypatch.setattr(head_loss, "ROOM", room * 4 * tiny.V)
    model, ids = built(torch.float32), tiny.ids(3, 14)
    asked, real = [], head_loss.F.linear

    def counted(rows, weight, bias=None):
        if weight is model.lm_head.weight:
            asked.append(len(rows))
        return real(rows, weight, bias)

    with head_loss.withheld(model):
        states = model(input_ids=ids, use_cache=False).logits.detach().requires_grad_()
        monkeypatch.setattr(head_loss.F, "linear", counted)
        head_loss.nats_given(model, states.detach(), ids)
        assert (len(asked), sum(asked)) == (passes, 39)
        asked.clear()
        head_loss.taught(model, ids)
        assert (len(asked), sum(asked)) == (passes, 39)
