"""How texts begin: blocks, questions and prompts begin as the tokenizer begins a text, and none is closed before its
end. A fault here moves every figure and says nothing."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests import tiny
from trsp_core.data import blocks as data
from trsp_core.data import special_tokens
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation, multiple_choice
from trsp_core.pruning.validate import from_values
from trsp_core.schema import messages as an
from trsp_core.workbench import model_cache, side_by_side

BOS, EOS = 1, 2
TEMPLATES = {"<s> $A </s>": ([1], [2]), "<s> $A": ([1], []), "$A </s>": ([], [2]), "$A": ([], []),
             "<s> <s> $A </s>": ([1, 1], [2])}  # fmt: skip
SMALL = {"block_length": 16, "measure_length": 24, "measure_blocks": 4, "calibration_blocks": 10, "probe_blocks": 2}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, with this around each text."""
    core = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=TEMPLATES)
def template(request) -> str:
    return request.param


def test_what_stands_around_a_text_is_found(template):
    assert special_tokens.around(special_tokens.encoder(tokenizer(template))) == TEMPLATES[template]


def test_every_block_begins_as_a_text_does_and_holds_no_end_of_one(template, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(tiny.text(600).replace("year 1000", "year </s> 1000 <s>"))
    made = data.prepare(from_values({**SMALL, "text": str(file), "heldout": str(file)}), tokenizer(template))
    before, _ = TEMPLATES[template]
    for blocks in (made.calibration, *made.measure.values()):
        assert blocks[:, : len(before)].tolist() == [before] * len(blocks)
        assert not set(blocks[:, len(before) :].flatten().tolist()) & {BOS, EOS}


def test_the_check_without_a_model_refuses_what_the_run_would(template, tmp_path):
    file, outcomes = tmp_path / "mine.txt", set()
    tokenizer(template).save_pretrained(tmp_path)
    config = from_values({**SMALL, "text": str(file), "heldout": "news"})
    for words in range(8, 40, 3):
        file.write_text(" ".join(tiny.text(40).split()[:words]))
        told = [refusal(lambda: data.check(config, tmp_path / "tokenizer.json")),
                refusal(lambda: data.prepare(config, tokenizer(template)))]  # fmt: skip
        assert (told[0] is None) == (told[1] is None), (words, told)
        outcomes.add(told[0] is None)
    assert outcomes == {True, False}


def refusal(work) -> str | None:
    try:
        work()
    except TrspError as error:
        return error.message
    return None


def test_no_prompt_is_closed_before_it_goes_on(template):
    model, beside = tiny.build(), tokenizer(template)
    before, _ = TEMPLATES[template]
    text = "The river crosses"
    wanted = before + beside(text, add_special_tokens=False).input_ids
    assert special_tokens.begun(beside, text) == wanted
    taken = model_cache.Model("tiny", stack_of(model), beside, 0, 0, 0.0)
    assert side_by_side.encode(taken, text, chat=False)[0].tolist() == [wanted]
    after = list(generation.tokens(model, torch.tensor([wanted]), 5))
    assert generation.continuation(model, beside, text, 5)[1] == beside.decode(after, skip_special_tokens=True)
    ids, count = multiple_choice.encode(beside, text, " the city")
    assert ids == before + beside(text + " the city", add_special_tokens=False).input_ids
    assert count == len(ids) - len(wanted)


def stack_of(model):
    from trsp_core.surgery import discovery

    return discovery.find(model)


def test_a_tokenizer_that_knows_no_letter_of_ours_is_refused_where_it_matters():
    core = Tokenizer(models.WordLevel({"δ": 0, "<s>": 1, "</s>": 2}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    assert special_tokens.around(lambda text, around: [1, 5, 2] if around else [5]) == ([1], [2])
    assert special_tokens.around(lambda text, around: []) == ([], [])
    with pytest.raises(TrspError, match="begins a text"):
        special_tokens.around(lambda text, around: [1, 6, 2] if around else [5])


def test_blocks_without_room_behind_what_begins_them_are_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(tiny.text(600))
    config = from_values({**SMALL, "text": str(file), "heldout": str(file)})
    with pytest.raises(TrspError, match="have no room"):
        data.prepare(config, tokenizer(" ".join(["<s>"] * 30) + " $A"))


def test_a_request_names_no_half_of_a_letter():
    with pytest.raises(TrspError, match="Half of a letter"):
        an.check(an.WhatIf("smollm2-135m", [1], prompt="\ud800"))
