"""What is turned in a run while it goes on, as the engine sees it: it asks before each step what the settings are now.

The default is a run that nobody steers; its settings are those that it was begun with. Whoever drives the run's
generator may turn knobs between two events (`runs.steering`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trsp_core.schema import turns
from trsp_core.schema.config import RunConfig, count_to_remove


class Steering:
    """The knobs of one run.

    Args:
        values: what has been turned before, by name of the setting.
    """

    def __init__(self, values: Mapping[str, Any] | None = None):
        self._values = dict(values or {})
        self._latest: tuple[RunConfig, RunConfig] | None = None  # a config, and it as it stands now

    def turn(self, name: str, value: Any) -> None:
        """Let a setting stand at `value` from the next step on."""
        self._values[name], self._latest = value, None

    def now(self, config: RunConfig) -> RunConfig:
        """`config`, with which the run was begun, as it stands now."""
        if not self._latest or self._latest[0] is not config:
            self._latest = config, turns.applied(config, self._values)
        return self._latest[1]

    def steps(self, config: RunConfig, steps: int) -> int:
        """`steps` of stage 2 by `config`, and as many more or fewer as it has now."""
        return steps + self.now(config).stage2_steps - config.stage2_steps

    def layers(self, config: RunConfig, count: int, n_layers: int) -> int:
        """`count` layers to remove by `config`, and as many more or fewer as there are now, of `n_layers`."""
        if "ratio" not in self._values:
            return count
        return count + count_to_remove(self.now(config), n_layers) - count_to_remove(config, n_layers)
