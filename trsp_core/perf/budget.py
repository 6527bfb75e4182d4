"""How much memory the fast paths may take."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from trsp_core.schema.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trsp_core.schema.events import Event

    Choice = Generator[Event, None, list[int]]
    Narrowing = Generator[Event, None, tuple[list[nn.Module], dict[str, int]]]
    Edits = Generator[Event, None, Mapping[nn.Parameter, Tensor]]

SEARCH_ROOM = 2**29  # bytes of hidden states that a search may keep from round to round


LANE_TOKENS = 128  # of a pass in one of stage 2's lanes, see `transfer`


def at_once(config: RunConfig) -> int:
    """How many blocks a lane takes in a pass where that has to hold little."""
    return max(LANE_TOKENS // config.block_length, 1)
