"""``steered-lm judge``: audits, agreement, human ratings, saved samples judged again, and the cache."""

import typer

judge_app = typer.Typer(no_args_is_help=True, help="Check judges, compare them with each other and with people, and judge saved samples again.")
