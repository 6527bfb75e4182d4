"""The workbench with its real child on a tiny model: order, places, cancelling, dying and coming back."""

import itertools
import threading
import time

import psutil
import pytest

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.schema import messages as an
from trsp_core.schema.messages import Generate, WhatIf
from trsp_core.subprocesses import Child
from trsp_core.workbench import client
from trsp_core.workbench.client import Workbench

ANY = WhatIf("no-such-model", [1])  # refused as soon as there is a child
SEEDS = itertools.count()
LONG = 60.0  # seconds; a child starts in about five on a quiet machine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("workbench") / "model", n_layers=8))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model slow enough to be met in the middle of something."""
    return str(tiny.save(tmp_path_factory.mktemp("workbench") / "deep", n_layers=96))


@pytest.fixture(scope="module")
def workbench():
    bench = Workbench()
    yield bench
    bench.close()


def children() -> list[psutil.Process]:
    """Processes of workbenches that this one has started."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if child.cmdline()[-1:] == ["workbench"]]


def endless(model, **more):
    """A long text, another one each time: equal requests would be one."""
    more = {"seed": next(SEEDS), **more}
    return Generate([an.Variant(model)], "The river", new_tokens=an.MAX_NEW_TOKENS, temperature=1.5, **more)


def until(workbench, ticket, wanted, timeout=LONG):
    """Wait for an answer of the type `wanted`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        reading = workbench.read(ticket)
        if any(isinstance(a, wanted) for a in reading.answers):
            return reading
        assert reading.ending is None, reading.ending
        time.sleep(0.002)
    raise AssertionError(f"no {wanted.__name__} within {timeout} s")


def test_a_request_is_answered_and_can_be_read_again(workbench, model):
    ticket = workbench.ask(Generate([an.Variant(model)], "The river", new_tokens=5))
    reading = workbench.wait(ticket, LONG)
    assert isinstance(reading.ending, an.Answered)
    assert sum(isinstance(a, an.TokenGenerated) for a in reading.answers) >= 1
    assert workbench.read(ticket) == reading


def test_what_if_measures_then_writes(workbench, model, text):
    ask = WhatIf(model, [2, 3], text=text, heldout=text, prompt="The river", sample_tokens=4)
    answers = workbench.wait(workbench.ask(ask), LONG).answers
    measured = next(a for a in answers if isinstance(a, an.SetMeasured))
    assert measured.perplexity.keys() == {"calibration", "heldout"}
    assert (measured.n_layers, measured.ceiling, measured.cached) == (8, 8 / 6, False)
    assert isinstance(answers[-2], an.TokenGenerated)
    again = workbench.wait(workbench.ask(ask), LONG).answers
    assert next(a for a in again if isinstance(a, an.SetMeasured)).cached


def test_importance_and_influence_name_every_layer(workbench, model, text):
    for kind in (an.Importance, an.Influence):
        answers = workbench.wait(workbench.ask(kind(an.Variant(model), text=text, heldout=text)), LONG).answers
        assert sorted(a.layer for a in answers if isinstance(a, an.LayerRated)) == list(range(8))


def test_what_cannot_be_done_is_refused(workbench, model):
    refused = workbench.wait(workbench.ask(WhatIf("no-such-model", [1])), LONG).ending
    assert isinstance(refused, an.Refused)
    assert "no-such-model" in refused.message
    with pytest.raises(TrspError, match="Length"):
        workbench.ask(Generate([an.Variant(model)], "a", new_tokens=10**6))
    with pytest.raises(TrspError, match="no longer kept"):
        workbench.read("not a ticket")


def test_a_stream_is_cancelled_within_a_token(workbench, model):
    ticket = workbench.ask(endless(model))
    until(workbench, ticket, an.TokenGenerated)
    before = len(workbench.read(ticket).answers)
    workbench.cancel(ticket)
    reading = workbench.wait(ticket, 10)
    assert isinstance(reading.ending, an.Stopped)
    assert len(reading.answers) - before < 40  # what was on its way; a token of this model takes a millisecond


def test_a_what_if_is_cancelled_within_a_block(workbench, deep, text):
    ticket = workbench.ask(an.Importance(an.Variant(deep), text=text, heldout=text, seed=6))
    rated = len(until(workbench, ticket, an.LayerRated).answers)
    workbench.cancel(ticket)
    reading = workbench.wait(ticket, 10)
    assert isinstance(reading.ending, an.Stopped)
    assert len(reading.answers) - rated < 20  # of 96 layers


def test_cancelling_a_waiting_request_takes_it_out_at_once(workbench, model):
    first, second = workbench.ask(endless(model)), workbench.ask(endless(model))
    workbench.cancel(second)
    assert isinstance(workbench.read(second).ending, an.Stopped)
    workbench.cancel(first)
    workbench.wait(first, LONG)


@pytest.mark.parametrize("kind", ["stream", "what-if", "importance"])
def test_a_killed_child_is_told_and_replaced(workbench, model, deep, text, kind):
    texts = {"text": text, "heldout": text, "seed": 5}
    request, begun = {
        "stream": (endless(model), an.TokenGenerated),
        "what-if": (WhatIf(deep, [2, 3], **texts, prompt="The river", sample_tokens=an.SAMPLE_TOKENS), an.SetMeasured),
        "importance": (an.Importance(an.Variant(deep), **texts), an.LayerRated),
    }[kind]
    ticket = workbench.ask(request)
    until(workbench, ticket, begun)
    for process in children():
        process.kill()
    ending = workbench.wait(ticket, 10).ending
    assert isinstance(ending, an.Broken)
    assert "ended" in ending.message
    assert "starts again" in ending.remedy
    again = workbench.wait(workbench.ask(Generate([an.Variant(model)], "The river", new_tokens=3)), LONG)
    assert isinstance(again.ending, an.Answered)


def test_ten_sessions_at_once_are_not_mixed_up(workbench, model):
    prompts = [
        f"The {noun} {verb}" for noun in ("river", "city", "garden", "letter", "machine") for verb in ("is", "or")
    ]
    alone = [_text(workbench, model, p) for p in prompts]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.__setitem__(i, _text(workbench, model, p)))
        for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert [found[i] for i in range(len(prompts))] == alone
    assert sum(child.memory_info().rss for child in children()) < 2_000_000_000


def _text(workbench, model, prompt):
    reading = workbench.wait(workbench.ask(Generate([an.Variant(model)], prompt, new_tokens=12)), LONG)
    return [(a.token, a.piece) for a in reading.answers if isinstance(a, an.TokenGenerated)]


def test_places_are_told_and_bounded(model):
    bench = Workbench(places=3)
    try:
        tickets = [bench.ask(endless(model))]
        until(bench, tickets[0], an.PromptRead)
        tickets += [bench.ask(endless(model)) for _ in range(3)]
        assert [bench.read(t).place for t in tickets][1:] == [1, 2, 3]
        with pytest.raises(TrspError, match="3 places"):
            bench.ask(endless(model))
        changed = bench.ask(endless(model), instead=tickets[2])
        assert [bench.read(t).place for t in (tickets[1], changed, tickets[3])] == [1, 2, 3], "his place is kept"
        assert isinstance(bench.read(tickets[2]).ending, an.Stopped)
        for ticket in reversed(tickets):
            bench.cancel(ticket)
        assert all(isinstance(bench.wait(t, LONG).ending, an.Stopped) for t in tickets)
    finally:
        bench.close()


def test_an_idle_child_is_let_go_and_comes_back():
    bench, before = Workbench(idle=0.2), children()
    try:
        assert isinstance(bench.wait(bench.ask(ANY), LONG).ending, an.Refused)
        end = time.monotonic() + 20
        while children() != before and time.monotonic() < end:
            time.sleep(0.05)
        assert children() == before
        assert isinstance(bench.wait(bench.ask(ANY), LONG).ending, an.Refused)
    finally:
        bench.close()


def test_a_child_that_cannot_start_is_told():
    bench = Workbench(command=("/bin/sh", "-c", "echo no torch here >&2; exit 3"))
    try:
        ending = bench.wait(bench.ask(ANY), 20).ending
        assert isinstance(ending, an.Broken)
        assert "code 3" in ending.message
        assert "no torch here" in ending.trace
    finally:
        bench.close()


def test_the_child_ends_with_the_server(model):
    child = Child(client.COMMAND)
    child.send(an.pack("ticket", endless(model)))
    while "TokenGenerated" not in (child.read(LONG) or ""):
        pass
    child.process.stdin.close()  # as when the server dies
    assert child.process.wait(15) == 0
    child.close()


def test_old_answers_are_forgotten(monkeypatch):
    monkeypatch.setattr("trsp_core.workbench.client.KEPT", 2)
    bench = Workbench(command=("/bin/false",))
    try:
        tickets = []
        for _ in range(4):
            tickets.append(bench.ask(ANY))
            bench.wait(tickets[-1], 20)
        with pytest.raises(TrspError):
            bench.read(tickets[0])
        assert bench.read(tickets[-1]).ending is not None
    finally:
        bench.close()


def test_equal_requests_are_one_until_the_last_is_cancelled(model):
    bench, request = Workbench(), endless(model)
    try:
        first = bench.ask(request)
        until(bench, first, an.TokenGenerated)
        second = bench.ask(request)
        assert bench.read(second).place == 0
        until(bench, second, an.TokenGenerated)
        bench.cancel(first)
        assert isinstance(bench.read(first).ending, an.Stopped)
        count = len(bench.read(second).answers)
        assert len(bench.follow(second, count, LONG).answers) > count, "the other goes on"
        bench.cancel(second)
        assert isinstance(bench.wait(second, LONG).ending, an.Stopped)
    finally:
        bench.close()


def test_what_nobody_listens_for_is_dropped(model, monkeypatch):
    monkeypatch.setattr("trsp_core.workbench.client.UNREAD", 0.0)
    bench, open_tabs = Workbench(), {"one", "two"}
    try:
        first = bench.ask(endless(model), listens=lambda: "one" in open_tabs)
        until(bench, first, an.TokenGenerated)
        second = bench.ask(endless(model), listens=lambda: "two" in open_tabs)
        third = bench.ask(Generate([an.Variant(model)], "The river", new_tokens=3))
        open_tabs.clear()
        assert isinstance(bench.wait(third, LONG).ending, an.Answered)
        for ticket in (first, second):
            assert isinstance(bench.read(ticket).ending, an.Stopped)
        assert not bench.read(second).answers[:-1], "it was never begun"
    finally:
        bench.close()


def test_a_model_is_loaded_ahead_once_and_after_what_people_ask(model, text):
    bench, request = Workbench(), an.Prepare(model, text, text, 0)
    try:
        first = bench.ask(endless(model))
        until(bench, first, an.TokenGenerated)
        for _ in range(3):
            bench.prepare(request)
        asked = bench.ask(WhatIf(model, [2], text=text, heldout=text, sample_tokens=0))
        assert bench.read(asked).place == 1, "it comes before what is only prepared"
        bench.cancel(first)
        assert isinstance(bench.wait(asked, LONG).ending, an.Answered)
        ready = bench.wait(bench.ask(request), LONG)
        assert isinstance(ready.ending, an.Answered)
        assert not ready.answers[:-1], "the model was there"
    finally:
        bench.close()


def test_a_wait_tells_whose_requests_come_first(model):
    bench = Workbench()
    try:
        first = bench.ask(endless(model), visitor="me")
        until(bench, first, an.TokenGenerated)
        mine, other = bench.ask(endless(model), visitor="me"), bench.ask(endless(model), visitor="you")
        assert (bench.read(mine).place, bench.read(mine).others) == (1, 0)
        assert (bench.read(other).place, bench.read(other).others) == (2, 2)
        assert isinstance(bench.read(other).at_work, Generate)
        for ticket in (other, mine, first):
            bench.cancel(ticket)
    finally:
        bench.close()
