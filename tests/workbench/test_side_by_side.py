"""Columns: tokens are those of `generation`, seeds repeat, letters of several bytes come whole, texts are read."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from trsp_core.errors import TrspError
from trsp_core.evaluation import generation
from trsp_core.schema import messages as an
from trsp_core.schema.messages import Generate, Variant
from trsp_core.surgery import removal
from trsp_core.workbench import model_cache, side_by_side, transcript

PROMPT = "The river crosses"


@pytest.fixture(params=["llama", "gemma3_text", "gpt2", "opt"])
def folder(request, tmp_path):
    return str(tiny.save(tmp_path / "model", request.param))


@pytest.fixture
def llama(tmp_path):
    return str(tiny.save(tmp_path / "model"))


def tokens(found, column=0):
    return [a.token for a in found if isinstance(a, an.TokenGenerated) and a.column == column]


def answers(request, held=None):
    return [a for a in side_by_side.stream(request, held or model_cache.ModelCache()) if a]


def test_greedy_columns_equal_generate(folder):
    held = model_cache.ModelCache()
    variants = [Variant(folder), Variant(folder, [1, 3])]
    found = answers(Generate(variants, PROMPT, new_tokens=12, trace=False), held)
    whole = held.take(Variant(folder))
    ids, _ = side_by_side.encode(whole, PROMPT, False)
    for column, removed in enumerate([[], [1, 3]]):
        with removal.removed(whole.stack, removed), torch.inference_mode():
            want = whole.stack.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert tokens(found, column) == want


def test_a_view_shares_every_tensor_and_leaves_no_trace(folder):
    whole = model_cache.ModelCache().take(Variant(folder))
    before, count = whole.stack.text_config.num_hidden_layers, len(whole.stack.layers)
    thin = model_cache.without(whole, [0, 2])
    assert len(thin.stack.layers) == count - 2
    assert thin.stack.text_config.num_hidden_layers == count - 2
    own = {p.data_ptr() for p in whole.stack.model.parameters()}
    assert {p.data_ptr() for p in thin.stack.model.parameters()} < own
    assert (whole.stack.text_config.num_hidden_layers, len(whole.stack.layers)) == (before, count)
    with removal.removed(whole.stack, [0, 2]), torch.inference_mode():
        want = whole.stack.model(input_ids=tiny.ids()).logits
    with torch.inference_mode():
        assert torch.equal(thin.stack.model(input_ids=tiny.ids()).logits, want)


def test_a_pruned_model_shares_what_is_equal(llama, tmp_path):
    held = model_cache.ModelCache()
    whole, kept = held.take(Variant(llama)), [0, 2, 4]
    with removal.removed(whole.stack, [1, 3]) as model:
        model.save_pretrained(tmp_path / "pruned")
    tiny.tokenizer().save_pretrained(tmp_path / "pruned")
    with torch.inference_mode(), removal.removed(whole.stack, [1, 3]):
        want = whole.stack.model(input_ids=tiny.ids()).logits
    pruned = held.take(Variant(str(tmp_path / "pruned"), base=llama, kept=kept))
    assert pruned.shared == pruned.bytes
    with torch.inference_mode():
        assert torch.equal(pruned.stack.model(input_ids=tiny.ids()).logits, want)


def test_changed_tensors_are_not_shared(llama, tmp_path):
    held = model_cache.ModelCache()
    whole = held.take(Variant(llama))
    other = tiny.build()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    changed = held.take(Variant(str(tmp_path / "other"), base=llama, kept=list(range(tiny.L))))
    assert changed.bytes - changed.shared == other.model.layers[1].mlp.down_proj.weight.numel() * 4
    assert not torch.equal(whole.stack.layers[1].mlp.down_proj.weight, changed.stack.layers[1].mlp.down_proj.weight)


def test_the_cache_holds_few_models(tmp_path):
    held = model_cache.ModelCache(most=2)
    names = [str(tiny.save(tmp_path / f"m{i}")) for i in range(4)]
    for name in names:
        held.take(Variant(name))
    assert list(held.models) == names[2:]


def test_no_room_is_refused_with_numbers(llama, monkeypatch):
    monkeypatch.setattr("trsp_core.machine.available_memory", lambda: 10_000_000)
    with pytest.raises(TrspError, match=r"needs .* MB .* are free"):
        model_cache.ModelCache().take(Variant(llama))


def test_sampling_repeats_with_its_seed(llama):
    def drawn(seed):
        ask = Generate([an.Variant(llama)], PROMPT, temperature=1.0, top_p=0.9, seed=seed, new_tokens=16, trace=False)
        return tokens(answers(ask))

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_columns_take_turns(llama):
    variants = [Variant(llama), Variant(llama, [2])]
    found = answers(Generate(variants, PROMPT, new_tokens=6, trace=False))
    assert [a.column for a in found if isinstance(a, an.TokenGenerated)][:8] == [0, 1] * 4


def test_letters_of_several_tokens_come_whole():
    core = Tokenizer(models.BPE())  # no merges: each byte is a token
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    decoder, text = side_by_side.Decoder(PreTrainedTokenizerFast(tokenizer_object=core)), "The río — 北京 🙂 end"
    pieces = [decoder.add(i) for i in core.encode(text).ids]
    assert len(pieces) == len(text.encode())
    assert [p for p in pieces if p] == list(text)


def test_traces_are_the_models_probabilities(llama):
    held = model_cache.ModelCache()
    variants = [Variant(llama), Variant(llama, [1])]
    found = answers(Generate(variants, PROMPT, new_tokens=8), held)
    traces = [a for a in found if isinstance(a, an.TextTraced)]
    assert [(t.text, t.column) for t in traces] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first = traces[0]
    assert first.tokens == tokens(found)
    assert all(v == 0 for v in first.kl)
    assert all(max(a) == pytest.approx(p, rel=1e-3) for a, p in  # greedy: the token is the likeliest
               zip(first.alternative_probabilities, first.probabilities, strict=True))  # fmt: skip
    whole = held.take(Variant(llama))
    ids, _ = side_by_side.encode(whole, PROMPT, False)
    thin = model_cache.without(whole, [1])
    logs = [side_by_side.log_probabilities(m, ids, first.tokens).double() for m in (whole, thin)]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert traces[1].kl == pytest.approx(kl.tolist(), abs=1e-5)


def test_a_text_can_be_read_without_writing(llama):
    found = list(side_by_side.trace(an.Trace([an.Variant(llama)], PROMPT, " the city"), model_cache.ModelCache()))
    assert found[-1].column == 0
    assert "".join(found[-1].pieces) == " the city"


def test_words_said_before_are_counted_by_hand():
    assert transcript.repetition("one two three four") == 0
    assert transcript.repetition("") == transcript.repetition("12345678") == 0
    assert transcript.repetition("and and and and and") == 3 / 5  # the pair comes again from the third on
    assert transcript.repetition("Garden, garden! A garden?") == 2 / 4  # a long word, however it is written
    assert transcript.repetition("a man and a cat and a dog") == 1 / 8  # short words are used again: one pair
    text = "a blacksmith, the blacksmith, his blacksmith and that blacksmith or our blacksmith by one blacksmith"
    assert transcript.repetition(text) == 5 / 15
    assert transcript.repetition(text) >= transcript.REPEATS


def test_too_long_a_prompt_is_refused_before_it_is_read(llama):
    with pytest.raises(TrspError, match="reads 512"):
        answers(Generate([an.Variant(llama)], "The river " * 300, new_tokens=8))


def test_limits_are_named_all_at_once():
    with pytest.raises(TrspError) as caught:
        an.check(Generate([an.Variant("smollm2-135m")] * 4, " ", temperature=9.0, new_tokens=10**6))
    assert len(caught.value.problems) == 4


def test_every_record_survives_the_pipe():
    for record in (
        Generate([an.Variant("m", removed=[1])], "p\n\"q\"", chat=True),
        an.SetMeasured([1], 5, {"calibration": 1.5}, {"calibration": 1.0}, {}, 9, 1, 2, 1.25, 4, False, 0.1),
        an.TextTraced(0, 1, [3], ["é"], [0.5], [["a", "b"]], [[0.5, 0.1]], [0.2], 0.7),
        an.Broken("m", "r"),
    ):  # fmt: skip
        assert an.unpack(an.pack("t", record)) == ("t", record)
    for line in ("", "{}", '{"ticket": "t", "kind": "Nope"}', '{"ticket": "t", "kind": "Broken", "message": 3}'):
        with pytest.raises(TrspError):
            an.unpack(line)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [48, 50, 7])
@pytest.mark.parametrize("large", [0, 2**21])
def test_one_token_through_pieces_is_the_linear_map(monkeypatch, bias, outputs, large):
    """Also where the rows of the matrix cannot be dealt out, where more than one token is read, and on all cores."""
    monkeypatch.setattr(generation, "LARGE", large)
    cores = torch.get_num_threads()
    holder = torch.nn.Sequential(torch.nn.Linear(24, outputs, bias=bias))
    found = generation.single_token_maps(holder)
    assert len(found) == (outputs != 7)
    for forward in found.values():
        for shape in [(1, 1, 24), (1, 24), (24,), (2, 3, 24), (0, 24)]:
            x = torch.randn(shape)
            assert torch.allclose(forward(x), holder(x), rtol=1e-5, atol=1e-6), shape
    assert torch.get_num_threads() == cores


def test_a_model_is_what_it_was_between_tokens():
    """A reader may leave after any of them."""
    model = tiny.build()
    told = generation.tokens(model, tiny.ids(rows=1), 5)
    cores = torch.get_num_threads()
    next(told), next(told)
    assert generation.single_token_maps(model)
    assert torch.get_num_threads() == cores
    assert not any("forward" in vars(m) for m in model.modules())
