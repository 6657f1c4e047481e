"""What the benchmarks take and say: common arguments, tables, intervals, the machine, and the file of numbers. They all run offline."""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table

from steered_lm.stats import Estimate, PairedDifference

# lm-eval warns of every model object that it is handed
logging.getLogger("lm_eval").setLevel(logging.ERROR)
CONSOLE = Console(width=150)


def machine(threads: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "torch": torch.__version__,
        "transformers": hf.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
    }


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table, numbers to the right, with a note below it."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def options(description: str | None, default_json: str) -> argparse.ArgumentParser:
    """Return a parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="everything, in as many rounds as it takes to trust the numbers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("bench") / default_json, help="where the numbers go")
    return parser


def write(path: Path, data: Any) -> None:
    """Write the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    CONSOLE.print(f"wrote {path}")


def interval(found: Estimate | PairedDifference, digits: int = 1, *, signed: bool = True) -> str:
    value = found.mean if isinstance(found, PairedDifference) else found.value
    if value is None:
        return "-"
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    ends = "" if found.low is None or found.high is None else f" [{form.format(found.low)}, {form.format(found.high)}]"
    return form.format(value) + ends
