"""What a run does by itself never asks for more than the model's context, and says where that is less than usual."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation, measurements, verification
from trsp_core.pruning import engine, validate
from trsp_core.schema import events
from trsp_core.schema import messages as an
from trsp_core.schema.config import RunConfig
from trsp_core.surgery import discovery, families
from trsp_core.workbench import model_cache, side_by_side, what_if

LENGTH = 16
NAMES = {"gpt2": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
ENDLESS = ("bloom", "mamba")
SMALL = {
    "method": "manual",
    "layers": "1,3",
    "measure_blocks": 2,
    "calibration_blocks": 2,
    "probe_blocks": 1,
    "stage2_steps": 0,
    "importance_blocks": 1,
    "speed_repeats": 1,
    "kl_blocks": 1,
    "threads": 1,
}


def short(family: str, context: int) -> torch.nn.Module:
    fields = {} if family in ENDLESS else {NAMES.get(family, "max_position_embeddings"): context}
    return tiny.build(family, **fields)


def run(model, text, length, kept, **settings) -> tuple[list[events.Event], int]:
    """The events of a whole run, and the most tokens that the model was asked to read at once or with its cache; what
    it says on the text of the proof goes to the file `kept`."""
    asked = [0]

    def listen(module, args, kwargs):
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        before = cache.get_seq_length() if cache is not None and module.config.model_type != "mamba" else 0
        asked[0] = max(asked[0], ids.shape[1] + before)

    values = {**SMALL, "model": "tiny", "block_length": length, "measure_length": length, **settings}
    config = validate.from_values({**values, "text": text, "heldout": text})
    hook = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        told = list(engine.execute(config, None, (model, tiny.tokenizer())))
        verification.keep(model, tiny.tokenizer(), kept)
    finally:
        hook.remove()
    assert isinstance(told[-1], events.RunFinished)
    return told, asked[0]


@given(st.none() | st.integers(2, 4096), st.integers(1, 600), st.integers(1, 600))
def test_reading_and_writing_fit_and_give_way_only_where_they_must(context, read, written):
    fits = generation.fitted(context, read, written)
    assert all(1 <= got <= wanted for got, wanted in zip(fits, (read, written), strict=True))
    if context is None or read + written <= context:
        assert fits == (read, written)
    else:
        assert sum(fits) == context or fits == (read, context - read) or sum(fits) == 2 * (context // 2)
        assert sum(fits) <= context


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_context_of_one_block_is_enough_in_every_family(family, text, tmp_path):
    told, asked = run(short(family, LENGTH), text, LENGTH, tmp_path / "proof", sample_tokens=24)
    assert (tmp_path / "proof").is_file()
    (speed,) = {(e.prompt_tokens, e.new_tokens) for e in told if isinstance(e, events.SpeedMeasured)}
    notes = [e.message for e in told if isinstance(e, events.Noted)]
    if family in ENDLESS:
        assert speed == (2 * LENGTH, 16)
        assert not any("at most" in note for note in notes)
    else:
        assert asked <= LENGTH
        assert speed == (8, 8)
        assert f"This model reads {LENGTH} tokens at most" in " ".join(notes)


@pytest.mark.parametrize("context", [8, 9, 17, 40, 64, 143, 144, 200])
def test_no_context_is_asked_for_more_than_it_holds(context, text, tmp_path):
    told, asked = run(short("gpt2", context), text, 8, tmp_path / "proof", measure_blocks=20, sample_tokens=50)
    speed = next(e for e in told if isinstance(e, events.SpeedMeasured))
    assert speed.prompt_tokens + speed.new_tokens <= context
    assert asked <= context
    if context >= 144:
        assert (speed.prompt_tokens, speed.new_tokens) == (measurements.SPEED_PROMPT, measurements.SPEED_NEW)
    samples = {e.prompt for e in told if isinstance(e, events.TextGenerated)}
    assert len(samples) == 1
    whole, tokenizer = RunConfig().prompt, tiny.tokenizer()
    sample, cut = samples.pop(), tokenizer.decode(tokenizer(whole).input_ids)
    assert sample == whole or cut.endswith(sample), "a prompt that does not fit loses its beginning"


def test_a_text_in_a_short_context_is_the_models_own():
    """Cut to what fits, it is what the same weights write in a longer context."""
    model, tokenizer = tiny.build("gpt2"), tiny.tokenizer()
    prompt = "The river crosses the garden in year 1000. The city keeps"
    count = len(tokenizer(prompt).input_ids)
    whole, free = generation.continuation(model, tokenizer, prompt, 10)
    assert whole == prompt
    _, cut = generation.continuation(model, tokenizer, prompt, 10, count + 4)
    assert cut
    assert free.startswith(cut)
    seen, _ = generation.continuation(model, tokenizer, prompt, 10, 12)
    assert prompt.endswith(seen)
    assert len(tokenizer(seen).input_ids) == 6


def test_a_fresh_process_proves_a_model_of_a_short_context(tmp_path):
    model = short("gpt2", LENGTH)
    verification.keep(model, tiny.tokenizer(), tmp_path / "proof")
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    found = verification.check(tmp_path / "model", tmp_path / "proof")
    assert found.problems == []
    assert (found.tokens, found.new_tokens) == (8, 8)
    assert "logits on 8 tokens" in found.sentence
    assert "8 tokens written greedily" in found.sentence


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_config_names_the_context(family):
    model = short(family, 40)
    found = discovery.find(model).context
    assert found == (None if family in ENDLESS else 40)
    assert families.context(model.config.to_dict()) == found, "and so does its file"


@pytest.mark.parametrize("value", [0, -3, True, "64", 2.5, None, [64]])
def test_what_is_no_number_of_tokens_names_no_context(value):
    assert families.context({"max_position_embeddings": value}) is None


def test_a_what_if_reads_no_more_than_the_context(text, tmp_path):
    model = short("gpt2", 20)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    taken = model_cache.ModelCache(device="cpu").take(an.Variant(str(tmp_path)))
    asked = an.WhatIf(str(tmp_path), [1], text=text, heldout=text, prompt=RunConfig().prompt, sample_tokens=24)
    study = what_if.study_of(asked, taken)
    (measured,) = [a for a in study.measure([1]) if isinstance(a, an.SetMeasured)]
    assert measured.tokens == 19
    assert [a for a in study.sample([1], asked.prompt, asked.sample_tokens) if isinstance(a, an.TokenGenerated)]
    with pytest.raises(TrspError, match="reads 20"):
        side_by_side.refuse_length(taken, 21)
