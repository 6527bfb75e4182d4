"""Whether a run's texts can be used with its model: long enough, and cut into ids that have a row in its embedding.

The model's tokenizer cuts them, so this too is left to a bounded child process, `python -m trsp_core.data.text_check`.
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
    """Cut the texts of `config` with the tokenizer of its model, as far as `blocks.check` does and wherever an id could
    lie beyond the embedding, in a bounded child; once for the same files.

    Raises:
        TrspError: the tokenizer cannot be opened, fails, or goes beyond a bound; a text cannot be used; an id has no
            row.
    """
    question = {"settings": config.as_dict()}
    tokenizer_check.ask("trsp_core.data.text_check", facts, question, [config.text, config.heldout])


def refuse_texts(texts: blocks.Texts, tokenizer: Any, config: RunConfig, rows: int) -> None:
    """Raise TrspError if any of what a run gives its model to read has an id beyond an embedding of `rows`."""
    for domain, measured_ids in texts.measure.items():
        refuse([int(measured_ids.max())], rows, f"The text {texts.names[domain]}")
    refuse([int(texts.calibration.max())], rows, f"The text {texts.names['calibration']}")
    refuse(special_tokens.begun(tokenizer, config.prompt), rows, "The prompt")
    if config.save_model or config.save_trained:
        refuse(tokenizer(blocks.PROOF_TEXT).input_ids[: blocks.PROOF_TOKENS], rows, "The text of the proof")


def _answer(question: dict[str, Any]) -> None:
    """The child's work. Raises TrspError: as in `check`."""
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
