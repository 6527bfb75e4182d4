"""Every way to choose layers: the contract that all share, planted redundancy, and closed forms on tiny models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests import ROOT, tiny
from trsp_core.errors import TrspError
from trsp_core.perf import removal_search
from trsp_core.pruning import methods, validate
from trsp_core.pruning.lab import Lab
from trsp_core.pruning.methods import angular, laco, masks, replaceme
from trsp_core.schema.events import LayerChosen, LayersScored, Noted, Progressed, StageOneStepped
from trsp_core.surgery import discovery, removal, training

SMALL = {"block_length": 16, "stage1_steps": 3, "batch_blocks": 2, "score_blocks": 3, "calibration_blocks": 8}
DEPTH = 6
ALL = [name for name in methods.names() if name != "manual" and not methods.get(name).narrow]
GREEDY = [name for name in ALL if not methods.get(name).contiguous]
GRAMMAR = (LayersScored, LayerChosen, Progressed, StageOneStepped)


def lab_of(method, model=None, blocks=None, **settings):
    model = model or tiny.build(n_layers=DEPTH)
    how = {"stage2_steps": 0, "method": method, **SMALL, **settings}
    config = validate.from_values(how)
    return Lab(discovery.find(model), tiny.ids(8, 16) if blocks is None else blocks, config), config


def drain(generator):
    told = []
    while True:
        try:
            told.append(next(generator))
        except StopIteration as end:
            return told, end.value


def choose(method, count, model=None, **settings):
    lab, config = lab_of(method, model, **settings)
    return drain(methods.get(method).choose(lab, config, count))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.ids(), use_cache=False).logits


def plant(model, layers):
    """Make `layers` do nothing."""
    stack = discovery.find(model)
    with torch.no_grad():
        for i in layers:
            for p in stack.outputs(i):
                p.zero_()
    return model


@pytest.fixture(scope="module")
def practised():
    """State of a tiny model that has learned its text, layers 1 and 3 (spaced) or 2 and 3 (a run) doing nothing: each
    of the others is of use. With its blocks (N, T)."""
    ids = torch.tensor(tiny.tokenizer()(tiny.text(200)).input_ids)
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    models = {}
    for planted in ((1, 3), (2, 3)):
        model = plant(tiny.build(n_layers=DEPTH), planted)
        lab, _ = lab_of("trsp", model, blocks)
        idle = {id(p) for i in planted for p in lab.stack.layers[i].parameters()}
        optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in idle], lr=3e-3)
        for _ in lab.fit(optimizer, lab.lm_loss, 120, 0, "practice"):
            pass
        models[planted] = model.eval()
    return models, blocks


@pytest.mark.parametrize("method", ALL)
class TestContract:
    def test_as_many_distinct_layers_as_asked_for_and_none_that_is_protected(self, method):
        for count in (1, 3):
            _, chosen = choose(method, count, protect_first=1, protect_last=1)
            assert len(chosen) == len(set(chosen)) == count
            assert set(chosen) <= {1, 2, 3, 4}

    def test_the_same_again(self, method):
        assert choose(method, 2) == choose(method, 2)

    def test_no_two_neighbours(self, method):
        if methods.get(method).contiguous:
            with pytest.raises(TrspError, match="neighbouring layers"):
                lab_of(method, no_neighbours=True)
            return
        _, chosen = choose(method, 2, no_neighbours=True)
        assert abs(chosen[0] - chosen[1]) > 1

    def test_only_events_of_choosing_and_each_choice_told_in_order(self, method):
        told, chosen = choose(method, 2)
        assert {type(e) for e in told} <= set(GRAMMAR)
        if method != "random":
            assert [e.layer for e in told if isinstance(e, LayerChosen)] == chosen
        scored = [e for e in told if isinstance(e, LayersScored)]
        assert all(e.method == method and len(e.scores) == DEPTH for e in scored)
        done = [e.done for e in told if isinstance(e, Progressed)]
        assert done == sorted(done)
        assert all(0 <= d <= methods.UNITS for d in done)
        assert bool(done) == (methods.get(method).pass_counts != methods.PassCounts())

    def test_a_protected_layer_has_no_score(self, method):
        told, _ = choose(method, 2, protect_first=2)
        for event in told:
            if isinstance(event, LayersScored):
                assert event.scores[:2] == [None, None]

    def test_closing_at_any_event_leaves_the_model_bit_identical(self, method):
        model = tiny.build(n_layers=DEPTH)
        before, flags = logits(model), [p.requires_grad for p in model.parameters()]
        lab, config = lab_of(method, model)
        how = methods.get(method)

        def whole():
            chosen = yield from how.choose(lab, config, 2)
            if how.rewrite:
                yield from how.rewrite(lab, config, chosen)

        total = len(drain(whole())[0])
        for stop in range(total + 1):
            generator = whole()
            for _ in itertools.islice(generator, stop):
                pass
            generator.close()
            assert torch.equal(logits(model), before), f"after event {stop}"
            assert [p.requires_grad for p in model.parameters()] == flags
            assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", [m for m in GREEDY if m not in ("random", "last", "laco")])
@pytest.mark.parametrize("planted", [(1, 3), (2, 3)])
def test_planted_redundancy_is_found(method, planted, practised):
    models, blocks = practised
    lab, config = lab_of(method, models[planted], blocks, score_blocks=8, stage1_steps=40, lambda_1=1e-3)
    _, chosen = drain(methods.get(method).choose(lab, config, 2))
    assert set(chosen) == set(planted)


@pytest.mark.parametrize("method", [m for m in ALL if methods.get(m).contiguous])
def test_a_planted_run_is_found(method, practised):
    models, blocks = practised
    lab, config = lab_of(method, models[2, 3], blocks, score_blocks=8)
    told, chosen = drain(methods.get(method).choose(lab, config, 2))
    assert chosen == [2, 3]
    scores = next(e for e in told if isinstance(e, LayersScored)).scores
    assert scores[2] == pytest.approx(0, abs=1e-6)
    assert scores[DEPTH - 1] is None, "no run of two begins at the last layer"


def test_laco_merges_the_planted_layers_into_their_neighbours(practised):
    """Merging layer l + 1 into an idle layer l gives layer l + 1's weights: nothing is lost."""
    models, blocks = practised
    lab, config = lab_of("laco", models[1, 3], blocks, score_blocks=8)
    before = logits(lab.model)
    _, chosen = drain(laco.choose(lab, config, 2))
    assert set(chosen) == {2, 4}
    _, edits = drain(laco.rewrite(lab, config, chosen))
    with training.rewritten(edits), removal.removed(lab.stack, chosen):
        assert torch.allclose(logits(lab.model), before, atol=1e-4)
    assert torch.equal(logits(lab.model), before)


def test_block_influence_by_hand():
    lab, config = lab_of("shortgpt")
    told, chosen = drain(methods.get("shortgpt").choose(lab, config, 1))
    scores = next(e for e in told if isinstance(e, LayersScored)).scores
    with torch.no_grad():
        states = lab.model(input_ids=lab.blocks[:3], output_hidden_states=True, use_cache=False).hidden_states
    x, y = states[2].double(), states[3].double()  # the last entry of `hidden_states` is normed: not used here
    by_hand = 1 - ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean().item()
    assert scores[2] == pytest.approx(by_hand, abs=1e-6)
    assert chosen == [min(range(DEPTH), key=lambda i: scores[i])]


def test_angular_distance_by_hand():
    a, b = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    a[0, 1] = torch.tensor([1.0, 0.0])
    for angle in (0.0, 0.25, 0.5, 1.0):  # in half turns, on the last token; the first one is not looked at
        b[0, 1] = torch.tensor([math.cos(math.pi * angle), math.sin(math.pi * angle)])
        assert angular.distance(a, b) == pytest.approx(angle, abs=1e-6)


def test_taylor_by_hand():
    lab, config = lab_of("taylor")
    told, _ = drain(methods.get("taylor").choose(lab, config, 1))
    scores = next(e for e in told if isinstance(e, LayersScored)).scores
    loss = lab.lm_loss(lab.blocks[:3])
    weights = [p for p in lab.stack.layers[1].parameters() if p.dim() == 2]
    by_hand = sum((w * g).abs().sum().item() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True))
    assert scores[1] == pytest.approx(by_hand, rel=1e-4)


def test_magnitude_by_hand():
    model = tiny.build(n_layers=DEPTH)
    with torch.no_grad():
        for p in model.model.layers[4].parameters():
            p.mul_(0.5)
    told, chosen = choose("magnitude", 1, model)
    layer = model.model.layers[4]
    by_hand = sum(p.abs().sum().item() for p in layer.parameters() if p.dim() == 2)
    assert next(e for e in told if isinstance(e, LayersScored)).scores[4] == pytest.approx(by_hand, rel=1e-5)
    assert chosen == [4]


@pytest.mark.parametrize("room", [2**29, 2**18, 1], ids=["every layer", "some", "few"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "qwen2"])
def test_a_search_that_reuses_what_holds_equals_whole_passes(monkeypatch, model_type, room):
    """Also where layers come back, or two go at once; over batches of different widths; however little is kept."""
    monkeypatch.setattr(removal_search, "SEARCH_ROOM", room)
    lab, _ = lab_of("sleb", tiny.build(model_type, n_layers=DEPTH))
    batches = [tiny.ids(3), tiny.ids(1, seed=5)]
    looking = lab.search(batches, rounds=5)
    for removed in ([], [3], [3, 1], [3, 1, 4], [0, 3], [0, 3, 2, DEPTH - 1]):
        free = [i for i in range(DEPTH) if i not in removed]
        got = dict(looking.losses(free, removed))
        costs = {i: [lab.loss_without([*removed, i], ids) for ids in batches] for i in free}
        assert got == pytest.approx({i: (3 * a + b) / 4 for i, (a, b) in costs.items()}, rel=1e-6)
        assert all(len(text.by_key) <= (DEPTH if room == 1 else DEPTH**2) for text in looking.texts)


@pytest.mark.parametrize("model_type", ["llama", "phi", "gemma2"])
def test_bounds_are_below_the_loss_and_the_lowest_two_are_losses(monkeypatch, model_type):
    """phi's head has a bias; gemma2's logits are no plain projection, and are told whole."""
    monkeypatch.setattr(removal_search, "AT_ONCE", 20)  # of 128
    lab, _ = lab_of("sleb", tiny.build(model_type, n_layers=DEPTH))
    ids, looking = tiny.ids(3), lab.search([tiny.ids(3)], rounds=3)
    for removed in ([], [3], [3, 0]):
        free = [i for i in range(DEPTH) if i not in removed]
        words: dict[int, list[float]] = {i: [] for i in free}
        for i, loss in looking.losses(free, removed, bounds=True):
            words[i].append(loss)
        losses = {i: lab.loss_without([*removed, i], ids) for i in free}
        assert all(a <= b for told in words.values() for a, b in itertools.pairwise(told))
        last = {i: told[-1] for i, told in words.items()}
        assert all(last[i] <= losses[i] + 1e-5 for i in free)
        lowest = sorted(free, key=last.__getitem__)[:2]
        assert lowest == sorted(free, key=losses.__getitem__)[:2]
        assert [last[i] for i in lowest] == pytest.approx([losses[i] for i in lowest], rel=1e-6)
        if model_type == "gemma2":
            assert all(len(told) == 1 for told in words.values())
        else:
            assert any(len(told) < 7 for told in words.values()), "no candidate was given up early"


def test_sleb_is_the_naive_greedy_search():
    lab, config = lab_of("sleb")
    _, chosen = drain(methods.get("sleb").choose(lab, config, 3))
    naive: list[int] = []
    for _ in range(3):
        free = [i for i in range(1, DEPTH - 1) if i not in naive]
        costs = {i: lab.loss_without([*naive, i], lab.blocks[:3]) for i in free}
        naive.append(min(free, key=lambda i: costs[i]))
    assert chosen == naive


def test_sleb_never_takes_the_first_or_the_last_layer():
    """Not even where they do nothing, or where no other is left."""
    told, chosen = choose("sleb", 2, plant(tiny.build(n_layers=DEPTH), (0, DEPTH - 1)))
    assert not {0, DEPTH - 1} & set(chosen)
    scores = next(e for e in told if isinstance(e, LayersScored)).scores
    assert [i for i, score in enumerate(scores) if score is None] == [0, DEPTH - 1]
    config = validate.from_values({"method": "sleb", "ratio": 0.8, "stage2_steps": 0})
    assert [p.knob for p in validate.check(config, n_layers=DEPTH)] == ["ratio"]
    with pytest.raises(TrspError, match="No layer is left that SLEB may choose"):
        choose("sleb", DEPTH - 1)


def test_the_docs_say_where_ours_differ_from_their_authors_code():
    page = " ".join((ROOT / "docs" / "methods.md").read_text("utf-8").split())
    for method in methods.all_methods().values():
        assert (f"- `{method.name}`: {method.differences}" in page) == bool(method.differences), method.name
        if method.differences:
            assert method.differences.endswith("."), method.name


def test_one_shot_perplexity_takes_the_cheapest_alone():
    lab, config = lab_of("oneshot_ppl")
    _, chosen = drain(methods.get("oneshot_ppl").choose(lab, config, 2))
    alone = {i: lab.loss_without([i], lab.blocks[:3]) for i in range(DEPTH)}
    assert chosen == sorted(alone, key=lambda i: alone[i])[:2]


def test_laco_adds_the_differences_of_the_layers_that_go():
    lab, _ = lab_of("laco")
    theta = [layer.mlp.up_proj.weight.detach() for layer in lab.stack.layers]
    edits = laco.merged(lab, {2, 3})
    assert set(map(id, edits)) == {id(p) for p in lab.stack.layers[1].parameters()}
    by_hand = theta[1] + (theta[2] - theta[1]) + (theta[3] - theta[1])
    assert torch.allclose(edits[lab.stack.layers[1].mlp.up_proj.weight], by_hand, atol=1e-6)


def test_lacos_scores_equal_the_whole_way(practised):
    """1 - cosine of the last hidden states, each merge computed from the input up."""
    models, blocks = practised
    lab, config = lab_of("laco", models[1, 3], blocks)
    told, _ = drain(laco.choose(lab, config, 2))
    scores = next(e for e in told if isinstance(e, LayersScored)).scores
    batches = lab.sample(config)
    for i in range(1, DEPTH):
        far = []
        for ids in batches:
            dense = lab.states(ids)[-1]
            with training.rewritten(laco.merged(lab, {i})), lab.skipped([i]):
                far.append(1 - torch.cosine_similarity(lab.states(ids)[-1], dense, dim=-1).mean().item())
        assert scores[i] == pytest.approx(sum(far) / len(far), abs=1e-5)


class TestReplaceMe:
    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "opt", "gemma"])
    def test_the_folded_map_is_the_map_on_the_mlps_output(self, model_type):
        lab, _ = lab_of("replaceme", tiny.build(model_type, n_layers=DEPTH))
        module, ids = lab.stack.writers(2)[-1], tiny.ids()
        T = torch.eye(tiny.D, dtype=torch.float64) + 0.1 * torch.randn(tiny.D, tiny.D, dtype=torch.float64)
        with lab.heard(module) as heard:
            states = lab.states(ids)
        M = heard[0][1].view_as(states[3])  # OPT's comes as (B T, D)
        expected = states[3] - M + M @ T.float()
        with lab.rewritten(replaceme.folded(module, T)):
            assert torch.allclose(lab.states(ids)[3], expected, atol=1e-3)

    def test_a_run_that_a_linear_map_can_do_is_replaced_without_loss(self, practised):
        """Layers 2 and 3 do nothing, so T is the identity and the pruned model is the dense one."""
        models, blocks = practised
        lab, config = lab_of("replaceme", models[2, 3], blocks)
        told, edits = drain(replaceme.rewrite(lab, config, [2, 3]))
        assert [e.message for e in told if isinstance(e, Noted)] == [
            "A linear map in the MLP of layer 1 stands in for layers 2 to 3."
        ]
        before = logits(lab.model)
        with lab.rewritten(edits), removal.removed(lab.stack, [2, 3]):
            assert torch.allclose(logits(lab.model), before, atol=1e-3)

    def test_it_comes_nearer_to_the_run_than_deletion_does(self):
        lab, config = lab_of("replaceme", blocks=tiny.ids(64, 16))
        _, edits = drain(replaceme.rewrite(lab, config, [2, 3]))
        ids = lab.blocks[:8]
        wanted = lab.states(ids)[4]
        plain = (lab.states(ids)[2] - wanted).norm()
        with lab.rewritten(edits):
            assert (lab.states(ids)[2] - wanted).norm() < 0.95 * plain

    def test_a_family_that_norms_the_mlps_output_is_refused(self):
        lab, config = lab_of("replaceme", tiny.build("gemma2", n_layers=DEPTH))
        with pytest.raises(TrspError, match="changed before it joins"):
            drain(replaceme.rewrite(lab, config, [2, 3]))


class TestMasks:
    def test_gates_reach_nought_and_one_and_close_as_often_as_said(self):
        torch.manual_seed(0)
        assert masks.gate(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, pytest.approx(0.5), 1.0]
        a, u = torch.tensor(-0.7), torch.rand(200_000)
        z = masks.gate((u.logit() + a) / masks.B)
        assert (z == 0).float().mean().item() == pytest.approx(masks.closed(a).item(), abs=0.005)

    def test_the_lagrangian_closes_as_many_as_wanted(self, practised):
        models, blocks = practised
        lab, config = lab_of("masks", models[1, 3], blocks, stage1_steps=60)
        told, _ = drain(masks.choose(lab, config, 2))
        steps = [e for e in told if isinstance(e, StageOneStepped)]
        assert len(steps) == 120
        scores = next(e for e in told if isinstance(e, LayersScored)).scores
        assert masks.closed(torch.tensor(scores)).sum().item() == pytest.approx(2, abs=0.3)


def test_a_method_that_rewrites_weights_refuses_to_teach_before(practised):
    for name in ("laco", "replaceme"):
        with pytest.raises(TrspError, match="as it deletes"):
            validate.from_values({"method": name, "stage2_steps": 5})
        validate.from_values({"method": name, "stage2_steps": 5, "control": "delete_first"})
