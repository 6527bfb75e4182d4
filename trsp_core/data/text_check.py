"""Checks that a run's texts can be used with its model: that they are long enough, and that each of their token ids has
a row in the model's embedding.

The model's own tokenizer has to cut them, so a bounded child process does it: `python -m trsp_core.data.text_check`
(see `models.tokenizer_check`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trsp_core.data import blocks, special_tokens
from trsp_core.models import libraries, tokenizer_check
from trsp_core.models.inspection import Facts
from trsp_core.models.tokenizer_check import refuse
from trsp_core.schema.config import RunConfig, parse


def check(facts: Facts, config: RunConfig) -> None:
    """Check the texts of `config` for the model of `facts`, in a bounded child process; once for the same files.

    The child does what `blocks.check` does. Only where the tokenizer knows an id that has no row in the embedding does
    it cut all that the run will read.

    Raises:
        TrspError: the tokenizer cannot be opened, fails, or goes beyond a bound; a text cannot be used; an id has no
            row.
    """
    question = {"settings": config.as_dict()}
    tokenizer_check.ask("trsp_core.data.text_check", facts, question, [config.text, config.heldout])


def refuse_texts(texts: blocks.Texts, tokenizer: Any, config: RunConfig, rows: int) -> None:
    """Raise TrspError if anything that a run gives its model to read (texts, prompt, the proof's text) holds a token id
    that has no row in an embedding of `rows`."""
    for domain, measured_ids in texts.measure.items():
        refuse([int(measured_ids.max())], rows, f"The text {texts.names[domain]}")
    refuse([int(texts.calibration.max())], rows, f"The text {texts.names['calibration']}")
    refuse(special_tokens.begun(tokenizer, config.prompt), rows, "The prompt")
    if config.save_model or config.save_trained:
        refuse(tokenizer(blocks.PROOF_TEXT).input_ids[: blocks.PROOF_TOKENS], rows, "The text of the proof")


def _answer(question: dict[str, Any]) -> None:
    """The child's side of `check`; raises TrspError as that says."""
    folder, rows, config = Path(question["folder"]), question["rows"], parse(question["settings"])
    vocabulary = tokenizer_check.tokens_of(question["name"], folder)
    blocks.check(config, folder / "tokenizer.json")
    if (
        max([*vocabulary.values(), *tokenizer_check.added(folder, vocabulary)], default=-1) >= rows
    ):  # else no text can hold such an id
        tokenizer = libraries.load_tokenizer(folder)
        refuse_texts(blocks.prepare(config, tokenizer), tokenizer, config, rows)


if __name__ == "__main__":
    sys.exit(tokenizer_check.answering(_answer))
