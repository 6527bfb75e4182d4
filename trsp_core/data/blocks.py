"""Cuts articles into blocks of tokens, split by article, so that nothing that is measured was ever trained on.

The articles of each text are put in a seeded order. The first of them, a quarter of the text, are set aside for
measuring, and calibration takes from the others: so what a model is trained on does not depend on how many blocks are
measured. Either takes at most a sixteenth of the tokens that it needs from one article. The articles taken for one
purpose are joined, a blank line ("\\n\\n") between two, and cut into blocks. Each block begins as the tokenizer begins
a text (`special_tokens`: with BOS in Gemma, OPT and others), and none is closed as a text is. Names of special tokens
that stand in an article are read as ordinary letters.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp_core import formatting, paths
from trsp_core.data import corpora, special_tokens
from trsp_core.data.corpora import Corpus
from trsp_core.errors import TrspError
from trsp_core.schema.config import RunConfig
from trsp_core.schema.events import TextPrepared

if TYPE_CHECKING:
    import torch

MEASURED = 0.25  # share of a text, in characters, that each domain measured on it sets aside
SPREAD = 16  # at most 1/16 of the tokens for one purpose come from one article, as long as there are others

Encode = Callable[[str], list[int]]  # the token ids of a text, without any before or after it


@dataclass(frozen=True)
class Texts:
    """All token blocks of a run.

    Attributes:
        calibration: token ids (N, T) int64 to train on; N may be less than asked for where the text is short.
        measure: token ids (M, T2) int64 to measure on, never trained on, by domain: "calibration" and "heldout".
        events: what was cut: one event for each role and domain.
        names: what the text is called, by domain.
        notes: sentences that a reader of the run should see.
    """

    calibration: torch.Tensor
    measure: dict[str, torch.Tensor]
    events: tuple[TextPrepared, ...]
    names: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """The blocks of one role in one domain.

    Attributes:
        role: "calibrate" or "measure".
        length: tokens of a block.
        article_count: how many articles the blocks come from.
    """

    domain: str
    role: str
    length: int
    blocks: list[list[int]]
    article_count: int


def check(config: RunConfig, tokenizer_file: Path | None = None) -> None:
    """Check those texts of `config` that are files of the person's own, quickly: without a model and without torch.

    Args:
        tokenizer_file: the model's tokenizer.json: with it, a text that may be too short is cut to see.

    Raises:
        TrspError: a text is missing, empty, in an encoding that is not sure, or too short.
    """
    corpus_of = {t: corpora.own(t) for t in _paths(config)}
    least_tokens = config.block_length + config.measure_length
    for text, corpus in corpus_of.items():
        size = sum(len(article.encode()) for article in corpus.articles)
        if size < (least_tokens if text == config.text else config.measure_length):  # a token is a byte at least
            raise _too_short(text, size, least_tokens, "bytes")
    short = [t for t, c in corpus_of.items() if sum(map(len, c.articles)) < 32 * least_tokens]
    if short and tokenizer_file is not None and tokenizer_file.is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(tokenizer_file))
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True
        prefix, _ = special_tokens.around(lambda text, around: fast.encode(text, add_special_tokens=around).ids)
        for text in short:
            own = {d: corpus_of[text] for d in ("calibration", "heldout") if _text_of(config, d) == text}
            cut(config, own, lambda article: fast.encode(article, add_special_tokens=False).ids, prefix)


def prepare(config: RunConfig, tokenizer: Any) -> Texts:
    """Read both texts of `config`, split them by article, and cut them into blocks.

    Args:
        tokenizer: one of transformers.

    Raises:
        TrspError: as in `check`; a text cannot be fetched, or does not give one whole block for each of its roles.
    """
    import torch

    corpus_of = {"calibration": corpora.read(config.text)}
    same = _same(config.text, config.heldout)
    corpus_of["heldout"] = corpus_of["calibration"] if same else corpora.read(config.heldout)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    prefix, _ = special_tokens.around(special_tokens.encoder(tokenizer))
    sides = cut(config, corpus_of, encode, prefix)
    tensors = {(s.domain, s.role): torch.tensor(s.blocks, dtype=torch.int64) for s in sides}
    names = {domain: _name(_text_of(config, domain)) for domain in corpus_of}
    return Texts(
        calibration=tensors["calibration", "calibrate"],
        measure={domain: tensors[domain, "measure"] for domain in corpus_of},
        events=tuple(_event(side, names) for side in sides),
        names=names,
        notes=_notes(config, corpus_of, sides, same),
    )


def order(n_blocks: int, batch_blocks: int, seed: int) -> Iterator[list[int]]:
    """Which blocks each step trains on, without an end: lists of `batch_blocks` numbers below `n_blocks`.

    All blocks come once, then once more in another order, and so on, by `seed`; a batch may hold the end of one order
    and the beginning of the next.
    """
    draw = random.Random(seed)  # noqa: S311 - a reproducible order, no secret
    stream: list[int] = []
    while True:
        while len(stream) < batch_blocks:
            stream += draw.sample(range(n_blocks), n_blocks)
        yield stream[:batch_blocks]
        del stream[:batch_blocks]


def fingerprint(blocks: Sequence[Sequence[int]]) -> str:
    """A text that tells whether two runs read the same blocks: the first 16 hex digits of the SHA-256 of all token ids,
    as little-endian 64-bit numbers."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(struct.pack(f"<{len(block)}q", *block))
    return digest.hexdigest()[:16]


def cut(config: RunConfig, corpus_of: dict[str, Corpus], encode: Encode, prefix: list[int]) -> list[_Side]:
    """The blocks of each role and domain for which `corpus_of` has a text. No article serves two of them.

    Args:
        corpus_of: the articles, by domain: "calibration", "heldout" or both.
        prefix: token ids with which each block begins.

    Raises:
        TrspError: a text is too short for one block, or the prefix leaves no room in a block.
    """
    roles = [("calibration", "measure"), ("heldout", "measure"), ("calibration", "calibrate")]
    sources = [(d, r, _source(corpus_of[d], r)) for d, r in roles if d in corpus_of]
    pools = {id(source): shuffled(source, config.seed) for _, _, source in sources}
    sides: list[_Side] = []
    for n, (domain, role, source) in enumerate(sources):
        goes_on = any(other is source for _, _, other in sources[n + 1 :])  # others still need a part of it
        pool = pools[id(source)]
        limit = int(MEASURED * sum(map(len, source))) if goes_on else None
        most_blocks = config.measure_blocks if role == "measure" else config.calibration_blocks
        length = config.measure_length if role == "measure" else config.block_length
        if length <= len(prefix) + 1:
            raise TrspError(
                f"This model's tokenizer puts {len(prefix)} tokens before each text; blocks of {length} have no room.",
                "Set --block-length and --measure-length higher, or choose another model.",
            )
        blocks, article_count, token_count = _fill(pool, most_blocks, length, limit, encode, prefix)
        if not blocks:
            raise _too_short(_text_of(config, domain), token_count, length, f"tokens for {_ROLES[role]}")
        del pool[: max(article_count, _articles_within(pool, limit or 0))]
        sides.append(_Side(domain, role, length, blocks, article_count))
    return sides


def _articles_within(pool: list[str], limit: int) -> int:
    """How many of the first articles of `pool` have at most `limit` characters together."""
    return sum(total <= limit for total in itertools.accumulate(map(len, pool)))


def _source(corpus: Corpus, role: str) -> tuple[str, ...]:
    return corpus.reserved if role == "measure" and corpus.reserved else corpus.articles


_ROLES = {"measure": "measuring", "calibrate": "calibration"}


def _fill(
    pool: list[str], most_blocks: int, length: int, limit: int | None, encode: Encode, prefix: list[int]
) -> tuple[list[list[int]], int, int]:
    """Blocks from the first articles of `pool`.

    Args:
        length: tokens of a block, those of the prefix among them.
        limit: how many characters of `pool` may be used, unless the first block needs more; None for all.

    Returns:
        The blocks, how many articles were used for them, and how many tokens these articles gave.
    """
    body = length - len(prefix)
    most_tokens = most_blocks * body
    share = max(body, -(-most_tokens // SPREAD))
    separator = encode("\n\n")
    stream: list[int] = []
    rests: list[list[int]] = []  # what is beyond each article's share, in case there are too few articles
    article_count = characters = 0
    for article in pool:
        tokens = len(stream) + sum(map(len, rests))
        if len(stream) >= most_tokens or (limit is not None and tokens >= body and characters + len(article) > limit):
            break
        ids = encode(article)
        stream += (separator if stream else []) + ids[:share]
        rests.append(ids[share:])
        article_count, characters = article_count + 1, characters + len(article)
    for rest in rests:
        if len(stream) < most_tokens and rest:
            stream += separator + rest
    blocks = [prefix + stream[i * body : (i + 1) * body] for i in range(min(most_blocks, len(stream) // body))]
    return blocks, article_count, len(stream)


def shuffled(articles: Sequence[str], seed: int) -> list[str]:
    """The articles in the order of `seed`."""
    return random.Random(seed).sample(list(articles), len(articles))  # noqa: S311 - a reproducible split, no secret


def _paths(config: RunConfig) -> list[str]:
    """The texts of `config` that are files of the person's own, each once."""
    return [t for t in dict.fromkeys([config.text, config.heldout]) if not corpora.is_named(t)]


def _text_of(config: RunConfig, domain: str) -> str:
    return config.text if domain == "calibration" else config.heldout


def _same(one: str, other: str) -> bool:
    if one == other or corpora.is_named(one) or corpora.is_named(other):
        return one == other
    return paths.named(one, "text").resolve() == paths.named(other, "text").resolve()


def _name(text: str) -> str:
    return text if corpora.is_named(text) else Path(text).name


def _event(side: _Side, names: dict[str, str]) -> TextPrepared:
    return TextPrepared(
        domain=side.domain,
        role="calibration" if side.role == "calibrate" else "measure",
        text=names[side.domain],
        articles=side.article_count,
        blocks=len(side.blocks),
        block_length=side.length,
        tokens=len(side.blocks) * side.length,
        fingerprint=fingerprint(side.blocks),
    )


def _notes(config: RunConfig, corpus_of: dict[str, Corpus], sides: list[_Side], same: bool) -> tuple[str, ...]:
    notes = dict.fromkeys(corpus.note for corpus in corpus_of.values() if corpus.note)
    if same:
        notes["Both domains are the same text, so the held-out figures say nothing about another domain."] = None
    for side in sides:
        most_blocks = config.calibration_blocks if side.role == "calibrate" else config.measure_blocks
        if len(side.blocks) < most_blocks:
            where = _name(_text_of(config, side.domain))
            notes[f"{where} is short: {len(side.blocks)} of {most_blocks} blocks for {_ROLES[side.role]}."] = None
    return tuple(notes)


def _too_short(text: str, size: int, least: int, unit: str) -> TrspError:
    return TrspError(
        f"{_name(text)} is too short: {formatting.count(size)} {unit} are there, one block needs "
        f"{formatting.count(least)}.",
        "Give a longer text, or shorter blocks (--block-length, --measure-length).",
    )


PROOF_TEXT = (
    "The old harbour lies where the river meets the sea. In 1807 its lighthouse was rebuilt in stone, and for a "
    "hundred years the keepers wrote down every ship that passed, the wind, and the hour at which the lamp was lit."
)
PROOF_TOKENS, NEW_TOKENS = 32, 16
