"""Several judges as one: each is asked, and a rule makes one verdict of theirs."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from steered_lm.config import Config, content_hash, read_structured
from steered_lm.errors import JudgeError, UserError
from steered_lm.judges import PANEL_SUFFIXES, make_judge, takes_option
from steered_lm.judges.base import Choice, Judge, JudgeRequest, OnVerdict, StreamingJudge, Usage, Verdict
from steered_lm.judges.question import Question

Rule = Literal["mean", "median", "majority"]
_PREFERENCE_OF: dict[Choice, float] = {"A": 1.0, "tie": 0.0, "B": -1.0}
Value = TypeVar("Value", bound=Hashable)


class Member(Config):
    """One judge of a panel's file.

    Attributes:
        judge: its name, as ``make_judge`` takes it.
        options: options of its backend.
    """

    judge: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"judge": given}
        if isinstance(given, dict) and "options" not in given:
            return {"judge": given.get("judge"), "options": {key: value for key, value in given.items() if key != "judge"}}
        return given


class PanelFile(Config):
    """What a panel's YAML file holds.

    Attributes:
        judges: names, or mappings with ``judge`` and its options, such as ``{judge: openai:m, base_url: …}``; two or more.
        rule: how one verdict is made of theirs.
        quorum: how many must have a score; by default more than half.
    """

    judges: tuple[Member, ...] = Field(min_length=2)
    rule: Rule = "median"
    quorum: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _quorum_can_be_met(self) -> Self:
        if self.quorum is not None and self.quorum > len(self.judges):
            raise ValueError(f"quorum {self.quorum} is more than the {len(self.judges)} judges")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a panel's file.

        Raises:
            JudgeError: when it is missing or malformed; values are not shown, as one may be a key put in the wrong place.
        """
        data = read_structured(path, what="panel ", error=JudgeError)
        try:
            return cls.model_validate(data)
        except ValidationError as report:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in report.errors())
            raise JudgeError(
                f"panel {str(path)!r}: {problems}. Allowed keys: {', '.join(cls.model_fields)}. "
                "Write for example: judges: [stylometric, {judge: 'openai:<model>', base_url: …}], rule: median, quorum: 2"
            ) from None


class Panel:
    """Asks each member about each response, and makes one verdict of theirs.

    ``mean`` and ``median`` are of the members' scores. ``majority`` is the commonest score, each rounded to a whole one first, and the median
    where several are commonest. Pairs: members are asked in both orders; the choice is the members' commonest one under every rule, a tie where
    several are, and the score is the rule's (under ``majority`` the choice's own: 1, 0 or -1). With fewer scores than the quorum the verdict is
    missing, with the members' reasons. ``parts`` holds the members' verdicts, and ``usage`` is their sum.
    """

    def __init__(self, judges: Sequence[Judge], rule: Rule = "median", *, quorum: int | None = None, name: str | None = None) -> None:
        """Form a panel of judges of one question.

        Args:
            judges: the members; for pairs, each wrapped in ``BothOrders``, as ``make_judge`` does.
            rule: how one verdict is made of theirs.
            quorum: how many must have a score; by default more than half.
            name: for tables.

        Raises:
            JudgeError: when there are fewer than two members, two are the same judge, or the quorum cannot be met.
        """
        self._members = tuple(judges)
        self._rule: Rule = rule
        self._quorum = len(self._members) // 2 + 1 if quorum is None else quorum
        self._name = name or f"panel({rule} of {', '.join(judge.name for judge in self._members)})"
        if len(self._members) < 2:
            raise JudgeError(f"panel {self._name}: {len(self._members)} judge is no panel. Name two or more.")
        if not 1 <= self._quorum <= len(self._members):
            raise JudgeError(f"panel {self._name}: quorum={quorum} of {len(self._members)} judges. Allowed: 1 to {len(self._members)}.")
        twice = [name for name, count in Counter(j.name for j in self._members).items() if count > 1]
        if len({judge.identity for judge in self._members}) < len(self._members):
            raise JudgeError(f"panel {self._name}: {', '.join(twice)} is there twice with the same options, and would vote twice. Leave one out.")

    @classmethod
    def of_file(cls, path: Path, question: Question, *, cache: Path | str | None = None, **options: Any) -> Self:
        """Return the panel that a YAML file names.

        Args:
            path: see :class:`PanelFile`; the panel is called ``panel:<file's stem>``.
            question: what each member is asked.
            cache: a SQLite file that keeps each member's verdicts, so that a further member does not pay for the others again.
            options: go to every member whose backend takes them and whose entry does not set them.

        Raises:
            JudgeError: when the file is malformed, an option fits no member, or a member cannot be made; the message names file and key.
        """
        panel = PanelFile.load(path)
        for option in options:
            if not any(takes_option(member.judge, option) for member in panel.judges):
                raise JudgeError(f"panel {str(path)!r}: no judge of it takes the option {option}. Write options beside the judge that they are for.")
        judges = []
        for number, member in enumerate(panel.judges):
            where = f"panel {str(path)!r}, judges.{number}"
            if member.judge.endswith(PANEL_SUFFIXES):
                raise JudgeError(f"{where}: {member.judge!r} is a panel, and a panel's members are judges. Name its members here instead.")
            shared = {option: value for option, value in options.items() if takes_option(member.judge, option)}
            try:
                judges.append(make_judge(member.judge, question, cache=cache, **{**shared, **member.options}))
            except UserError as problem:
                raise JudgeError(f"{where}: {problem}") from problem
        return cls(judges, panel.rule, quorum=panel.quorum, name=f"panel:{path.stem}")

    @property
    def name(self) -> str:
        """``panel:<file>``, or its rule and members."""
        return self._name

    @property
    def identity(self) -> str:
        """Hash of the members' identities, in any order, the rule and the quorum."""
        return content_hash({"panel": self._rule, "quorum": self._quorum, "members": sorted(judge.identity for judge in self._members)})

    @property
    def remote(self) -> bool:
        """Whether a member waits for somebody else's answer."""
        return any(_remote(judge) for judge in self._members)

    @property
    def members(self) -> tuple[Judge, ...]:
        """The judges that are asked."""
        return self._members

    def with_members(self, judges: Sequence[Judge]) -> "Panel":
        """Return a panel of other judges with the same rule, quorum and name."""
        return Panel(judges, self._rule, quorum=self._quorum, name=self._name)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order.

        Raises:
            Exception: whatever a member raised, once all others are finished, so that their verdicts are in the cache.
        """
        return self.judge_each(requests, lambda index, verdict: None)

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict`` for each request, one at a time, as its last member answers."""
        parts: list[dict[int, Verdict]] = [{} for _ in requests]
        verdicts: dict[int, Verdict] = {}
        lock = threading.Lock()

        def take(member: int, index: int, part: Verdict) -> None:
            with lock:
                parts[index][member] = part
                if len(parts[index]) == len(self._members) and index not in verdicts:
                    verdicts[index] = self._combine([parts[index][k] for k in range(len(self._members))])
                    on_verdict(index, verdicts[index])

        def ask(member: int) -> None:
            judge = self._members[member]
            if isinstance(judge, StreamingJudge):
                found = judge.judge_each(requests, lambda index, part: take(member, index, part))
            else:
                found = judge.judge(requests)
            for index, part in enumerate(found):
                take(member, index, part)

        remote = [k for k, judge in enumerate(self._members) if _in_thread(judge)]
        local = [k for k in range(len(self._members)) if k not in remote]

        def ask_local() -> None:
            for member in local:
                ask(member)

        _run([partial(ask, member) for member in remote], ask_local)
        return [verdicts[index] for index in range(len(requests))]

    def _combine(self, parts: Sequence[Verdict]) -> Verdict:
        return combine(parts, self._rule, quorum=self._quorum, judge=self._name)


def combine(parts: Sequence[Verdict], rule: Rule, *, quorum: int, judge: str) -> Verdict:
    """Return one verdict from those of a panel's members; see :class:`Panel`.

    Raises:
        JudgeError: when members score on different scales.
    """
    scored = [part for part in parts if part.score is not None]
    scales = {part.scale for part in scored}
    if len(scales) > 1:
        shown = ", ".join(f"{part.judge} {part.scale[0]:g} to {part.scale[1]:g}" for part in scored)
        raise JudgeError(f"{judge}: its members score on different scales ({shown}). Ask all of them the same question.")
    usages = [part.usage for part in parts if part.usage is not None]
    modes = {part.mode for part in parts}
    facts = {
        "judge": judge,
        "scale": scales.pop() if scales else parts[0].scale,
        "parts": tuple(parts),
        "usage": sum(usages, Usage()) if usages else None,
        "mode": modes.pop() if len(modes) == 1 else None,
        "cached": all(part.cached for part in parts),
        "explanation": "; ".join(f"{part.judge}: {'missing' if part.score is None else f'{part.score:g}'}" for part in parts),
    }
    if len(scored) < quorum:
        return Verdict(missing=_reason(parts, len(scored), quorum), **facts)
    scores = [part.score for part in scored if part.score is not None]
    choices = [part.choice for part in scored if part.choice is not None]
    if len(choices) < len(scored):
        return Verdict(score=_SCORE_BY[rule](scores), **facts)
    choice: Choice = commonest(choices) or "tie"
    sure = [part.confidence for part in scored if part.choice == choice]
    known = [value for value in sure if value is not None]
    return Verdict(
        score=_PREFERENCE_OF[choice] if rule == "majority" else _SCORE_BY[rule](scores),
        choice=choice,
        confidence=fmean(known) if known and len(known) == len(sure) else None,
        consistent=None if any(part.consistent is None for part in scored) else all(part.consistent for part in scored),
        **facts,
    )


def commonest(values: Iterable[Value]) -> Value | None:
    """Return the value that is there most often, None when several are."""
    ranked = Counter(values).most_common(2)
    return None if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]) else ranked[0][0]


def majority(scores: Sequence[float]) -> float:
    """Return the commonest of the scores, rounded to whole ones (halves to the even one); where several are commonest, the median of the scores."""
    found = commonest([float(round(score)) for score in scores])
    return median(scores) if found is None else found


_SCORE_BY: dict[Rule, Callable[[Sequence[float]], float]] = {"mean": fmean, "median": median, "majority": majority}


def _reason(parts: Sequence[Verdict], scored: int, quorum: int) -> str:
    """Return why there is no score; where all say the same, in their words, by which empty responses and refusals are counted."""
    reasons = [part.missing for part in parts if part.missing is not None]
    if not scored and len(set(reasons)) == 1:
        return reasons[0]
    said = "; ".join(f"{part.judge}: {part.missing}" for part in parts if part.missing is not None)
    return f"{scored} of {len(parts)} judges have a score, {quorum} are needed ({said})"


def _remote(judge: Judge) -> bool:
    return bool(getattr(judge, "remote", False))


def _in_thread(judge: Judge) -> bool:
    """Return whether a member may wait in a thread of its own; one that belongs to the caller's event loop (``bound_to_caller``) may not."""
    while (inner := getattr(judge, "inner", None)) is not None:
        judge = inner
    return _remote(judge) and not getattr(judge, "bound_to_caller", False)


def _run(remote: Sequence[Callable[[], None]], local: Callable[[], None]) -> None:
    """Run what waits in threads and what computes here, and raise the first problem when all have ended.

    The threads are daemons: Ctrl-C ends the process at once, and what members had finished by then is in their caches.
    """
    problems: list[BaseException] = []

    def kept(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as problem:  # it belongs to whoever asked the panel, and the other members go on
            problems.append(problem)

    threads = [threading.Thread(target=kept, args=(work,), name="panel member", daemon=True) for work in remote]
    for thread in threads:
        thread.start()
    kept(local)
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
