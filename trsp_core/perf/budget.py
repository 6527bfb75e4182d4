"""How much memory a process and its fast paths may take."""

from __future__ import annotations

from trsp_core.schema.config import RunConfig

PROCESS_BYTES = 450_000_000  # of a process that has imported torch and transformers and holds no model
SEARCH_ROOM = 2**29  # bytes of hidden states that a search may keep from round to round
LANE_TOKENS = 128  # of a pass in one of stage 2's lanes, see `training.trainer`


def at_once(config: RunConfig) -> int:
    """How many blocks a lane takes in a pass where that has to hold little."""
    return max(LANE_TOKENS // config.block_length, 1)
