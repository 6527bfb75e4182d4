"""The texts of several models beside each other while they are written, and each text as the other models read it."""

from __future__ import annotations

import streamlit as st

from pages.ui.charts import drawing, token_lines
from pages.ui.style import theme, words
from trsp_core import formatting
from trsp_core.workbench import transcript
from trsp_core.workbench.client import Reading
from trsp_core.workbench.transcript import Comparison

COLOURS = {"Dense": "gray", "Deleted at once": "orange", "Before deletion": "blue", "Pruned": "green"}


def texts(comparison: Comparison, live: bool) -> None:
    """A box a model: its text so far, its speed, where it leaves the first one."""
    for n, box in enumerate(st.columns(len(comparison.columns), gap="medium")):
        column = comparison.columns[n]
        with box, st.container(border=True, key=f"text-{n}"):
            st.markdown(f":{COLOURS.get(column.label, 'violet')}-badge[**{words.plain(column.label)}**]")
            st.caption(_figures(comparison, n, live))
            if len(comparison.columns) > 1:
                st.caption(_parting(comparison, n))
            parting = comparison.parting(n) if n else None
            st.markdown(_marked(column.pieces, parting) + (" ▌" if live and not column.finished else ""))
            if verdict := comparison.verdict(n):
                st.warning(f"This text {words.plain(verdict)}.", icon=":material/warning:")


def _parting(comparison: Comparison, n: int) -> str:
    """Where the text leaves the first column's; the line stands from the start, so that nothing moves when it comes."""
    first = comparison.columns[0]
    if n == 0:
        return ":material/flag: The text that the others are compared with."
    if not comparison.columns[n].tokens:
        return f":material/flag: Compared with {words.plain(first.label)}."
    position = comparison.parting(n)
    if position is not None:
        return f":material/call_split: Leaves {words.plain(first.label)} at token {position + 1}, marked."
    if comparison.columns[n].finished and first.finished:
        return f":material/equal: Word for word the text of {words.plain(first.label)}."
    return f":material/equal: As {words.plain(first.label)} so far."


def _figures(comparison: Comparison, n: int, live: bool) -> str:
    column = comparison.columns[n]
    if not column.tokens:
        waits = "Reading the prompt" if column.prompt_tokens else "Not begun yet"
        return waits if live else "Nothing was written"
    parts = [f"{len(column.tokens)} {'token' if len(column.tokens) == 1 else 'tokens'}"]
    if column.rate:
        parts.append(f"**{formatting.rate(column.rate)} tokens/s**")
    first = comparison.columns[0]
    if n and column.finished and first.finished and first.rate and column.rate:
        parts.append(f"{formatting.ratio(column.rate / first.rate)} times as fast as {words.plain(first.label)}")
    if comparison.request.chat and not column.chat:
        parts.append("this model has no chat template")
    if column.finished:
        parts.append(f"{formatting.percent(transcript.repetition(column.text))} of its words said before")
        parts.append("ended by itself" if column.finished.reason == "end" else "cut at the length asked for")
    return " · ".join(parts)


def _marked(pieces: list[str], parting: int | None) -> str:
    """The text letter by letter, with the first token that differs marked."""
    if parting is None:
        return words.lines("".join(pieces))
    piece = pieces[parting]
    bare = piece.strip() or piece.replace("\n", "⏎").strip() or "␣"
    before, after = "".join(pieces[:parting]), "".join(pieces[parting + 1 :])
    lead = words.lines(piece[: len(piece) - len(piece.lstrip())])
    return f"{words.lines(before)}{lead}:orange-background[**{words.lines(bare)}**]{words.lines(after)}"


def reading_along(comparison: Comparison) -> None:
    """One text, read by every model: token by token, and the divergence along it."""
    columns = [n for n in range(len(comparison.columns)) if (n, n) in comparison.traces]
    if not columns:
        return
    st.markdown("#### Token by token")
    labels = {n: words.plain(comparison.columns[n].label) for n in columns}
    with st.container(horizontal=True):
        title = labels.__getitem__
        text = st.segmented_control(
            "Text of", columns, format_func=title, default=columns[0], key="text-of", required=True
        )
        others = [n for n in columns if n and (text, n) in comparison.traces]
        reader = others[0] if others else 0
        if len(others) > 1:
            reader = st.segmented_control(
                "Coloured by", others, format_func=title, default=others[0], key="coloured-by", required=True
            )
    if others:
        st.caption(
            f"The same text put before every model. The stronger the colour, the further {labels[reader]} "
            "is from the first model there (KL). Hover or tap a token for its probability and the likeliest five. "
            "Framed: the first token at which the texts part."
        )
    width = token_lines.NARROW if "Mobi" in (st.context.headers.get("User-Agent") or "") else token_lines.WIDE
    rows = token_lines.frame(comparison, text, reader, width)
    spec = {
        **token_lines.spec(theme.mode(), tuple(c.label for c in comparison.columns), width),
        "height": token_lines.height(rows),
    }
    drawing.show(spec, rows, "chart-tokens", f"The {len(rows)} tokens of a text, coloured by divergence.")
    position = _position(comparison, text, reader, len(rows))
    st.dataframe(
        token_lines.alternatives(comparison, text, position),
        key="alternatives",
        alt="Probabilities at the chosen token",
    )
    if others:
        spec = token_lines.divergence_spec(
            theme.mode(), tuple(comparison.columns[n].label for n in range(1, len(comparison.columns)))
        )
        drawing.show(
            spec,
            token_lines.divergence(comparison, text),
            "chart-divergence",
            token_lines.summary(comparison, text, others),
        )


def _position(comparison: Comparison, text: int, reader: int, count: int) -> int:
    """The token whose alternatives the table shows; the parting one at first. Works by keyboard and touch."""
    if count < 2:
        return 0
    start = comparison.parting(reader) if reader else None
    pieces = comparison.traces[text, text].pieces
    position = st.slider(
        "Token in the table",
        1,
        count,
        min((start or 0) + 1, count),
        key=f"place-{text}-{reader}",
        help="Or hover above.",
    )
    st.caption(f"Token {position}: {words.plain(repr(pieces[position - 1])[1:-1])}")
    return position - 1


def is_live(reading: Reading) -> bool:
    return reading.ending is None
