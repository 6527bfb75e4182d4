"""Where things lie in the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, whether they are there or not."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def events_file(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def proof_file(self) -> Path:
        """What the pruned model computed while it was in memory, if the run keeps the model."""
        return self.folder / "proof.safetensors"

    @property
    def checkpoint_file(self) -> Path:
        """What stage 2 leaves now and then, to resume from; gone once the run has finished."""
        return self.folder / "resume.safetensors"

    @property
    def rounds_file(self) -> Path:
        """What stage 1 leaves after each round, to resume from; gone once the run has finished."""
        return self.folder / "rounds.safetensors"

    @property
    def solution_files(self) -> list[Path]:
        """What a repair leaves for each layer that it has solved for, to resume from; gone once the run has
        finished."""
        return sorted(self.folder.glob("repair-*.safetensors"))

    def solution_file(self, number: int) -> Path:
        """The file of the solution of this number, from 0."""
        return self.folder / f"repair-{number:04}.safetensors"

    @property
    def points(self) -> list[Path]:
        """All files to resume from that are there."""
        return [*(file for file in (self.checkpoint_file, self.rounds_file) if file.exists()), *self.solution_files]

    @property
    def exports_folder(self) -> Path:
        return self.folder / "exports"

    @property
    def trained_folder(self) -> Path:
        """Where the model after stage 2 with all its layers is, if the run keeps it."""
        return self.folder / "trained-model"

    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return (self.folder / "cancel").exists()
