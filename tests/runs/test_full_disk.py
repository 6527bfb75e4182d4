"""A disk that fills up: the run says so, and every event before is there. Files are capped by the system itself."""

import subprocess
import sys
from pathlib import Path

from tests import ROOT
from trsp_core.runs.store import Run

CODE = """
import sys
from pathlib import Path
from trsp_core.runs import recorder
from trsp_core.schema.events import Noted, Progressed
from trsp_core.runs.store import Run

def story(folder):
    for i in range(50):
        yield Progressed(i)
    (folder / ".model.partial").mkdir()
    with open(folder / ".model.partial" / "weights", "wb") as file:
        file.write(b"x" * 1000)
    raise OSError(28, "No space left on device")

run = Run(Path(sys.argv[1]))
print(recorder.record(run, story(run.folder)).ended)
"""


def test_a_full_disk_ends_the_run_in_writing_and_gives_the_room_back(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=ROOT)  # fmt: skip
    assert done.stdout.strip() == "failed"
    folded = Run(tmp_path).state()
    assert folded.count == 51
    assert folded.failure.message == "The disk is full."
    assert not (tmp_path / ".model.partial").exists()


FULL = """
import os, sys
from pathlib import Path
from trsp_core.runs import recorder
from trsp_core.schema.events import Noted
from trsp_core.runs.store import Run

ROOM = 100_000
run = Run(Path(sys.argv[1]))
written = recorder._append

def append(file, data):  # a disk of ROOM bytes, shared by all of the run's files
    if run.size() + len(data) > ROOM:
        raise OSError(28, "No space left on device")
    written(file, data)

recorder._append = append
ended = recorder.record(run, (Noted("x" * 300) for _ in range(1000)))
print(ended.ended, run.size() <= ROOM)
"""


def test_events_that_fill_the_disk_leave_room_for_the_ending(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=ROOT)  # fmt: skip
    assert done.stdout.split() == ["failed", "True"]
    folded = Run(tmp_path).state()
    assert folded.failure.message == "The disk is full."
    assert len(folded.notes) > 50
    assert Run(tmp_path).summary()["failure"]["remedy"]
    assert not (tmp_path / ".reserve").exists()


CAPPED = """
import resource, signal, sys
from pathlib import Path
from trsp_core.runs import recorder
from trsp_core.schema.events import Noted
from trsp_core.runs.store import Run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the cap fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
run = Run(Path(sys.argv[1]))
try:
    recorder.record(run, (Noted("x" * 300) for _ in range(100)))
except OSError:
    print("no room for the ending either")
"""


def test_a_write_that_breaks_off_leaves_no_half_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", CAPPED, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=ROOT)  # fmt: skip
    data = (tmp_path / "events.jsonl").read_bytes()
    assert data.endswith(b"\n")
    lines, offset = Run(tmp_path).read()
    assert offset == len(data)
    assert len(lines) == len(data.splitlines()) >= 10
    assert Run(tmp_path).status() in ("lost", "failed"), done.stdout
