"""Exports: what is in them, the proof that can fail, nothing half, the token nowhere, and downloads that stream."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette

from pages.ui.app_state import file_routes
from tests import ROOT, story, tiny
from trsp_core import formatting, subprocesses
from trsp_core.cli import main
from trsp_core.errors import TrspError
from trsp_core.evaluation import stock_process, verification
from trsp_core.export import checkpoint, curves_csv, html_report, hub_upload, model_card
from trsp_core.pruning import engine, validate
from trsp_core.runs import recorder, replay
from trsp_core.runs.store import Run, Store
from trsp_core.schema import config

SMALL = {
    "block_length": 16,
    "measure_length": 16,
    "measure_blocks": 3,
    "calibration_blocks": 8,
    "probe_blocks": 1,
    "stage1_steps": 1,
    "stage2_steps": 2,
    "ratio": 0.4,
    "speed_repeats": 0,
    "sample_tokens": 3,
    "kl_blocks": 1,
    "importance_blocks": 0,
}
TOKEN = "hf_" + "secretsecret"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "own text.txt"
    file.write_text(tiny.text(1200), "utf-8")
    return file


def pruned(root: Path, model: Path, text: Path, **settings) -> Run:
    """A finished run, in this process."""
    values = {"model": str(model), "text": str(text), "heldout": str(text), **SMALL, **settings}
    run = Store(root).create(validate.from_values(values))
    assert recorder.record(run, engine.execute(run.config(), run.folder)).ended == "finished"
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, text) -> Run:
    return pruned(tmp_path_factory.mktemp("trained"), tiny_model, text)


@pytest.fixture(scope="module")
def deleted(tmp_path_factory, tiny_model, text) -> Run:
    """Layers 1 and 3 deleted, nothing trained."""
    how = {"method": "manual", "layers": "1,3", "stage2_steps": 0}
    return pruned(tmp_path_factory.mktemp("deleted"), tiny_model, text, **how)


FOUND = {
    "dtype": "float32",
    "memory_dtype": "float32",
    "tokens": 32,
    "same_ids": True,
    "largest_difference": 0.0,
    "largest_logit": 20.0,
    "kl": 0.0,
    "same_likeliest": 32,
    "new_tokens": 16,
    "same_text": True,
    "cached_equals_uncached": True,
    "tie": None,
}


@pytest.fixture
def no_child(monkeypatch, unproved) -> None:
    """For what happens around the proof: a proof that costs nothing, of the run and of the export."""
    monkeypatch.setattr("trsp_core.evaluation.verification.check", lambda folder, kept: verification.Proof(**FOUND))


def exported(run: Run, target: Path, **how) -> Path:
    steps = list(checkpoint.export(run, target, **how))
    assert [s.fraction for s in steps] == sorted(s.fraction for s in steps)
    return target


def test_an_export_is_a_checkpoint_with_card_settings_and_proof(trained, tmp_path):
    folder = exported(trained, tmp_path / "out")
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md", "run.json",
            "proof.json"} <= {f.name for f in folder.iterdir()}  # fmt: skip
    found = json.loads((folder / "proof.json").read_text())
    assert found["largest_difference"] == 0, "float32 on one machine is equal to the bit"
    assert found["same_text"]
    assert found["cached_equals_uncached"]
    written = (folder / "README.md").read_text()
    assert found["told"] in written
    front = yaml.safe_load(written.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "trsp" in front["tags"]
    state = trained.state()
    assert f"Layers {', '.join(map(str, state.removed.removed))} of 5" in written
    for domain in ("calibration", "heldout"):
        assert f"{state.perplexity['pruned'][domain]:,.1f} [" in written
    assert "| Trained, all layers still there |" in written
    assert "not (folder" not in written
    assert not (folder / "mergekit.yml").exists()
    assert "There is no mergekit.yml: more than whole layers of the base was changed." in written
    assert "GGUF" not in written
    repeat = re.search(r"```sh\n(.+)\n```", written)[1]
    assert shlex.split(repeat)[:4] == ["python", "-m", "trsp_core", "run"]


def test_no_folder_of_this_machine_is_told(no_child, trained, tmp_path):
    folder = exported(trained, tmp_path / "out")
    for name in ("README.md", "run.json", "proof.json"):
        said = (folder / name).read_text()
        assert str(trained.folder.parent) not in said
        assert "/tmp" not in said
        assert str(ROOT) not in said
    assert validate.from_json((folder / "run.json").read_text()).text == "own text.txt"
    assert "/tmp" not in html_report.html(trained)


def test_what_killed_exports_left_is_swept_and_what_living_ones_work_on_is_not(trained, tmp_path):
    dead, living, other = (tmp_path / f".{name}.partial" for name in ("out.0123abcd", "out.89abcdef", "outer.0123abcd"))
    for folder in (dead, living, other):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        exported(trained, tmp_path / "out")
    finally:
        os.close(descriptor)
    assert not dead.exists()
    assert living.exists()
    assert other.exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_number_format_states_its_difference(deleted, tmp_path, dtype):
    folder = exported(deleted, tmp_path / "out", dtype=dtype)
    found = json.loads((folder / "proof.json").read_text())
    assert (found["dtype"], found["memory_dtype"]) == (dtype, "float32")
    assert 0 < found["largest_difference"] < verification.ROUNDING[dtype] * found["largest_logit"]
    assert f"written as {dtype}" in (folder / "README.md").read_text()
    weights = load_file(folder / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2"])
def test_other_families_are_proved_too(model_type, tmp_path, text):
    model = tiny.save(tmp_path / "model", model_type)
    run = pruned(tmp_path / "runs", model, text, method="manual", layers="1,3", stage2_steps=0)
    assert list(checkpoint.export(run, tmp_path / "out"))[-1].fraction == 1


def test_a_narrowed_model_is_proved_too(tmp_path, tiny_model, text):
    run = pruned(tmp_path / "runs", tiny_model, text, method="width", stage2_steps=0, score_blocks=2)
    folder = exported(run, tmp_path / "out")
    assert "No layer is gone" in (folder / "README.md").read_text()
    assert not (folder / "mergekit.yml").exists()


def spoil_weights(run: Run) -> None:
    file = run.model_folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, file, {"format": "pt"})


def spoil_a_layer(run: Run) -> None:
    file = run.model_folder / "model.safetensors"
    weights = load_file(file)
    for name in [n for n in weights if n.startswith("model.layers.1.")]:
        weights[name] = weights[name.replace("layers.1", "layers.2")].clone()
    save_file(weights, file, {"format": "pt"})


def spoil_numbers(run: Run) -> None:
    file = run.model_folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})


def spoil_tokenizer(run: Run) -> None:
    file = run.model_folder / "tokenizer.json"
    made = json.loads(file.read_text())
    made["model"]["merges"] = []
    file.write_text(json.dumps(made))


def spoil_file(run: Run) -> None:
    (run.model_folder / "model.safetensors").write_bytes(b"\x00" * 100)


def spoil_reference(run: Run) -> None:
    run.proof_file.unlink()


@pytest.mark.parametrize(
    ("spoil", "dtype", "said"),
    [
        (spoil_weights, "", "its logits differ"),
        (spoil_a_layer, "bfloat16", "its logits differ"),
        (spoil_numbers, "", "its logits differ"),
        (spoil_tokenizer, "", "cuts the text otherwise"),
        (spoil_file, "", "could not load"),
        (spoil_reference, "", "kept no record"),
    ],
)
def test_where_the_proof_fails_there_is_no_export(spoil, dtype, said, deleted, tmp_path):
    run = Run(shutil.copytree(deleted.folder, tmp_path / "run"))
    spoil(run)
    with pytest.raises(TrspError, match=said):
        list(checkpoint.export(run, tmp_path / "place" / ("out" if dtype else "out.zip"), dtype))
    assert list((tmp_path / "place").iterdir()) == []


def test_the_proof_sees_a_cache_that_goes_wrong():
    wrong = FOUND | {"cached_equals_uncached": False, "tie": 0.3}
    half = wrong | {"dtype": "bfloat16", "memory_dtype": "bfloat16"}
    assert "key-value cache" in verification.Proof(**wrong).problems[0]
    assert verification.Proof(**half).problems == []
    assert "0.3 apart" in verification.Proof(**half).sentence
    assert "key-value cache" in verification.Proof(**half | {"tie": 0.5}).problems[0]
    assert verification.Proof(**FOUND).problems == []
    assert verification.Proof(**FOUND | {"largest_difference": float("nan")}).problems


def test_ties_are_measured_where_two_texts_part():
    model, ids = tiny.build(), tiny.ids(rows=1)
    written = stock_process.continuation(model, ids, 4, cached=True)
    assert written == stock_process.continuation(model, ids, 4, cached=False)
    assert stock_process.tie(model, ids, written, written) is None
    other = [*written[:2], (written[2] + 1) % tiny.V, written[3]]
    last = stock_process.logits(model, torch.cat([ids, torch.tensor([written[:2]])], dim=1))[-1]
    assert stock_process.tie(model, ids, written, other) == pytest.approx(abs(float(last[written[2]] - last[other[2]])))


def test_the_fresh_process_imports_nothing_of_ours():
    tree = ast.parse(Path(stock_process.__file__).read_text("utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"pathlib", "peft", "json", "os", "sys", "threading", "torch", "transformers"}


def test_an_export_that_is_closed_or_has_no_place_leaves_nothing(no_child, deleted, tmp_path):
    for stop in (1, 2):
        steps = checkpoint.export(deleted, tmp_path / "place" / "out.zip")
        for _ in range(stop):
            next(steps)
        steps.close()
        assert list((tmp_path / "place").iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(TrspError, match="no earlier export"):
        list(checkpoint.export(deleted, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "mine.zip").write_text("precious")
    with pytest.raises(TrspError, match="no earlier export"):
        list(checkpoint.export(deleted, tmp_path / "mine.zip"))
    for name in ("again", "again", "again.zip", "again.zip"):
        exported(deleted, tmp_path / name)


def test_a_run_without_a_model_or_an_end_is_refused(tmp_path):
    store = Store(tmp_path)
    for status, said in (("finished", "kept no model"), ("failed", "has not finished")):
        with pytest.raises(TrspError, match=said):
            next(checkpoint.export(story.write(store, status), tmp_path / "out"))


def asked(run: Run, target: Path, push: str = "", token: str = "") -> dict[str, str]:
    """What a page asks its child for."""
    return {"run": str(run.folder), "target": str(target), "dtype": "", "push": push, "token": token}


def test_a_zip_holds_the_export_uncompressed_and_is_gone_with_its_run(deleted, tmp_path):
    run = Run(shutil.copytree(deleted.folder, tmp_path / deleted.id))
    (step,) = list(subprocesses.run("trsp_core.export.checkpoint", **asked(run, checkpoint.archive(run, "float32"))))[
        -1:
    ]
    (made,) = checkpoint.archives(run)
    assert made.verdict == step.message
    assert made.file.name == "tiny-llama-manual-3-of-5-float32.zip"
    with zipfile.ZipFile(made.file) as packed:
        assert {i.compress_type for i in packed.infolist()} == {zipfile.ZIP_STORED}
        assert {Path(i.filename).parent.name for i in packed.infolist()} == {made.file.stem}
        assert packed.testzip() is None
    assert [f.name for f in run.exports_folder.iterdir()] == [made.file.name]
    Store(tmp_path).delete(run.id)
    assert not made.file.exists()


def test_a_child_passes_its_refusal_on(deleted, tmp_path):
    (tmp_path / "out.zip").mkdir()
    with pytest.raises(TrspError, match="no earlier export"):
        list(subprocesses.run("trsp_core.export.checkpoint", **asked(deleted, tmp_path / "out.zip")))


def test_the_recipe_for_mergekit_keeps_the_same_layers(no_child, deleted, tmp_path):
    folder = exported(deleted, tmp_path / "out")
    written = (folder / "mergekit.yml").read_text()
    assert "Reproduces the deletion alone" in written
    recipe = yaml.safe_load(written)
    spans = [source["layer_range"] for part in recipe["slices"] for source in part["sources"]]
    assert [i for low, high in spans for i in range(low, high)] == deleted.state().removed.kept == [0, 2, 4]
    assert recipe["merge_method"] == "passthrough"
    assert recipe["dtype"] == "float32"
    assert "4-bit GGUF" in model_card.mergekit(config.RunConfig(), deleted.state(), "float32")


@pytest.mark.parametrize(
    ("settings", "exported", "dtype", "said"),
    [
        ({}, {}, "float32", ""),
        ({}, {}, "bfloat16", ""),
        ({"precision": "bfloat16"}, {"eos_token_id": [1, 2, 3]}, "bfloat16", ""),
        ({"precision": "bfloat16"}, {}, "float32", "rounded to bfloat16"),
        ({"precision": "bfloat16"}, {}, "float16", "rounded to bfloat16"),
        ({"precision": "nf4"}, {}, "bfloat16", "packed as nf4"),
        ({"precision": "int8", "save_as": "adapters"}, {"quantization_config": {}}, "quantized", "packed as int8"),
        ({}, {"layer_types": ["full_attention"] * 3}, "float32", "of each layer (layer_types)"),
        ({}, {"no_rope_layers": [1, 1, 0]}, "float32", "of each layer (no_rope_layers)"),
        ({}, {"model_type": "mixtral"}, "float32", "of the kind mixtral"),
        ({}, {"model_type": "gemma"}, "float32", ""),
        ({}, {"model_type": "gemma", "tie_word_embeddings": False}, "float32", "a head that is the embedding"),
        ({}, {"model_type": "phi3", "tie_word_embeddings": False}, "float32", ""),
        ({}, {"model_type": "phi3", "tie_word_embeddings": True}, "float32", "a head apart from the embedding"),
        ({"method": "laco"}, {}, "float32", "more than whole layers"),
        ({"stage2_steps": 1}, {}, "float32", "more than whole layers"),
    ],
)
def test_a_recipe_is_given_where_mergekit_makes_the_same_tensors(settings, exported, dtype, said, deleted):
    """Seen with mergekit 0.1.5 on tiny models; everywhere else the reason is given in its place."""
    values, of = config.RunConfig(**{"stage2_steps": 0, **settings}), {"model_type": "llama", **exported}
    reason = model_card.no_recipe(values, deleted.state(), of, dtype)
    assert bool(reason) == bool(said)
    assert said in reason
    written = model_card.write(values, deleted.state(), verification.Proof(**FOUND), "A model", of, dtype)
    assert (reason or "`mergekit.yml` reproduces the deletion alone") in written


@pytest.mark.parametrize(("family", "layers"), [("gemma2", "1,3"), ("gemma2", "1"), ("smollm3", "2"), ("gpt2", "1,3")])
def test_card_and_page_say_what_mergekit_and_llama_cpp_would_make_of_it(no_child, family, layers, tmp_path, text):
    """Gemma 2 alternates, so without layers 1 and 3 of five all that are left slide, and the new layer 1 would not."""
    model = tiny.save(tmp_path / "model", family)
    run = pruned(tmp_path / "runs", model, text, method="manual", layers=layers, stage2_steps=0)
    folder = exported(run, tmp_path / "out")
    written, remarks = (folder / "README.md").read_text(), checkpoint.remarks(run, "float32")
    assert all(remark in written for remark in remarks)
    assert (folder / "mergekit.yml").exists() == (family == "gpt2")
    assert [("mergekit.yml" in remark, "GGUF" in remark) for remark in remarks] == (
        [] if family == "gpt2" else [(True, False), (False, True)]
    )
    assert ("## To GGUF" in written) == (family != "gpt2")
    if layers == "1,3" and family == "gemma2":
        assert "1 would change: layer 1 from sliding attention to full attention" in remarks[1]


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        ({"stage2_steps": 0}, True),
        ({"stage2_steps": 1}, False),
        ({"stage2_steps": 0, "learn_weights": True}, False),
        ({"stage2_steps": 0, "method": "laco"}, False),
        ({"stage2_steps": 0, "method": "shortgpt"}, True),
    ],
)
def test_only_a_direct_deletion_gets_a_recipe(settings, direct, tmp_path):
    state = story.write(Store(tmp_path), "finished").state()
    assert model_card.is_direct(config.RunConfig(**settings), state) is direct


def test_the_script_repeats_the_run(deleted, tmp_path):
    """The Python that is offered, run as it is, writes the same figures."""
    done = subprocess.run(
        [sys.executable, "-c", model_card.script(deleted.config())],
        cwd=ROOT,
        env={**os.environ, "TRSP_RUNS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (again,) = Store(tmp_path).runs()
    assert again.config() == deleted.config()
    assert again.state().perplexity == deleted.state().perplexity


def test_the_shell_exports_and_reports_and_refuses_an_unknown_run(no_child, deleted, tmp_path, capsys):
    assert main.main(["export", str(deleted.folder), "--out", str(tmp_path / "out")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main.main(["export", str(deleted.folder), "--out", str(tmp_path / "o.zip"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fraction"] == 1.0
    for command, file in (("report", "r.html"), ("curves", "c.csv")):
        assert main.main([command, str(deleted.folder), "--out", str(tmp_path / file)]) == 0
        assert main.main([command, "no-such-run", "--out", str(tmp_path / "x")]) == 2
        assert main.main([command, str(deleted.folder), "--out", str(tmp_path / "nowhere" / file)]) == 2
    assert not (tmp_path / "x").exists()


# -- the report and the curves


def test_a_report_is_one_file_that_asks_for_nothing(tmp_path):
    run = story.write(Store(tmp_path), "finished")
    written = html_report.html(run)
    assert written.count("<svg") == 6
    assert written.count('role="img" aria-label=') >= 6
    assert "<script" not in written
    assert not re.search(r"(?:src|href)=[\"'](?!#)", written)
    assert set(re.findall(r"https?://[^\s\"'<]+", written)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "&lt;b&gt;long&lt;/b&gt;" in written
    assert "<b>long" not in written
    assert "90.0 [90.0, 90.0]" in written
    assert "8 blocks of 256 tokens" in written
    assert run.config().as_command() in written
    assert "lambda_2_schedule" in written


@pytest.mark.parametrize("status", ["queued", "failed", "cancelled", "lost"])
def test_there_is_a_report_of_any_run(status, tmp_path):
    written = html_report.html(story.write(Store(tmp_path), status))
    assert f", {formatting.status(status)}." in written
    assert ("[384]" in written) == (status == "failed")


def test_curves_are_a_row_a_point(tmp_path):
    import pandas as pd

    run = story.write(Store(tmp_path), "finished")
    state = run.state()
    (tmp_path / "curves.csv").write_text(curves_csv.table(run.config(), state))
    table = pd.read_csv(tmp_path / "curves.csv")
    assert tuple(table.columns) == curves_csv.HEAD
    weights = table[table.curve == "layer weight"]
    assert len(weights) == len(state.weight_steps) * story.L
    assert weights.iloc[-1].value == state.weight_steps[-1].weights[-1]
    probes = table[table.curve == "perplexity if deleted now, first 2 blocks"]
    assert probes.value.tolist() == [p.perplexity for p in state.probes]
    assert set(table.value_unit) == {"1", "nats per token"}


def test_the_curve_of_lambda_2_ends_where_it_stops_acting():
    """Of 40 steps that tell it as if it went on: a gate is shut from step 10 on."""
    state = Run(replay.FOLDER).state()
    state.gap_steps = [dataclasses.replace(step, lambda_2=10 * step.step / 40) for step in state.gap_steps]
    text = io.StringIO(curves_csv.table(validate.from_values({"stage2_steps": 40}, "two-stage"), state))
    told = [float(row["value"]) for row in csv.DictReader(text) if row["curve"] == "lambda_2"]
    assert told == pytest.approx([10 * n / 40 for n in range(1, 10)] + [0.0] * 31)


# -- the hub


@contextlib.contextmanager
def hub_server(refuse: int = 0) -> Iterator[tuple[str, list]]:
    """A hub that takes a repository and a commit, or refuses all; its address and what it was asked."""
    heard: list = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heard.append((self.path, self.headers.get("Authorization"), body))
            place = f"http://127.0.0.1:{server.server_port}/owner/name"
            answer: dict = {"url": place, "name": "owner/name", "id": "owner/name"}
            if "preupload" in self.path:
                wanted = json.loads(body)["files"]
                answer = {
                    "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
                }
            elif "commit" in self.path:
                answer = {"commitUrl": f"{place}/commit/1", "commitOid": "1" * 40, "success": True}
            self._answer(answer)

        def do_GET(self):
            heard.append((self.path, self.headers.get("Authorization"), b""))
            self._answer({"id": "owner/name", "sha": "1" * 40, "siblings": [], "private": True})

        def _answer(self, values: dict) -> None:
            data = json.dumps({"error": "refused"} if refuse else values).encode()
            self.send_response(refuse or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()


def push_by_shell(run: Run, out: Path, endpoint: str, token: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "hf"), "TRSP_RUNS": str(out.parent)}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, "-m", "trsp_core", "export", str(run.folder), "--out", str(out), "--push", "owner/name"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_an_export_is_pushed_with_the_users_own_token_which_stays_nowhere(deleted, tmp_path):
    with hub_server() as (endpoint, heard):
        done = push_by_shell(deleted, tmp_path / "out", endpoint, TOKEN)
    assert done.returncode == 0, done.stderr
    made = json.loads(next(body for path, _, body in heard if "repos/create" in path))
    assert made["visibility"] == "private"
    assert {auth for path, auth, _ in heard if "create" in path or "/commit/" in path} == {f"Bearer {TOKEN}"}
    commit = next(body for path, _, body in heard if "/commit/" in path).decode()
    sent = [json.loads(line) for line in commit.splitlines()]
    names = {line["value"]["path"] for line in sent if line["key"] == "file"}
    assert {"README.md", "config.json", "model.safetensors", "proof.json"} <= names
    front = next(line["value"] for line in sent if line["key"] == "file" and line["value"]["path"] == "README.md")
    assert base64.b64decode(front["content"]).decode().startswith("---\nlibrary_name: transformers\n")
    assert TOKEN not in done.stdout + done.stderr
    for file in [*tmp_path.rglob("*"), *deleted.folder.rglob("*")]:
        told = file.is_file() and TOKEN.encode() in file.read_bytes()
        assert not told, file


@pytest.mark.parametrize(
    ("code", "said"),
    [(401, "does not accept this token"), (403, "may not write to owner/name"), (404, "no place"), (500, "code 500")],
)
def test_what_the_hub_refuses_is_said_and_the_export_stays(code, said, no_child, deleted, tmp_path, monkeypatch):
    with hub_server(refuse=code) as (endpoint, _), pytest.raises(TrspError, match=said) as refused:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        list(checkpoint.export(deleted, tmp_path / "out", push="owner/name", token=TOKEN))
    assert TOKEN not in str(refused.value)
    assert refused.value.remedy
    assert (tmp_path / "out" / "proof.json").is_file()


def test_no_token_no_network_and_no_name_are_said_at_once(deleted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main.main(["export", str(deleted.folder), "--out", str(tmp_path / "out"), "--push", "owner/name"]) == 2
    assert "no token" in capsys.readouterr().err
    with pytest.raises(TrspError, match="no name of a repository"):
        next(checkpoint.export(deleted, tmp_path / "out", push="name alone", token=TOKEN))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrspError, match="could not be uploaded"):
        hub_upload.push(tmp_path, "owner/name", TOKEN)


def test_a_child_gets_the_token_by_no_list_of_processes_and_no_environment(deleted, tmp_path, monkeypatch):
    with hub_server() as (endpoint, heard):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        steps = subprocesses.run(
            "trsp_core.export.checkpoint", **asked(deleted, tmp_path / "out.zip", push="owner/name", token=TOKEN)
        )
        next(steps)
        (child,) = [c for c in psutil.Process().children() if "trsp_core.export.checkpoint" in c.cmdline()]
        assert TOKEN not in " ".join(child.cmdline()) + " ".join(child.environ().values())
        assert list(steps)[-1].fraction == 1
    assert {auth for path, auth, _ in heard if "create" in path or "/commit/" in path} == {f"Bearer {TOKEN}"}


# -- downloads


def get(app: Starlette, path: str) -> tuple[int, dict[str, str], int, int]:
    """Status, headers, bytes of the body and of its largest piece; the body is thrown away as it comes."""
    seen, head = [0, 0], {}

    async def receive():  # the visitor stays
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.start":
            head.update(status=message["status"], headers={k.decode(): v.decode() for k, v in message["headers"]})
        else:
            seen[0] += len(message.get("body", b""))
            seen[1] = max(seen[1], len(message.get("body", b"")))

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": ""}
    scope |= {"scheme": "http", "query_string": b"", "headers": [], "http_version": "1.1"}
    thread = threading.Thread(target=lambda: asyncio.run(app(scope, receive, send)))  # playwright leaves a loop in ours
    thread.start()
    thread.join()
    return head["status"], head["headers"], *seen


@pytest.fixture
def download(tmp_path, monkeypatch) -> tuple[Run, Starlette]:
    monkeypatch.setenv("TRSP_RUNS", str(tmp_path))
    run = story.write(Store(tmp_path), "finished")
    run.exports_folder.mkdir()
    return run, Starlette(routes=file_routes.routes())


def test_a_download_streams_from_disk(download):
    """300 MB pass in small pieces, and the process does not grow by a twentieth of that."""
    run, app = download
    with (run.exports_folder / "large.zip").open("wb") as file:
        file.truncate(300_000_000)
    get(app, f"/{file_routes.link(run, 'large.zip')}")
    process = psutil.Process()
    before = process.memory_info().rss
    status, headers, size, largest = get(app, f"/{file_routes.link(run, 'large.zip')}")
    assert (status, size) == (200, 300_000_000)
    assert headers["content-length"] == "300000000"
    assert headers["content-disposition"].startswith("attachment")
    assert headers["x-content-type-options"] == "nosniff"
    assert largest <= 1_000_000
    assert process.memory_info().rss - before < 15_000_000


@pytest.mark.parametrize(
    "name", ["../config.json", "..%2Fconfig.json", "config.json", ".lock.zip", "nothing.zip", "link.csv"]
)
def test_nothing_but_exports_is_given_away(download, name):
    run, app = download
    (run.exports_folder / "config.json").write_text("{}")
    (run.exports_folder / "link.csv").symlink_to(run.folder / "config.json")
    assert get(app, f"/files/{run.id}/{name}")[0] == 404
    assert get(app, f"/files/no-such-run/{name}")[0] == 404


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """A run of the default model."""
    values = {"method": "manual", "layers": "13-18,25,26", "stage2_steps": 0, "measure_blocks": 2, "kl_blocks": 1}
    values |= {"probe_blocks": 1, "importance_blocks": 0, "speed_repeats": 0, "sample_tokens": 4}
    run = Store(tmp_path_factory.mktemp("default")).create(validate.from_values(values))
    assert recorder.record(run, engine.execute(run.config(), run.folder)).ended == "finished"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_the_default_model_is_exported_with_proof(dtype, default_run, tmp_path):
    folder = exported(default_run, tmp_path / "out", dtype=dtype)
    found = json.loads((folder / "proof.json").read_text())
    if dtype:
        assert 0 < found["largest_difference"] < 1.5
        assert found["kl"] < 0.01
    else:
        assert found["largest_difference"] == 0
        assert found["same_text"]
    written = (folder / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in written
    assert "license: apache-2.0\n" in written
    assert "layer_range: [19, 25]" in (folder / "mergekit.yml").read_text()
