"""Decodes text files of unknown encoding, where the encoding is sure. Where it is not, the file is refused, with the
encoding that it may have: a text that is read in a wrong encoding is worse than none.

Sure are UTF-8; UTF-16 and UTF-32, by a byte-order mark or by what the bytes look like; and cp1252 (Windows, western
Europe, almost the same as Latin-1) where its letters are those of one language. NUL bytes at either end and byte-order
marks are left out. In the end the whole file has to decode without an error.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter

from trsp_core import formatting
from trsp_core.errors import TrspError

SAMPLE = 20_000  # bytes from which the encoding of a refused file is guessed
LEAST = 8  # characters that are needed as evidence: of UTF-16 and UTF-32 without a mark, or beyond ASCII of cp1252
FOREIGN = 0.02  # share of the letters beyond ASCII that may be of another language
MARK = "\ufeff"  # the byte-order mark
_SAVE = "Save it as UTF-8 and try again."

_MARKED = (  # longest first: UTF-16's mark begins UTF-32's
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32-le"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32-be"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16-le"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16-be"),
)
_LANGUAGES = (  # their letters in cp1252 beyond ASCII
    "äöüß",  # German
    "àâæçéèêëîïôœùûüÿ",  # French
    "áéíóúñü",  # Spanish
    "àáâãçéêíóôõúü",  # Portuguese
    "àèéìíîòóùú",  # Italian
    "àçèéíïòóúü",  # Catalan
    "åäöæøé",  # Swedish, Danish, Norwegian, Finnish
    "áéíóúýðþæöø",  # Icelandic, Faroese
    "éèëêïöüóç",  # Dutch
)
_LOANS = frozenset("éèêëáàâäãåæçíïñóòôöøúüß")  # letters of names from another language
_IN_WORDS = "’–—…·\u00a0\u00ad"  # marks that may stand between two letters
_MARKS = frozenset(_IN_WORDS + "“”‘„‚«»‹›•€£¥§©®™¡¿°±²³×÷µ½¼¾ªº¶†‡´")
_BROKEN_WORD = re.compile(rf"[^\W\d_][^\x00-\x7f\w{_IN_WORDS}][^\W\d_]|[^\W\d_][ªº²³¹½¼¾µƒ][^\W\d_]")


def decode(content: bytes, name: str) -> tuple[str, str]:
    """The text in a file's `content`, and sentences on how it was read: "" where it is plain UTF-8.

    Args:
        name: of the file, for the sentences.

    Raises:
        TrspError: it is no text, or its encoding is not sure.
    """
    for mark, title, codec in _MARKED:
        if content.startswith(mark):
            try:
                return _cleaned(content.decode(codec), name, title)
            except UnicodeDecodeError as error:
                raise TrspError(
                    f"{name} is not UTF-8: it begins as {title}, and its byte {formatting.count(error.start)} "
                    "cannot be read.",
                    _SAVE,
                ) from error
    problem: UnicodeDecodeError | None = None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        problem, text = error, ""
    if problem is None and "\0" not in text.strip(MARK + "\0"):
        if "\x1b$" in text and text.isascii():  # seven bits, so it passes for ASCII
            raise TrspError(f"{name} is not UTF-8: it looks like ISO-2022, as in Japanese mail.", _SAVE)
        return _cleaned(text, name, "")
    for title, codec in (("UTF-32", "utf-32-le"), ("UTF-32", "utf-32-be"), ("UTF-16", "utf-16-le"),
                         ("UTF-16", "utf-16-be")):  # fmt: skip
        wide = _wide(content, codec)
        if wide is not None:
            return _cleaned(wide, name, title)
    if problem is None:
        where = len(content) - len(content.lstrip(b"\0"))
        where = content.index(b"\0", where)
        raise TrspError(
            f"{name} is no text: its byte {formatting.count(where)} is NUL.", "Give a text file, saved as UTF-8."
        )
    western = _western(content.strip(b"\0"))
    if western is not None:
        return _cleaned(western, name, "cp1252 (Windows, western Europe)", len(content) - len(content.strip(b"\0")))
    raise TrspError(
        f"{name} is not UTF-8: byte {formatting.count(problem.start)} cannot be read{_guess(content, problem.start)}.",
        _SAVE,
    )


def lines(text: str) -> list[str]:
    """The lines of `text`, which end in \\n, \\r\\n or \\r. (`str.splitlines` also cuts at U+2028, U+2029, U+0085 and
    others, which may stand inside a string of JSON.)"""
    return re.split("\r\n|[\r\n]", text)


def _cleaned(text: str, name: str, title: str, dropped: int = 0) -> tuple[str, str]:
    """`text` without NUL at its ends and without byte-order marks, and sentences that say how it was read and what was
    left out, but for a mark at the beginning.

    Args:
        title: of the encoding; "" for UTF-8, which needs no sentence.
        dropped: how many NUL bytes were left out before.

    Raises:
        TrspError: a NUL stands elsewhere.
    """
    content = text.strip("\0" + MARK)
    if "\0" in content:
        raise TrspError(f"{name} is no text: NUL stands between its letters.", "Give a text file, saved as UTF-8.")
    nulls = dropped + text.count("\0")
    marks = text.lstrip("\0").removeprefix(MARK).count(MARK)
    sentences = [f"{name} was read as {title}."] if title else []
    if nulls:
        sentences.append(
            f"{formatting.count(nulls)} NUL {'character' if nulls == 1 else 'characters'} at an end of {name} "
            "were left out."
        )
    if marks:
        sentences.append(
            f"{formatting.count(marks)} byte-order {'mark' if marks == 1 else 'marks'} inside {name} were left out."
        )
    return content.replace(MARK, ""), " ".join(sentences)


def _wide(content: bytes, codec: str) -> str | None:
    """`content` decoded by `codec`, UTF-16 or UTF-32, if that is sure without a byte-order mark; else None.

    It is sure if all of it decodes to assigned characters; if there is white space among them, as in every text (the
    other byte order gives none); and if fewer than half of them are what two ASCII letters would be, taken as one.
    """
    if b"\0" not in content:
        return None
    try:
        text = content.decode(codec).strip("\0" + MARK)
    except UnicodeDecodeError:
        return None
    counts = Counter(text)
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\t\n\r\f\x85" for c in counts):
        return None
    blanks = sum(counts[c] for c in " \n\u3000\u3002")
    pairs = sum(n for c, n in counts.items() if _two_letters(ord(c)))
    return text if len(text) >= LEAST and blanks * 1000 >= len(text) > 2 * pairs else None


def _two_letters(unit: int) -> bool:
    """Whether both bytes of a 16-bit number are ASCII letters."""
    return all(half < 128 and chr(half).isalpha() for half in divmod(unit, 256))


def _western(content: bytes) -> str | None:
    """`content` decoded as cp1252 if that is sure, else None. It is sure if there are enough characters beyond ASCII,
    and all of them are letters of one language, in words, or usual marks such as quotes and dashes."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text) or _BROKEN_WORD.search(text):
        return None
    beyond = Counter(re.findall(r"[^\x00-\x7f]", text))
    letters: Counter[str] = Counter()
    for character, count in beyond.items():
        if character not in _MARKS:
            letters[character.lower()] += count
    strangers = min(
        (
            sum(n for c, n in letters.items() if c not in language)
            for language in _LANGUAGES
            if _loans(letters, language)
        ),
        default=None,
    )
    if strangers is None or strangers > FOREIGN * letters.total() or beyond.total() < LEAST:
        return None
    return text


def _loans(letters: Counter[str], language: str) -> bool:
    """Whether all `letters` that are not of this language may come from names in another one."""
    return all(c in language or c in _LOANS for c in letters)


def _guess(content: bytes, at: int) -> str:
    """The end of a sentence that names a likely encoding, `; it may be cp1251`, or "". It is guessed from the bytes
    around `at`, the first that is not UTF-8."""
    from charset_normalizer import from_bytes

    start = max(at - SAMPLE // 2, 0)
    best = from_bytes(content[start : start + SAMPLE]).best()
    return f"; it may be {best.encoding.replace('_', '-')}" if best else ""
