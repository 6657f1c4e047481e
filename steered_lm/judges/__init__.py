"""Judges: ``make_judge`` builds one by name, ``check_missing`` stops a run whose judge cannot be trusted. Light at import."""

import inspect
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steered_lm.errors import JudgeError, near_misses

if TYPE_CHECKING:
    from steered_lm.judges.base import Judge, Verdict
    from steered_lm.judges.question import Question
    from steered_lm.judges.rubric import Kind
    from steered_lm.persona.schema import Persona

__all__ = [
    "COMPUTED",
    "ENTRY_POINTS",
    "PANEL_SUFFIXES",
    "answers_kind",
    "check_missing",
    "judge_names",
    "judge_options",
    "make_judge",
    "takes_option",
    "why_missing",
]

ENTRY_POINTS = "steered_lm.judges"
PANEL_SUFFIXES = (".yaml", ".yml")
"""A judge's name that ends so is a panel's file."""
COMPUTED = ("markers", "stylometric")
"""Judges that compute and ask nobody: a command's options for endpoints are not meant for them."""
_SHOWN = 200  # characters of what an endpoint said
# used from a checkout, where no entry point is registered
_BUILT_IN = {
    "anthropic": "steered_lm.judges.anthropic:AnthropicJudge",
    "hf": "steered_lm.judges.hf:HFJudge",
    "inspect": "steered_lm.inspect_plugin.grader:InspectJudge",
    "markers": "steered_lm.judges.markers:MarkersJudge",
    "openai": "steered_lm.judges.openai:OpenAIJudge",
    "stylometric": "steered_lm.judges.stylometric:StylometricJudge",
}


def make_judge(name: str, subject: "Persona | Question", *, cache: Path | str | None = None, **options: Any) -> "Judge":
    """Return a judge of responses.

    A backend is a class with ``for_question(question, **options)``, registered in the entry-point group ``steered_lm.judges``.

    Args:
        name: a backend, or ``<backend>:<model>`` (the part after the colon becomes ``model=``): ``stylometric``, ``markers``,
            ``openai:<model>``, ``anthropic:<model>``, ``hf:<model>``, or a panel's YAML file (:mod:`steered_lm.judges.panel`).
        subject: what is asked: a question, or a persona for the question how well responses fit it.
        cache: a SQLite file that keeps scores between runs; None keeps none.
        options: further options of the backend, such as ``base_url`` and ``key_env`` of ``openai``.

    Raises:
        JudgeError: when the backend is unknown (with near misses), its options do not fit, or it cannot be built.
    """
    from steered_lm.judges.question import Question

    question = subject if isinstance(subject, Question) else Question.of_persona(subject)
    if name.endswith(PANEL_SUFFIXES):
        from steered_lm.judges.panel import Panel

        return Panel.of_file(Path(name), question, cache=cache, **options)  # members are cached, and asked in both orders, one by one
    backend, _, model = name.partition(":")
    loaded = _load_backend(name, backend)
    if model:
        options = {"model": model, **options}
    try:
        inspect.signature(loaded.for_question).bind(question, **options)
    except TypeError as problem:
        raise JudgeError(
            f"judge={name!r} does not take options {sorted(options)}: {problem}. Write for example stylometric or openai:<model>."
        ) from problem
    judge: Judge = loaded.for_question(question, **options)
    if cache is not None:
        from steered_lm.judges.cache import JudgeCache
        from steered_lm.judges.cached import CachedJudge

        judge = CachedJudge(judge, JudgeCache(Path(cache)))
    if question.kind == "pairwise":
        from steered_lm.judges.pairwise import BothOrders

        judge = BothOrders(judge)
    return judge


def judge_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the judge, which are written ``judge_<option>`` among a task's.

    Raises:
        JudgeError: when one of them is a key.
    """
    found = {name.removeprefix("judge_"): value for name, value in given.items() if name.startswith("judge_")}
    if any("api_key" in name for name in found):
        raise JudgeError("judge_api_key is not taken: options are written into results and logs. Set the key in the environment.")
    return found


def judge_names() -> list[str]:
    """Return the names of the backends that are installed."""
    return sorted(_registered())


def takes_option(name: str, option: str) -> bool:
    """Return whether the backend of a judge's name takes an option; one that has to look at its options first is said to take any."""
    backend = name.partition(":")[0]
    if backend not in _registered():
        return False
    parameters = inspect.signature(_load_backend(name, backend).for_question).parameters
    return option in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def answers_kind(name: str, kind: "Kind") -> bool:
    """Return whether a judge can be asked this kind of question: whatever its backend's ``kinds`` hold, or every kind where it has none.

    Panels and unknown names are said to answer: :func:`make_judge` tells what is wrong with them.
    """
    backend = name.partition(":")[0]
    kinds = getattr(_load_backend(name, backend), "kinds", None) if backend in _registered() else None
    return kinds is None or kind in kinds


def _registered() -> dict[str, str]:
    return _BUILT_IN | {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}


def _load_backend(name: str, backend: str) -> Any:
    targets = _registered()
    if backend not in targets:
        raise JudgeError(f"judge={name!r}: there is no judge {backend!r}. {near_misses(backend, targets)} Write stylometric or openai:<model>.")
    module, _, attribute = targets[backend].partition(":")
    return getattr(import_module(module), attribute)


def check_missing(verdicts: Sequence["Verdict"], limit: float = 0.2, *, findings: Collection[str] = ()) -> None:
    """Stop when too many verdicts are missing for the others to stand for all; ``findings`` are reasons that are no fault, such as refusals.

    Raises:
        JudgeError: when the missing share exceeds ``limit``; the message counts them and gives the commonest reasons, and what came in place of an
            answer.
    """
    if not 0 <= limit <= 1:
        raise JudgeError(f"missing limit={limit!r} is not a share. Allowed: 0 (none may be missing) to 1.")
    faults = [v for v in verdicts if v.missing is not None and v.missing not in findings]
    if faults and len(faults) / len(verdicts) > limit:
        raise JudgeError(
            f"{len(faults)} of {len(verdicts)} verdicts are missing ({len(faults) / len(verdicts):.0%}; limit {limit:.0%}). "
            f"Commonest reasons: {why_missing(faults)}. "
            "Mend the judge and start again: finished verdicts are in the cache, and a run goes on from its log."
        )


def why_missing(verdicts: Sequence["Verdict"]) -> str:
    """Return the commonest reasons, and what came in place of an answer, for example; empty when none is missing."""
    reasons = Counter(v.missing for v in verdicts if v.missing is not None).most_common(3)
    told = next((v.explanation for reason, _ in reasons for v in verdicts if v.missing == reason and v.explanation.strip()), None)
    common = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    return common if told is None else f"{common}. What came, for example: {' '.join(told.split())!r:.{_SHOWN}}"
