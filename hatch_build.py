"""Build hook: an editable install gets the start-up files alone, for its content folders are read from the checkout."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

START_UP_FILES = ("steered_lm.pth", "steered_lm.start")


class ContentHook(BuildHookInterface[Any]):
    """Keeps stale copies of ``tasks/``, ``optimizers/`` and ``personas/`` out of editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Replace what is force-included when the build is an editable one."""
        if version == "editable":
            build_data["force_include_editable"] = {str(Path(self.root) / name): name for name in START_UP_FILES}
