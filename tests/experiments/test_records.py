"""The records that ship: they read, and written anew and read again they give the same figures."""

from __future__ import annotations

import json

import pytest

from trsp_core import paths
from trsp_core.errors import TrspError
from trsp_core.evaluation import intervals
from trsp_core.experiments import grid_results, plan_results

PLANS = sorted((paths.ASSETS / "evidence").glob("*.json"))
GRIDS = sorted(grid_results.shipped().glob("*.json"))


@pytest.mark.parametrize("file", [*PLANS, *GRIDS], ids=lambda file: file.stem)
def test_a_shipped_record_reads_and_is_the_same_when_it_is_written_anew(file, tmp_path):
    results, entries = (plan_results, "rows") if file in PLANS else (grid_results, "points")
    record = results.load(file)
    (tmp_path / file.name).write_text(results.to_json(record), "utf-8")
    assert results.load(tmp_path / file.name) == record
    document, again = (json.loads(f.read_text("utf-8")) for f in (file, tmp_path / file.name))
    for entry, written in zip(document.pop(entries), again.pop(entries), strict=True):
        assert entry.items() <= written.items()
    assert document.items() <= again.items()
    for entry in getattr(record, entries):
        for nats in entry.losses.values():
            assert intervals.perplexity(nats).value > 1


@pytest.mark.parametrize("results", [plan_results, grid_results])
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"schema": "1", "rows": [], "points": []}', "[" * 9999]
)
def test_what_is_no_record_is_refused(results, text, tmp_path):
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(TrspError, match=r"a\.json is no record of"):
        results.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"schema": 2}', "utf-8")
    with pytest.raises(TrspError, match="newer version"):
        results.load(tmp_path / "a.json")
