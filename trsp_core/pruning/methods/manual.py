"""By hand: the layers that a person names."""

from __future__ import annotations

from trsp_core.pruning.methods import Method
from trsp_core.schema.config import parse_layers


def choose(lab, config, count):
    """The layers in `config.layers`, ascending.

    Raises:
        TrspError: that is no list of layers.
    """
    yield from ()
    return parse_layers(config.layers)


METHOD = Method(
    name="manual",
    title="By hand",
    paper="",
    summary="The layers that you name, to compete with the methods.",
    choose=choose,
)
