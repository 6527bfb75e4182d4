"""Whether a run's texts can be used with its model: long enough, and cut into ids that have a row in its embedding.

The model's tokenizer cuts them, so this too is left to a bounded child process, `python -m trsp_core.data.text_check`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trsp_core.data import blocks as data
from trsp_core.data import special_tokens
from trsp_core.models import libraries, tokenizer_check
from trsp_core.models.inspection import Facts
from trsp_core.models.tokenizer_check import refuse
from trsp_core.schema import config as configs
from trsp_core.schema.config import RunConfig


def check(facts: Facts, config: RunConfig) -> None:
    """Cut the texts of `config` with the tokenizer of its model, as far as `data.check` does and wherever an id could
    lie beyond the embedding, in a bounded child; once for the same files.

    Raises:
        TrspError: the tokenizer cannot be opened, fails, or goes beyond a bound; a text cannot be used; an id has no
            row.
    """
    question = {"settings": config.as_dict()}
    tokenizer_check.ask("trsp_core.data.text_check", facts, question, [config.text, config.heldout])


def refuse_texts(prepared: data.Texts, tokenizer: Any, config: RunConfig, rows: int) -> None:
    """Raise TrspError if any of what a run gives its model to read has an id beyond an embedding of `rows`."""
    for domain, blocks in prepared.measure.items():
        refuse([int(blocks.max())], rows, f"The text {prepared.names[domain]}")
    refuse([int(prepared.calibration.max())], rows, f"The text {prepared.names['calibration']}")
    refuse(special_tokens.begun(tokenizer, config.prompt), rows, "The prompt")
    if config.save_model or config.save_trained:
        refuse(tokenizer(data.PROOF_TEXT).input_ids[: data.PROOF_TOKENS], rows, "The text of the proof")


def _answer(question: dict[str, Any]) -> None:
    """The child's work. Raises TrspError: as in `check`."""
    folder, rows, config = Path(question["folder"]), question["rows"], configs.parse(question["settings"])
    known = tokenizer_check.tokens_of(question["name"], folder)
    data.check(config, folder / "tokenizer.json")
    if (
        max([*known.values(), *tokenizer_check.added(folder, known)], default=-1) >= rows
    ):  # else no text can hold such an id
        tokenizer = libraries.load_tokenizer(folder)
        refuse_texts(data.prepare(config, tokenizer), tokenizer, config, rows)


if __name__ == "__main__":
    sys.exit(tokenizer_check.answering(_answer))
