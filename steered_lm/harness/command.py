"""lm-eval's own command line, started from ours."""

import sys
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate


def lm_eval_main(arguments: Sequence[str]) -> None:
    """Run ``lm_eval`` with these arguments in this process; it exits by itself where it wants to."""
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
