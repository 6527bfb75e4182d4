"""The way from the model hub, against a small hub on this machine: search, look, download, and all that goes wrong."""

from __future__ import annotations

import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import streamlit as st
import torch

from tests import ROOT, story, tiny
from tests.hub_server import Hub, serving
from tests.pages.test_pages import again, open_page, texts
from trsp_core.cli import main
from trsp_core.errors import TrspError
from trsp_core.models import catalog, download, loading
from trsp_core.runs.limits import OPEN

ID = "someone/tiny-llama"


def fetch(name):
    return download.fetch(name, OPEN)


def look(name):
    return download.look(name, OPEN)


def search(words):
    return download.search(words, OPEN)


@pytest.fixture
def hub(tmp_path, tiny_model, monkeypatch):
    """A hub with one model, an empty cache, and clients that lose patience soon."""
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    folder = shutil.copytree(tiny_model, tmp_path / "served")
    (folder / "evil.py").write_text("raise SystemExit")
    with serving(Hub({ID: folder})) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def refused(call, *arguments) -> TrspError:
    with pytest.raises(TrspError) as caught:
        list(call(*arguments) or [])
    assert caught.value.remedy
    return caught.value


def reconfigured(hub, **changes):
    file = hub.models[ID] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def partial() -> list:
    return list(catalog.repository(ID).glob("blobs/*.incomplete"))


def is_whole(hub) -> bool:
    theirs = (hub.models[ID] / "model.safetensors").read_bytes()
    return (catalog.locate(ID) / "model.safetensors").read_bytes() == theirs


def test_a_search_finds_ids_with_what_matters(hub):
    hub.models["other/model"] = hub.models[ID]
    (found,) = search("tiny llama")
    assert (found.id, found.parameters, found.licence, found.downloads) == (ID, 60_000, "apache-2.0", 1234)
    assert search("nothing of that name") == []


def test_a_look_says_all_before_a_byte_of_the_weights(hub, tiny_model):
    model = look(ID)
    here = catalog.facts(str(tiny_model))
    assert (model.facts.n_layers, model.facts.vocabulary) == (tiny.L, tiny.V)
    assert (model.facts.parameters, model.facts.layer_parameters) == (here.parameters, list(here.layer_parameters))
    assert model.facts.bytes == here.bytes
    assert here.bytes < model.bytes < here.bytes + 200_000
    assert model.licence == "apache-2.0"
    assert "evil.py" not in model.small + model.weights
    assert hub.sent == 0
    assert not catalog.is_ready(ID)
    assert not catalog.hub_cache().exists()


def test_a_model_in_shards_is_looked_up_and_downloaded(hub, tiny_model):
    shutil.rmtree(hub.models[ID])
    tiny.build().save_pretrained(hub.models[ID], max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(hub.models[ID])
    (hub.models[ID] / "consolidated.safetensors").write_bytes(b"the same weights once more")
    model = look(ID)
    assert len(model.weights) > 1
    assert model.facts.parameters == catalog.facts(str(tiny_model)).parameters
    list(fetch(ID))
    assert catalog.facts(ID).layer_parameters == catalog.facts(str(tiny_model)).layer_parameters
    assert not (catalog.locate(ID) / "consolidated.safetensors").exists()


def test_a_download_tells_its_progress_and_brings_no_code(hub):
    hub.pace = 0.25
    steps = list(fetch(ID))
    assert steps[-1].fraction == 1.0
    assert any(0 < step.fraction < 1 and "kB" in step.message for step in steps)
    assert is_whole(hub)
    assert not (catalog.locate(ID) / "evil.py").exists()
    model, tokenizer = loading.load(ID)
    assert len(model.model.layers) == tiny.L
    assert tokenizer("The river").input_ids
    hub.asked.clear()
    assert [step.fraction for step in fetch(ID)] == [1.0]
    assert hub.asked == []
    assert [facts.name for facts in catalog.here()] == [ID]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub):
    """At the last of the pieces of 10 MB in which the hub's client writes."""
    from safetensors.torch import load_file, save_file

    file, piece = hub.models[ID] / "model.safetensors", 10 * 2**20
    save_file(load_file(file) | {"beside": torch.ones(6_000_000)}, file, {"format": "pt"})
    hub.cuts = [piece + 300_000, 200_000]
    list(fetch(ID))
    assert is_whole(hub)
    ranges = [asked.partition("bytes=")[2] for asked in hub.asked if asked.endswith("-")]
    assert ranges == [f"{piece}-", f"{piece}-"]
    assert partial() == []


def test_a_download_that_gives_up_is_no_model_and_goes_on_later(hub):
    """What came whole stays; of the rest nothing stays, and nothing takes it for the model."""
    hub.cuts = [0] * 40
    said = refused(fetch, ID)
    assert "could not be had from the hub" in said.message
    assert not catalog.is_ready(ID)
    assert "not on this machine" in refused(catalog.facts, ID).message
    assert catalog.here() == []
    assert partial() == []
    hub.cuts, before = [], len(hub.asked)
    list(fetch(ID))
    assert is_whole(hub)
    assert not any(asked.startswith("GET") and asked.endswith("tokenizer.json") for asked in hub.asked[before:])


@pytest.mark.parametrize("kill", [False, True])
def test_a_download_that_is_cancelled_or_killed_leaves_nothing_half(hub, kill, monkeypatch):
    hub.pace = 0.2
    children = []
    plain = download.subprocess.Popen
    monkeypatch.setattr(download.subprocess, "Popen", lambda *a, **k: children.append(plain(*a, **k)) or children[-1])
    fetching = fetch(ID)
    while not hub.sent:
        next(fetching)
    if kill:
        children[0].kill()
        assert "could not be made ready" in refused(lambda: fetching).message
    else:
        fetching.close()
    assert children[0].poll() is not None
    assert partial() == []
    assert not catalog.is_ready(ID)
    hub.pace = 0.0
    list(fetch(ID))
    assert is_whole(hub)


def test_parts_that_somebody_is_at_are_left_alone(hub):
    import fcntl

    blobs, locks = catalog.repository(ID) / "blobs", catalog.hub_cache() / ".locks" / catalog.repository(ID).name
    for folder in (blobs, locks):
        folder.mkdir(parents=True)
    (blobs / "abc.12345678.incomplete").touch()
    (blobs / "def.12345678.incomplete").touch()
    with (locks / "abc.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        list(fetch(ID))
        assert [part.name for part in partial()] == ["abc.12345678.incomplete"]


def test_a_gated_model_says_where_its_terms_are(hub, monkeypatch):
    hub.gated.add(ID)
    for call in (look, fetch):
        said = refused(call, ID)
        assert "terms accepted" in said.message
        assert f"huggingface.co/{ID}" in said.remedy
        assert "HF_TOKEN" in said.remedy
    assert hub.sent == 0
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert look(ID).gated


def test_a_model_that_the_hub_has_not_is_told(hub):
    said = refused(look, "someone/else")
    assert "no such model" in said.message


def test_a_hub_that_is_slow_is_given_up_with_a_sentence(hub, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 3.0)
    hub.delay = 30.0
    for call, word in ((look, ID), (search, "tiny")):
        began = time.monotonic()
        assert "has not answered for 3 s" in refused(call, word).message
        assert time.monotonic() - began < 10


def test_a_download_that_stalls_is_given_up_with_a_sentence(hub):
    list(fetch(ID))
    shutil.rmtree(catalog.hub_cache())
    hub.pace = 30.0
    assert "did not answer in time" in refused(fetch, ID).message
    assert partial() == []


def test_what_cannot_be_used_is_refused_before_a_byte_of_the_weights(hub):
    reconfigured(hub, auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
    assert "auto_map" in refused(fetch, ID).message
    reconfigured(hub, auto_map=None)
    (hub.models[ID] / "config.json").write_text(json.dumps({"is_encoder_decoder": True}))
    assert "encoder-decoder" in refused(fetch, ID).message
    tiny.build().config.save_pretrained(hub.models[ID])
    reconfigured(hub, architectures=["LlamaForCausalLM"], model_type="gemma3n")
    assert "whole layers" in refused(fetch, ID).message
    reconfigured(hub, model_type="llama", quantization_config={"bits": 4})
    assert "quantized" in refused(fetch, ID).message
    (hub.models[ID] / "model.safetensors").rename(hub.models[ID] / "pytorch_model.bin")
    assert "pickled" in refused(fetch, ID).message
    assert hub.sent == 0
    assert not catalog.hub_cache().exists()


def test_an_error_in_our_own_code_is_no_fault_of_the_network(monkeypatch):
    from trsp_core.models import hub as hub_module

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=[]))
    with pytest.raises(AttributeError, match="sha"):
        hub_module.look(ID)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: {}["an answer without it"])
    with pytest.raises(TrspError, match="could not be had from the hub"):
        hub_module.look(ID)


def test_a_disk_without_room_is_seen_before_the_download(hub, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    from trsp_core.models import hub as hub_module

    with pytest.raises(TrspError, match="are needed"):
        hub_module.download(look(ID))
    assert hub.sent == 0


def test_the_shell_lists_searches_and_looks(hub, capsys):
    assert main.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(catalog.CATALOGUE)
    assert not any(row["here"] for row in rows)
    assert main.main(["models", "tiny", "llama", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [ID]
    assert main.main(["models", ID]) == 0
    assert "apache-2.0" in capsys.readouterr().out
    assert main.main(["models", ID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["n_layers"] == tiny.L
    assert main.main(["fetch", ID, "--json"]) == 0
    capsys.readouterr()
    assert main.main(["models"]) == 0
    assert ID in capsys.readouterr().out
    assert main.main(["models", "someone/else"]) == 2


def test_the_page_looks_up_downloads_and_is_ready_to_start(hub, monkeypatch):
    """Size, licence, layers and memory before the download; the ratio in layers already; Start only after it."""
    monkeypatch.chdir(ROOT)
    st.cache_resource.clear()
    app = open_page("run", model=ID, ratio="0.4", **story.SMALL)
    assert hub.asked == []
    assert app.get_by_key("start").disabled
    app.get_by_key("look-up").click().run()
    shown = texts(app)
    for said in ("apache", f"{tiny.L} layers", "of memory", "2 of 5 layers", "once the model is on this machine"):
        assert said in shown.replace("\\", "")
    assert app.get_by_key("start").disabled
    assert hub.sent == 0
    app.get_by_key("fetch-now").click().run()
    again(app, lambda: not app.get_by_key("start").disabled)
    assert is_whole(hub)
    again(app, lambda: f"take-{ID}" in str(app))
    assert f"take-{ID}" in str(app)


def test_the_page_finds_a_model_by_words_and_takes_it(hub, monkeypatch):
    monkeypatch.chdir(ROOT)
    st.cache_resource.clear()
    app = open_page("run")
    app.get_by_key("search-words").set_value("tiny").run()
    app.get_by_key("search").click().run()
    app.get_by_key(f"take-{ID}").click().run()
    assert app.get_by_key("knob-model").value == ID
    hub.models.pop(ID)
    app.get_by_key("look-up").click().run()
    assert "no such model" in app.error[0].value
    assert app.get_by_key("look-up")


def test_memory_that_is_short_is_said_before_the_download(hub, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 10_000_000)
    st.cache_resource.clear()
    app = open_page("run", model=ID, **story.SMALL)
    app.get_by_key("look-up").click().run()
    assert "not pruned here now" in app.warning[0].value


def test_a_fetch_goes_on_without_whoever_asked(hub):
    """In a thread of the server: one a model, watched by any tab, stopped by any."""
    fetches = download.Downloads(OPEN)
    hub.pace = 0.3
    fetches.start(ID)
    fetches.start(ID)
    assert wait(lambda: hub.sent)
    assert threading.active_count() < 20
    assert fetches.look(ID).running
    fetches.stop(ID)
    assert wait(lambda: not fetches.look(ID).running)
    assert fetches.look(ID).refusal is None
    assert partial() == []
    hub.pace = 0.0
    fetches.start(ID)
    assert wait(lambda: catalog.is_ready(ID))
    assert wait(lambda: not fetches.look(ID).running)
    fetches.start("someone/else")
    assert wait(lambda: fetches.look("someone/else").refusal)


def wait(true, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(true())
