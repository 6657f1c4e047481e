"""Verdicts that ``steered-lm judge rejudge`` wrote, put side by side: judges as raters of the same items."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from steered_lm.errors import JudgeError
from steered_lm.judges.agreement import Metric
from steered_lm.judges.base import JudgeRequest, Verdict
from steered_lm.judges.samples import verdict_of

CHOICE_CODES: dict[str, float] = {"A": 1.0, "tie": 0.0, "B": -1.0}
"""What stands for a choice where raters are compared."""
_NEEDED = ("file", "id", "prompt", "response", "verdict")


class Verdicts(NamedTuple):
    """Verdicts on one question.

    Attributes:
        question: rubric with its version, and persona or trait.
        requests: what was judged, by item.
        judges: every judge's verdicts by item, panels included.
    """

    question: str
    requests: dict[str, JudgeRequest]
    judges: dict[str, dict[str, Verdict]]

    def raters(self) -> dict[str, dict[str, Verdict]]:
        """Return the verdicts by those who gave them: a panel's are left out, as they are made of its members', which are there instead.

        Raises:
            JudgeError: when a panel's member says another thing of an item than a judge of its name elsewhere.
        """
        found: dict[str, dict[str, Verdict]] = {name: dict(given) for name, given in self.judges.items() if not any(map(_of_panel, given.values()))}
        for given in self.judges.values():
            for item, verdict in given.items():
                if _of_panel(verdict):
                    for name, part in members(verdict).items():
                        before = found.setdefault(name, {}).setdefault(item, part)
                        if (before.score, before.missing) != (part.score, part.missing):
                            raise JudgeError(
                                f"two judges are called {name}, a member of {verdict.judge} one of them, and they differ on {item}. "
                                "Give the panel's verdicts in a run of their own."
                            )
        return found


def members(verdict: Verdict) -> dict[str, Verdict]:
    """Return the verdicts of a panel's members by name; the second of one name is called ``<name> #2``. Empty for other judges."""
    found: dict[str, Verdict] = {}
    if _of_panel(verdict):
        for part in verdict.parts:
            same = sum(name.partition(" #")[0] == part.judge for name in found)
            found[f"{part.judge} #{same + 1}" if same else part.judge] = part
    return found


def _of_panel(verdict: Verdict) -> bool:
    # both orders of a pair are parts, too, but by the same judge
    return any(part.judge != verdict.judge for part in verdict.parts)


def read_verdicts(paths: Sequence[Path]) -> Verdicts:
    """Read one or more files, of one judge or several.

    Raises:
        JudgeError: when a line is none of rejudge's, files are about different questions, or one judge says two things of one item.
    """
    question: str | None = None
    requests: dict[str, JudgeRequest] = {}
    judges: dict[str, dict[str, Verdict]] = {}
    for path in paths:
        if not path.is_file():
            raise JudgeError(f"{str(path)!r} does not exist. Write verdicts with: steered-lm judge rejudge … --out {path}")
        with path.open(encoding="utf-8") as handle:
            for number, text in enumerate(handle, start=1):
                if not text.strip():
                    continue
                where = f"{str(path)!r}, line {number},"
                data, verdict = _line(where, text)
                asked = " of ".join(str(data[name]) for name in ("rubric", "about") if data.get(name)) or "not said"
                if question not in (None, asked):
                    raise JudgeError(f"{where} is about {asked}, and lines before are about {question}. Give verdicts on one question at a time.")
                question = asked
                repeat = f"#{data['repeat']}" if data.get("repeat") else ""
                item = f"{data['file']}:{data['id']}{repeat}"
                shown = {name: data[name] for name in JudgeRequest.model_fields if data.get(name) is not None}
                request = JudgeRequest.parse(shown, source=where.rstrip(","), error=JudgeError)
                if requests.setdefault(item, request) != request:
                    raise JudgeError(f"{where} has other texts for {item} than a line before. Judge both systems' logs from folders of their own.")
                before = judges.setdefault(verdict.judge, {}).setdefault(item, verdict)
                if (before.score, before.missing) != (verdict.score, verdict.missing):
                    raise JudgeError(f"{where} is a second verdict of {verdict.judge} on {item}, and another one. Give one file a judge.")
    if question is None:
        raise JudgeError(f"{', '.join(map(str, paths)) or 'no file'}: there is no verdict in it. Write some with: steered-lm judge rejudge …")
    return Verdicts(question, requests, judges)


def _line(where: str, text: str) -> tuple[dict[str, object], Verdict]:
    try:
        data = json.loads(text)
    except ValueError as problem:
        raise JudgeError(f"{where} is not JSON: {problem}.") from problem
    lacking = [name for name in _NEEDED if name not in data] if isinstance(data, dict) else list(_NEEDED)
    verdict = verdict_of(data["verdict"]) if not lacking and isinstance(data["verdict"], dict) else None
    if verdict is None:
        what = f"lacks {', '.join(lacking)}" if lacking else "has a verdict that is none"
        raise JudgeError(f"{where} {what}. Expected is what steered-lm judge rejudge writes.")
    return data, verdict


def value(verdict: Verdict | None) -> float | None:
    """Return the number that stands for a verdict where raters are compared: the choice's code for pairs, else the score."""
    if verdict is None:
        return None
    return verdict.score if verdict.choice is None else CHOICE_CODES[verdict.choice]


def metric_of(raters: Mapping[str, Mapping[str, Verdict]]) -> Metric:
    """Return the metric that fits verdicts: nominal for choices, ordinal for whole scores, else interval."""
    verdicts = [verdict for given in raters.values() for verdict in given.values() if verdict.score is not None]
    if verdicts and all(verdict.choice is not None for verdict in verdicts):
        return "nominal"
    return "ordinal" if all(verdict.score is not None and verdict.score.is_integer() for verdict in verdicts) else "interval"
