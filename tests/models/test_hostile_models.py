"""Models from strangers: what a folder may claim, name or bring along, each refused by name and in bounded time."""

from __future__ import annotations

import json
import shutil
import time

import psutil
import pytest

from tests import tiny
from tests.models.test_models import folder, refusal, weights  # noqa: F401 - `folder` is a fixture
from trsp_core.errors import TrspError
from trsp_core.models import loading
from trsp_core.schema.messages import Variant
from trsp_core.workbench import chat_template, side_by_side
from trsp_core.workbench.model_cache import ModelCache

ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of a model that loads, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def reconfigure(model, **changes) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -5},
        {"hidden_size": -32},
        {"intermediate_size": -48},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": -2},
        {"max_position_embeddings": 10**30},
        {"head_dim": -8},
    ],
)
def test_sizes_that_nothing_has_are_refused_before_anything_is_built(model, changes):
    reconfigure(model, **changes)
    told = refusal(model).message
    assert next(iter(changes)) in told or "number of layers" in told or "width" in told


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 2**39},
        {"vocab_size": 20_000_000, "hidden_size": 1_000_000},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_act": "no such thing"},
        {"hidden_act": 5},
        {"rope_parameters": "yes"},
        {"layer_types": ["unheard"] * 5},
        {"model_type": "no_such_family"},
        {"torch_dtype": "object", "dtype": "object"},
        {"eos_token_id": "x"},
        {"tie_word_embeddings": "maybe"},
    ],
)
def test_a_config_that_lies_about_its_weights_is_a_refusal_and_takes_no_memory(model, changes):
    reconfigure(model, **changes)
    before = psutil.Process().memory_info().rss
    with pytest.raises(TrspError) as caught:
        loading.load(str(model))
    assert caught.value.remedy
    assert psutil.Process().memory_info().rss - before < 200e6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 33}, "The config of"),
        ({"num_attention_heads": 3}, "The config of"),
        ({"model_type": ["llama"]}, "The config of"),
        ({"model_type": "surprise"}, "The config of"),
        ({"dtype": "surprise"}, "The config of"),
        ({"auto_map": None}, "The config of"),
        ({"num_key_value_heads": 7}, "of its weights have another shape than config.json says"),
        ({"num_key_value_heads": None}, "of its weights have another shape than config.json says"),
    ],
)
def test_what_is_wrong_with_a_config_is_not_blamed_on_the_tokenizer(model, changes, words):
    reconfigure(model, **changes)
    with pytest.raises(TrspError) as raised:
        loading.load(str(model))
    assert words in raised.value.message
    assert "config.json" in raised.value.remedy
    assert "okenizer" not in str(raised.value)


@pytest.mark.parametrize("content", ['{"cache_implementation": "surprise"}', "[1]", "null", '"x"', "{"])
def test_generation_settings_that_cannot_be_read_are_refused_by_name(model, content):
    (model / "generation_config.json").write_text(content)
    with pytest.raises(TrspError, match=r"generation_config\.json of") as raised:
        loading.load(str(model))
    assert "take it away" in raised.value.remedy


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "anything.txt"])
def test_no_file_of_a_model_may_be_a_link_out_of_its_folder(model, tmp_path, file):
    (tmp_path / "secret").write_text("{}")
    (model / file).unlink(missing_ok=True)
    (model / file).symlink_to(tmp_path / "secret")
    assert "link out of" in refusal(model).message


def test_an_adapter_that_names_another_model_is_refused(model):
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/anywhere"}))
    assert "adapter" in refusal(model).message


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("an end before its start", {"dtype": "F32", "shape": [10, 4], "data_offsets": [160, 0]}),
        ("a start below nothing", {"dtype": "F32", "shape": [10, 4], "data_offsets": [-160, 160]}),
        ("more numbers than bytes", {"dtype": "F32", "shape": [10**9, 4], "data_offsets": [0, 160]}),
        ("an unknown format that is huge", {"dtype": "Q9", "shape": [10**12], "data_offsets": [0, 160]}),
        ("an end beyond the file", {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 10**12]}),
        ("shapes that are no numbers", {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 160]}),
    ],
)
def test_a_header_that_lies_is_refused(folder, name, entry):  # noqa: F811
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"model.embed_tokens.weight": entry}
    written = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    assert "model.safetensors" in refusal(folder).message, name


def test_damage_that_the_headers_do_not_show_is_a_refusal(model):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(TrspError, match="tokenizer"):
        loading.load(str(model))


HOSTILE = {
    "it never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "it fills the memory": "{% set x = 'x' * 100000000000 %}{{ x }}",
    "it doubles": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "it reckons for ever": "{{ 9 ** (9 ** 9) }}",
    "it writes a lot": "{% for a in range(99999) %}Too much text. {% endfor %}",
    "it calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "it nests": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "it reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "it does not parse": "{% for %}",
    "it complains": "{{ raise_exception('never') }}",
    "it is long": "x" * (chat_template.LONGEST + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_is_refused_in_bounded_time_and_memory(name, monkeypatch):
    tokenizer = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    tokenizer.chat_template = HOSTILE[name]
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    began, before, others = time.monotonic(), psutil.Process().memory_info().rss, psutil.Process().children()
    with pytest.raises(TrspError, match="chat template"):
        chat_template.render(tokenizer, ASK)
    assert time.monotonic() - began < 2 * chat_template.SECONDS + 5
    assert psutil.Process().memory_info().rss - before < 100e6
    assert psutil.Process().children() == others


def test_a_template_in_bounds_gives_the_tokens_that_transformers_gives(model):
    (model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    held = ModelCache().take(Variant(str(model)))
    ids, chat = side_by_side.encode(held, "The river 'crosses' the città", True)
    said = [{"role": "user", "content": "The river 'crosses' the città"}]
    theirs = held.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True).input_ids
    assert chat
    assert ids.tolist() == [theirs]
