"""Statistics, figures and the HTML page that a researcher looks at after a run."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ReportData": "data",
    "load_report": "data",
    "Report": "page",
    "ReportFiles": "page",
    "build_report": "page",
    "render": "page",
    "CostData": "cost_data",
    "load_cost": "cost_data",
    "render_cost": "cost_page",
}

__all__ = ["CostData", "Report", "ReportData", "ReportFiles", "build_report", "load_cost", "load_report", "render", "render_cost"]


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use: plotly and scipy are not needed to fill in ``ReportData``."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steered_lm.report' has no attribute {name!r}")
    return getattr(import_module(f"steered_lm.report.{_EXPORTS[name]}"), name)
