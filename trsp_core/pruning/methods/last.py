"""Last layers: the K removable layers that are nearest to the head, a control that needs no data."""

from __future__ import annotations

from trsp_core.pruning.methods import Method
from trsp_core.schema.events import LayerChosen


def choose(lab, config, count):
    """The K layers from the head downwards."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(lab.candidates(config, chosen)[-1])
        yield LayerChosen(1, chosen[-1])
    return chosen


METHOD = Method(
    name="last",
    title="Last layers",
    paper="",
    summary="The layers next to the output, a control that needs no data.",
    choose=choose,
)
