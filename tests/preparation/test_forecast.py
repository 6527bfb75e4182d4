"""Forecasts: which phases, how they grow, how much memory, and what the machine has."""

from pathlib import Path

import pytest

from trsp_core import machine
from trsp_core.errors import TrspError
from trsp_core.models.inspection import Facts
from trsp_core.preparation import forecast
from trsp_core.pruning import validate
from trsp_core.schema import config

SMOL = Facts(
    name="smollm2-135m",
    folder=Path(),
    architecture="LlamaForCausalLM",
    n_layers=30,
    width=576,
    vocabulary=49152,
    max_length=8192,
    parameters=134_515_008,
    layer_parameters=[3_540_096] * 30,
    bytes=538_090_408,
)
TWO_CORES = 182.0  # GFLOP/s


def made(preset=None, rate=TWO_CORES, **settings):
    return forecast.forecast(validate.from_values(settings, preset), SMOL, rate)


def names(**settings):
    return [phase["name"] for phase in made(**settings).phases]


def test_phases_are_those_that_will_occur():
    whole = ["load", "text", "dense", "importance", "choose", "direct", "transfer", "trained", "importance after"]
    whole += ["pruned", "speed", "save"]
    assert names() == whole
    assert names(importance_blocks=0) == [name for name in whole if not name.startswith("importance")]
    assert names(control="delete_first") == [n for n in whole if n not in ("trained", "importance", "importance after")]
    assert names(stage2_steps=0) == ["load", "text", "dense", "choose", "pruned", "speed", "save"]
    assert names(save_model=False, speed_repeats=0) == whole[:-2]


def test_presets_keep_their_promise_on_two_cores():
    assert made("two-stage").seconds <= 180
    assert made("quick").seconds <= 260
    assert made("standard").seconds <= 600


def test_forecast_follows_what_is_asked_for():
    base = made()
    assert made(stage2_steps=120).seconds > 1.3 * base.seconds
    assert made(rate=2 * TWO_CORES).seconds < base.seconds
    assert made(one_shot=True).seconds < base.seconds
    assert made(method="random").seconds < base.seconds
    direct = {"stage2_steps": 0}
    assert made(method="sleb", **direct).seconds > 1.3 * made(method="shortgpt", **direct).seconds
    assert made(method="sleb", score_blocks=16, **direct).seconds > made(method="sleb", **direct).seconds
    assert made(control="delete_first").seconds < base.seconds
    assert made(distil=0.5).seconds > base.seconds
    assert made(distil=0.5).peak_bytes > base.peak_bytes
    assert made(learn_weights=True).seconds > base.seconds
    assert made(stage2_steps=0, learn_weights=True).peak_bytes > 1.5 * made(stage2_steps=0).peak_bytes
    assert made(precision="bfloat16").peak_bytes < base.peak_bytes
    assert made(batch_blocks=16).peak_bytes > base.peak_bytes
    assert base.seconds == pytest.approx(sum(phase["seconds"] for phase in base.phases))


def test_a_forecast_without_a_measured_rate_says_that_it_is_rough(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path))
    monkeypatch.setattr(forecast, "on_gpu", lambda config: False)
    assert made(rate=None).rough
    for rate in (100.0, 300.0, 200.0):
        machine.write_rate(rate)
    assert machine.read_rate() == 200.0
    assert not made(rate=None).rough
    assert made(rate=None).seconds == made(rate=200.0).seconds


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"gflops": "x"}', '{"gflops": [null]}', '{"gflops": [-5]}'])
def test_a_damaged_record_of_the_machine_is_no_record(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path))
    (tmp_path / "machine.json").write_text(content)
    assert machine.read_rate() is None
    machine.write_rate(50.0)
    assert machine.read_rate() == 50.0


def test_only_the_last_rates_count(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path))
    for rate in [1.0] * 10 + [90.0] * machine.MOST_RATES:
        machine.write_rate(rate)
    assert machine.read_rate() == 90.0


def test_a_cache_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "file" / "below"))
    machine.write_rate(100.0)
    assert machine.read_rate() is None


def test_a_run_beyond_memory_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1_500_000_000)
    with pytest.raises(TrspError, match=r"needs about .* of memory, 1\.5 GB are free"):
        forecast.check_memory(made())
    monkeypatch.setattr(machine, "available_memory", lambda: 10**13)
    forecast.check_memory(made())


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    for name, text in {"max": "4000000", "current": "3000000", "stat": "anon 5\ninactive_file 500000\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path / "max", tmp_path / "current", tmp_path / "stat"),))
    assert machine.available_memory() == 1_500_000
    (tmp_path / "max").write_text("max")
    assert machine.available_memory() > 10_000_000


def test_layers_named_by_hand_are_counted():
    by_hand = validate.from_values({"method": "manual", "layers": "3,5-7"})
    assert config.count_to_remove(by_hand, 30) == 4
    assert config.count_to_remove(config.RunConfig(), 30) == 8
