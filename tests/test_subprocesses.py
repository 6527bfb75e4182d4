"""The JSON-lines protocol with a child process: what one that misbehaves, dies or keeps silent comes to."""

from __future__ import annotations

import contextlib
import sys
import time

import psutil
import pytest

from trsp_core import subprocesses
from trsp_core.errors import TrspError
from trsp_core.subprocesses import Child, ChildFailed, answers

BEGIN = "import json, os, signal, sys, time\nquestion = json.loads(sys.stdin.readline())\n"


def child(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", BEGIN + code]


def ask(code: str, **how) -> list:
    return [line for line in answers(child(code), {"number": 4}, **how) if line is not None]


@pytest.fixture(autouse=True)
def no_child_is_left():
    before = psutil.Process().children()
    yield
    assert [process for process in psutil.Process().children() if process not in before] == []


def test_a_question_is_answered_in_lines():
    assert ask("for n in range(question['number']): print(json.dumps({'n': n}))") == [{"n": n} for n in range(4)]


def test_a_refusal_is_raised_whatever_the_exit_code():
    for code in (0, 1):
        with pytest.raises(TrspError, match="No room") as caught:
            ask(f"print(json.dumps({{'error': 'No room.', 'remedy': 'Make some.'}})); sys.exit({code})")
        assert caught.value.remedy == "Make some."


@pytest.mark.parametrize("line", ["no json", "[1]", "null", '{"cut": ', "[" * 100_000, "\\xff\\xfe"])
def test_garbage_is_told_and_ends_the_child(line):
    with pytest.raises(ChildFailed) as caught:
        ask(f"sys.stdout.buffer.write(b'{line}' + b'\\n'); sys.stdout.flush(); time.sleep(60)")
    assert "no JSON object" in caught.value.ending


def test_a_line_without_end_is_ended_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(subprocesses, "MOST_LINE_BYTES", 1_000_000)
    with pytest.raises(ChildFailed, match=r"a line of more than 1\.0 MB"):
        ask("while True: sys.stdout.write('x' * 65536)")


def test_silence_is_told_while_the_child_works_and_ends_with_its_time():
    began, silences = time.monotonic(), 0
    with pytest.raises(ChildFailed) as caught:
        for line in answers(child("time.sleep(60)"), {}, seconds=1.0, pause=0.2):
            silences += line is None
    assert caught.value.late
    assert silences >= 3
    assert time.monotonic() - began < 10


def test_how_a_child_died_is_told():
    with pytest.raises(ChildFailed) as caught:
        ask("sys.stderr.write('the reason'); sys.exit(3)")
    assert (caught.value.code, caught.value.ending, caught.value.reason) == (3, "exit code 3", "the reason")
    with pytest.raises(ChildFailed) as caught:
        ask("os.kill(os.getpid(), signal.SIGKILL)")
    assert "was killed" in caught.value.reason
    with pytest.raises(ChildFailed) as caught:
        ask("raise MemoryError")
    assert caught.value.short_of_memory


def test_what_it_writes_to_stderr_neither_stops_it_nor_is_kept_in_full():
    assert ask("sys.stderr.write('x' * 5_000_000); print('{}')") == [{}]
    with pytest.raises(ChildFailed) as caught:
        ask("sys.stderr.write('x' * 5_000_000 + 'end'); sys.exit(1)")
    assert len(caught.value.stderr) == subprocesses.MOST_STDERR_BYTES
    assert caught.value.reason.endswith("end")


def test_closing_the_answers_ends_the_child_with_the_time_that_it_needs_to_clear_up(tmp_path):
    note = tmp_path / "note"
    code = f"""
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    print('{{}}', flush=True)
    time.sleep(60)
finally:
    open({str(note)!r}, 'w').close()
"""
    with contextlib.closing(answers(child(code), {}, grace=10.0)) as lines:
        assert next(lines) == {}
    assert note.exists()


def test_a_child_that_leaves_a_process_with_its_pipes_is_still_seen_to_end():
    code = "if os.fork() == 0: time.sleep(8); os._exit(0)\nprint('{}', flush=True); os._exit(0)"
    began = time.monotonic()
    assert ask(code) == [{}]
    assert time.monotonic() - began < 7


def test_many_questions_go_to_one_child():
    asked = Child(child("for line in sys.stdin: print(line.strip()[::-1], flush=True)"))
    asked.send("{}")
    for word in ("abc", "déjà"):
        asked.send(word)
        assert asked.read(20) == word[::-1]
    with pytest.raises(TimeoutError):
        asked.read(0.1)
    asked.process.kill()
    assert asked.read(20) is None
    asked.send("nobody reads this")
    assert asked.close().code == -9
