"""Says which architectures of transformers can be pruned, by the recorded outcome of trying every causal language
model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from trsp_core import paths

RECORD = paths.ASSETS / "families.json"


@dataclass(frozen=True)
class Outcome:
    """What came of pruning a tiny model of one architecture (`python -m tests.survey_families`).

    Attributes:
        model_type: the config's name of the family.
        architecture: the class of the model.
        outcome: "supported", "refused", "no decoder" (refused, and rightly), "not built" or "failed".
        reason: why it was refused, why no tiny model of it could be built, or what failed; "" where it is supported.
    """

    model_type: str
    architecture: str
    outcome: str
    reason: str

    @property
    def group(self) -> str:
        """The reason without the model's name, so that models with the same reason can stand together."""
        return (self.reason.partition(": ")[2] or self.reason.replace(self.architecture, "it")).rstrip(".")


@dataclass(frozen=True)
class FamilyRecord:
    """The outcomes of all causal language models that one version of `transformers` knows."""

    transformers: str
    outcomes: tuple[Outcome, ...]

    def of(self, outcome: str) -> list[Outcome]:
        """The architectures with this outcome."""
        return [o for o in self.outcomes if o.outcome == outcome]

    def groups(self, outcome: str) -> dict[str, list[str]]:
        """The model types with this outcome, by the `group` of their reason."""
        groups: dict[str, list[str]] = {}
        for o in self.of(outcome):
            groups.setdefault(o.group, []).append(o.model_type)
        return groups

    @property
    def share(self) -> float:
        """The share, 0 to 1, of supported ones among the decoder-only models that could be built."""
        return len(self.of("supported")) / max(sum(len(self.of(o)) for o in ("supported", "refused", "failed")), 1)


def recorded() -> FamilyRecord:
    """The record that comes with the program."""
    record = json.loads(RECORD.read_text("utf-8"))
    return FamilyRecord(record["transformers"], tuple(Outcome(**o) for o in record["outcomes"]))


@cache
def native() -> dict[str, str]:
    """The causal language models that transformers loads with its own code: architecture by model type."""
    return {outcome.model_type: outcome.architecture for outcome in recorded().outcomes}
