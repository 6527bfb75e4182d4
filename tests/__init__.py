"""Tests, in folders named as the packages that they are of."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
