"""A short audit before a run: a judge that cannot show the effect that is sought is refused before anything is optimised towards it."""

import logging
from pathlib import Path

from pydantic import ValidationError

from steered_lm.config import write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges.audit import audit, audit_key
from steered_lm.judges.audit_items import AuditItem, audit_items
from steered_lm.judges.audit_report import AuditReport
from steered_lm.judges.base import Judge
from steered_lm.judges.question import Question

FILE_NAME = "audit.json"
REPEATS = 2

_ITEMS = 8
_SEED = 0
_REMEDIES = {
    "missing": "mend the endpoint or take a model whose answers can be read",
    "retest": "mend the endpoint or take a model whose answers can be read",
    "null": "ask again later, or take a judge whose scores do not drift",
    "length": "take a judge, or a rubric of your own, that does not reward length",
    "anchors": "take a stronger judge, and read the persona's judge_prompt.txt as it would",
    "noise": "ask a panel of judges, or seek a larger effect (--effect)",
}
_log = logging.getLogger(__name__)


def short_items(question: Question) -> list[AuditItem]:
    """Return the few items of a short audit: eight high anchors, eight low ones, and their longer and broken versions."""
    return audit_items(question, count=_ITEMS, seed=_SEED)


def check_judge(
    judge: Judge,
    question: Question,
    folder: Path,
    *,
    effect: float,
    prompts: int,
    missing_limit: float = 0.2,
    refuse: bool = True,
    known: AuditReport | None = None,
) -> AuditReport:
    """Audit a judge briefly, keep the report as ``audit.json``, and refuse a judge that is not trusted.

    A report of the same judge, question, items and settings is taken as it is, from ``folder`` or from ``known``, so a run that is started again asks
    nothing again; one that would refuse is not, for the judge may have been mended.

    Args:
        judge: the judge.
        question: what it is asked.
        folder: the run's folder.
        effect: the difference of two candidates that is sought, in points.
        prompts: on how many prompts candidates are compared.
        missing_limit: the largest share of missing verdicts that does not fail.
        refuse: whether an untrusted judge is an error; otherwise it is a warning in the log.
        known: a report from before.

    Raises:
        JudgeError: when the judge is refused; the message has the failing parts, their figures and what to do.
    """
    items, file = short_items(question), folder / FILE_NAME
    settings = {"repeats": REPEATS, "effect": effect, "prompts": prompts, "missing_limit": missing_limit, "seed": _SEED}
    key = audit_key(judge, question, items, **settings)
    usable = [report for report in (_stored(file), known) if report is not None and report.key == key and (report.trusted or not refuse)]
    report = usable[0] if usable else audit(judge, question, items, repeats=REPEATS, effect=effect, prompts=prompts, missing_limit=missing_limit)
    assert report.key == key
    write_atomic(file, report.model_dump_json(indent=2) + "\n")
    if not report.trusted:
        remedies = "; ".join(dict.fromkeys(_REMEDIES[part.name] for part in report.failures))
        advice = f"{report.conclusion()} The audit lies at {file}. What helps: {remedies}"
        if refuse:
            raise JudgeError(f"{advice}; or go on nevertheless with --audit warn.")
        _log.warning("%s.", advice)
    return report


def _stored(file: Path) -> AuditReport | None:
    if not file.is_file():
        return None
    try:
        return AuditReport.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        _log.warning("%s is not an audit of this version; the judge is audited again", file)
        return None
