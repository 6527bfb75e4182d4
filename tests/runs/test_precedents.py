"""Which layers would go: told by the nearest earlier run, and by none that differs in too much."""

from dataclasses import replace

from trsp_core.runs import precedents
from trsp_core.runs.precedents import Precedent
from trsp_core.schema.config import RunConfig

CONFIG = RunConfig(ratio=0.2, lambda_1=0.05)
CHOSEN = (7, 14, 15, 17, 18, 13)


def chosen_by(run_id: str, chosen=CHOSEN, **settings) -> Precedent:
    return Precedent(run_id, replace(CONFIG, **settings), chosen)


def test_a_greedy_choice_serves_every_smaller_number_and_no_larger():
    hint = precedents.nearest(CONFIG, 4, [chosen_by("one")])
    assert hint is not None
    assert (hint.layers, hint.differences) == (CHOSEN[:4], ())
    assert precedents.nearest(CONFIG, 7, [chosen_by("one")]) is None
    at_once = {"one_shot": True}
    assert precedents.nearest(replace(CONFIG, **at_once), 4, [chosen_by("one", **at_once)]) is None
    assert precedents.nearest(replace(CONFIG, **at_once), 6, [chosen_by("one", **at_once)]) is not None


def test_the_nearest_run_is_taken_and_what_differs_is_named():
    far, near = chosen_by("far", lambda_1=0.5), chosen_by("near", lambda_1=0.1)
    hint = precedents.nearest(CONFIG, 4, [far, near])
    assert hint is not None
    assert (hint.precedent.run_id, hint.differences) == ("near", ("lambda_1",))
    same = precedents.nearest(CONFIG, 4, [near, chosen_by("same", stage2_steps=7, transfer="refit")])
    assert same is not None
    assert (same.precedent.run_id, same.differences) == ("same", ())


def test_another_model_text_method_or_too_much_else_is_no_hint():
    for settings in ({"model": "gemma3-270m"}, {"text": "news"}, {"method": "sleb"}):
        assert precedents.nearest(CONFIG, 4, [chosen_by("other", **settings)]) is None
    other = chosen_by("other", lambda_1=0.1, seed=1, stage1_steps=3)
    assert precedents.nearest(CONFIG, 4, [other]) is None


def test_what_a_method_does_not_use_makes_no_difference():
    config = replace(CONFIG, method="sleb")
    hint = precedents.nearest(config, 4, [chosen_by("other", method="sleb", lambda_1=0.9)])
    assert hint is not None
    assert hint.differences == ()
