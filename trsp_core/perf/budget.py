"""How much memory a process takes, and how much its fast paths may take."""

from __future__ import annotations

from trsp_core.schema.config import RunConfig

PROCESS_BYTES = 450_000_000  # memory of a process that has imported torch and transformers and holds no model
SEARCH_ROOM = 2**29  # bytes of hidden states that a search may keep from round to round
LANE_TOKENS = 128  # tokens of a pass that has to hold little; see `training.trainer` and `training.passes`


def at_once(config: RunConfig) -> int:
    """How many calibration blocks go through a lane in one pass that has to hold little: about `LANE_TOKENS` tokens."""
    return max(LANE_TOKENS // config.block_length, 1)
