"""Texts in other encodings than UTF-8: read where the evidence is good, else refused by name; by path and by upload."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.ui.app_state import uploads
from pages.ui.tour import lessons
from tests import tiny
from trsp_core.data import blocks, corpora, encodings
from trsp_core.errors import TrspError
from trsp_core.evaluation import questions
from trsp_core.experiments import grids, plans
from trsp_core.pruning.validate import from_values

GERMAN = "Die Größe der Städte wächst. Über die Brücke fährt täglich ein Zug, der müde Gäste führt.\n\n"
RUSSIAN = "Вчера вечером пришёл мой друг и сказал, что город очень красивый.\n\n"
JAPANESE = "昨日の夜、友達が来て、町はとても美しいと言いました。\n\n"
WESTERN = {
    "German": GERMAN,
    "French": "Le garçon était fatigué après l’école. Où est la forêt, demanda-t-il à sa mère, près de la fenêtre.\n",
    "Spanish": "El niño comió mañana en la montaña. ¿Dónde está la canción que él cantó después?\n",
    "Portuguese": "A situação não melhorou, mas as crianças estão na praça com o irmão.\n",
    "Icelandic": "Það er ekki hægt að segja að veðrið sé gott í dag. Við förum í ferðalag á morgun með börnin.\n",
    "English": "The visitor’s “naïve” question — as he’d put it — was about a café. It’s the same, wasn’t it?\n",
    "a guest": GERMAN * 40 + "Señor Núñez aus São Paulo traf Zoë im Café.\n",
}
OTHERS = {  # each of them is bytes of cp1252 too
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy. Včera večer přišel můj přítel, který říkal, že je krásné.\n",
    "iso8859-2": "Az őszi időben a gyűjtő öreg könyvekkel tért vissza, és azt mondta, hogy a város gyönyörű.\n",
    "cp1254": "Dün akşam arkadaşım geldi ve şehrin çok güzel olduğunu söyledi. Yağmur yağdığı için oturduk.\n",
    "cp1257": "Vakar vakare atėjo mano draugas ir pasakė, kad miestas labai gražus. Šiąnakt žmonės vaikščiojo.\n",
    "cp1251": RUSSIAN,
    "koi8-r": RUSSIAN,
    "cp1253": "Χθες το βράδυ ήρθε ο φίλος μου και είπε ότι η πόλη είναι πολύ όμορφη.\n",
    "shift_jis": JAPANESE,
    "euc_jp": JAPANESE,
    "gb18030": "昨天晚上我的朋友来了，他说这个城市非常美丽。\n",
    "mac_roman": GERMAN,
    "cp850": GERMAN,
    "iso8859-15": "Le cœur de sa sœur était en fête, mais l'œuvre coûtait 5 €. Voilà, dit-elle.\n",
}
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32", *WIDE])
@pytest.mark.parametrize("text", [GERMAN, RUSSIAN, JAPANESE, "Plain English, and no more.\r\n"])
def test_unicode_is_read_in_every_form(codec, text):
    found, note = encodings.decode((text * 5).encode(codec), "mine.txt")
    assert found == text * 5
    assert ("UTF-16" in note or "UTF-32" in note) == (codec[:5] != "utf-8")


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_a_mark_tells_the_order_of_bytes(codec):
    mark = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}[codec]
    assert encodings.decode(mark + "né".encode(codec), "a.txt")[0] == "né"


@pytest.mark.parametrize("name", WESTERN)
def test_cp1252_is_read_where_its_letters_are_of_one_language(name):
    found, note = encodings.decode((WESTERN[name] * 3).encode("cp1252"), "mine.txt")
    assert found == WESTERN[name] * 3
    assert "cp1252" in note


@pytest.mark.parametrize("codec", OTHERS)
def test_other_encodings_are_refused_and_never_taken_for_cp1252(codec):
    with pytest.raises(TrspError, match=r"not UTF-8: byte \d+ cannot be read; it may be \w") as caught:
        encodings.decode((OTHERS[codec] * 6).encode(codec), "mine.txt")
    assert "UTF-8" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Ein Satz mit Größe.".encode("cp1252"), "not UTF-8: byte 15"),  # too little to go by
        (("The river " * 300).encode() + b"\xe9" + GERMAN.encode() * 50, "not UTF-8: byte 3,000"),  # one broken byte
        (GERMAN.encode() * 9 + b"\0" * 40 + GERMAN.encode(), "is NUL"),  # a hole
        (b"one line\n\0another line\n\0" * 40, "is NUL"),  # records that NUL divides
        (bytes(range(256)) * 40, "not UTF-8"),
        (GERMAN.encode("utf-16")[:-1], "it begins as UTF-16"),
        ("\0".join(GERMAN).encode("utf-16"), "NUL stands between"),
        ((JAPANESE * 9).encode("iso2022_jp"), "ISO-2022"),
    ],
)
def test_what_is_not_sure_is_refused(content, said):
    with pytest.raises(TrspError, match=said) as caught:
        encodings.decode(content, "mine.txt")
    assert caught.value.remedy


def test_nul_at_the_ends_and_more_marks_are_left_out_and_told():
    assert encodings.decode(b"\0\0A river.\0\0\0", "a.txt") == (
        "A river.",
        "5 NUL characters at an end of a.txt were left out.",
    )
    for codec in ("utf-8", "utf-16-le", "utf-16-be"):
        found, note = encodings.decode(("\ufeff\ufeffA river\n\ufeffA city").encode(codec), "a.txt")
        assert found == "A river\nA city"
        assert "2 byte-order marks" in note
    assert encodings.decode("\ufeffA river".encode(), "a.txt") == ("A river", "")


@given(st.binary(max_size=200) | st.text().map(lambda t: t.encode("utf-16", "surrogatepass")))
def test_any_bytes_are_a_text_without_nul_or_a_refusal(content):
    try:
        found, _ = encodings.decode(content, "a.txt")
    except TrspError:
        return
    assert "\0" not in found
    assert "\ufeff" not in found
    found.encode()


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff\x1b")))
def test_utf_8_is_always_what_it_is(text):
    assert encodings.decode(text.encode(), "a.txt")[0] == text


@pytest.mark.parametrize("codec", ["utf-16-le", "cp1252"])
def test_a_run_says_how_a_text_was_read(tmp_path, codec):
    file = tmp_path / "mine.txt"
    file.write_bytes((GERMAN * 60).encode(codec))
    config = from_values({"text": str(file), "heldout": "news", "block_length": 16, "measure_length": 16,
                          "measure_blocks": 2, "probe_blocks": 2, "calibration_blocks": 2})  # fmt: skip
    blocks.check(config)
    made = blocks.prepare(config, tiny.tokenizer())
    assert any(note.startswith("mine.txt was read as ") for note in made.notes)
    assert "Über die Brücke" in " ".join(corpora.read(str(file)).articles)


def test_an_upload_is_decoded_as_a_path_is(tmp_path):
    assert "UTF-16" in uploads.how_read((GERMAN * 3).encode("utf-16"), "a.txt")
    assert uploads.how_read(GERMAN.encode(), "a.txt") == ""
    with pytest.raises(TrspError, match="may be cp1251"):
        uploads.how_read((RUSSIAN * 6).encode("cp1251"), "a.txt")
    kept = uploads.keep((GERMAN * 3).encode("utf-16"), "a.txt", tmp_path)
    assert set("".join(corpora.read(str(kept)).articles)) <= set(GERMAN)


def test_a_line_of_jsonl_holds_a_text_or_content_or_messages(tmp_path):
    said = [{"role": "user", "content": "A river?"}, {"role": "assistant", "content": None},
            {"role": "assistant", "content": [{"type": "text", "text": "A city."}, {"type": "image"}]}]  # fmt: skip
    lines = [{"text": "one\u2028two"}, {"content": "three"}, {"text": None, "messages": said}]
    more = [{"text": str(n)} for n in range(corpora.FEW)]
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + "\r".join(json.dumps(line, ensure_ascii=False) for line in [*lines, *more]), "utf-8")
    assert corpora.read(str(file)).articles[:3] == ("one\u2028two", "three", "A river?\n\nA city.")
    for bad in ({}, {"messages": "x"}, {"messages": [3]}, {"messages": [{"role": "user"}]}, {"content": ["x"]}):
        file.write_text(json.dumps(bad))
        with pytest.raises(TrspError, match="line 1"):
            corpora.read(str(file))


def test_lines_are_cut_at_line_ends_alone():
    assert encodings.lines("a\r\nb\nc\rd\u2028e\u2029f\x85g\x0bh\x0ci") == [
        "a",
        "b",
        "c",
        "d\u2028e\u2029f\x85g\x0bh\x0ci",
    ]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_questions_may_hold_any_separator_of_lines_in_a_string(tmp_path, codec, end):
    lines = [
        json.dumps({"query": f"A{c}river {n}?", "choices": [f"a{c}b", "c"], "gold": 0}, ensure_ascii=False)
        for n, c in enumerate("\u2028\u2029\x85")
    ]
    file = tmp_path / "asked.jsonl"
    file.write_bytes((end.join(lines) + end).encode(codec))
    asked = questions.read(str(file), "news")
    assert [q.contexts[0] for q in asked] == [f"A{c}river {n}?" for n, c in enumerate("\u2028\u2029\x85")]
    assert len(questions.read(str(file), "news", 2)) == 2


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_plans_grids_and_lessons_may_begin_with_a_mark(tmp_path, codec):
    title = "One\u2028two\x85three"
    plan = {"name": "mine", "title": title, "variations": [{"name": "x", "title": title}]}
    grid = {"name": "mine", "title": title, "axes": {"seed": [0, 1]}}
    file = tmp_path / "a.json"
    file.write_bytes(json.dumps(plan, ensure_ascii=False).encode(codec))
    assert plans.read(str(file)).title == title
    file.write_bytes(json.dumps(grid, ensure_ascii=False).encode(codec))
    assert grids.read(str(file)).plan.title == title
    if codec != "utf-16":
        lesson = next(iter(lessons.shipped().values()))
        assert lessons.load(lessons.to_json(lesson).encode(codec)) == lesson
