"""``steered-lm judge``: audits, agreement, human ratings, saved samples judged again, and the cache."""

import typer

from steered_lm.commands.audit import audit_command
from steered_lm.commands.cache import cache_app
from steered_lm.commands.panel import judge_agreement
from steered_lm.commands.ratings import ratings, sheet
from steered_lm.commands.rejudge import rejudge

judge_app = typer.Typer(no_args_is_help=True, help="Check judges, compare them with each other and with people, and judge saved samples again.")
judge_app.add_typer(cache_app, name="cache")
judge_app.command("rejudge")(rejudge)
judge_app.command("audit")(audit_command)
judge_app.command("agreement")(judge_agreement)
judge_app.command("sheet")(sheet)
judge_app.command("ratings")(ratings)
