"""Inspect's logs, read back to be judged or measured again."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from inspect_ai.log import EvalSample, read_eval_log, read_eval_log_samples
from inspect_ai.model import ChatMessage
from inspect_ai.scorer import Score, value_to_float

from steered_lm.errors import JudgeError
from steered_lm.inspect_plugin.likelihoods import LOGLIKELIHOODS
from steered_lm.judges.base import SCALE, JudgeRequest, Verdict
from steered_lm.judges.samples import SavedSample, document_references, trait_verdict

_PERSONA_FIT = "persona_fit"
_as_float = value_to_float()


def read_log(path: Path, *, prompt_field: str | None = None) -> list[SavedSample]:
    """Return the samples of an Inspect log (``.eval`` or ``.json``), one an epoch, in the order of the log.

    Args:
        path: the log.
        prompt_field: the key of a sample's metadata that holds the prompt; by default the prompt is the sample's input, of several messages the last
            one of the user.

    Raises:
        JudgeError: when the log cannot be read, has no samples, is of a task by log-likelihood, or a sample lacks the field.
    """
    try:
        kind: Literal["eval", "json"] = "eval" if zipfile.is_zipfile(path) else "json"
        header = read_eval_log(path, header_only=True, format=kind)
        # long texts are kept as attachments, which "core" puts back into input and output
        found = read_eval_log_samples(path, all_samples_required=False, resolve_attachments="core", format=kind, exclude_fields={"events", "store"})
        samples = [_sample(path, sample, prompt_field) for sample in found]
    except (ValueError, KeyError, OSError) as problem:
        if isinstance(problem, JudgeError):
            raise
        raise JudgeError(f"{str(path)!r} cannot be read as a log of Inspect's: {type(problem).__name__}: {problem}.") from problem
    if not samples:
        raise JudgeError(f"{str(path)!r} holds no samples (task {header.eval.task}, status {header.status}). Leave this file out.")
    return samples


def _sample(path: Path, sample: EvalSample, prompt_field: str | None) -> SavedSample:
    if LOGLIKELIHOODS in (sample.output.metadata or {}):
        raise JudgeError(
            f"{str(path)!r}, sample {sample.id!r}, holds log-likelihoods and no text: only samples of tasks that generate can be judged. "
            "Leave this file out."
        )
    metadata = sample.metadata or {}
    prompt = _prompt(sample.input) if prompt_field is None else metadata.get(prompt_field)
    if not isinstance(prompt, str):
        texts = ", ".join(sorted(name for name, value in metadata.items() if isinstance(value, str))) or "none"
        raise JudgeError(f"{str(path)!r}, sample {sample.id!r}: --prompt-field {prompt_field!r} is no text of its metadata. Its texts: {texts}.")
    scores = sample.scores or {}
    old = next((verdict for score in scores.values() if (verdict := _own_verdict(score)) is not None), None)
    return SavedSample(
        file=str(path),
        id=str(sample.id),
        repeat=sample.epoch - 1,
        request=JudgeRequest(prompt=prompt, response=sample.output.completion.strip(), **document_references(metadata)),
        old=old,
        old_scores={} if old is not None else _numbers(scores),
        turns=_turns(sample),
        trait=next((verdict for score in scores.values() if (verdict := trait_verdict(score.metadata or {})) is not None), None),
    )


def _turns(sample: EvalSample) -> tuple[tuple[str, str], ...]:
    """Return the turns that the model answered; none where the conversation does not end with its answer, or a tool spoke."""
    messages = sample.messages
    if len(messages) < 2 or messages[-1].role != "assistant" or any(message.role == "tool" for message in messages):
        return ()
    return tuple((message.role, message.text) for message in messages[:-1])


def _prompt(given: str | list[ChatMessage]) -> str:
    """Return the sample's input as text: of several messages the last one of the user, as Inspect's own ``input_text``."""
    if isinstance(given, str):
        return given
    return next((message.text for message in reversed(given) if message.role == "user"), "")


def _own_verdict(score: Score) -> Verdict | None:
    """Return the verdict that the task ``persona_judge`` logs; None when this is another scorer's score."""
    facts = score.metadata or {}
    if not isinstance(score.value, dict) or _PERSONA_FIT not in score.value or "judge" not in facts:
        return None
    fit = score.value[_PERSONA_FIT]
    if not isinstance(fit, (int, float)) or math.isnan(fit):
        return Verdict(missing=facts.get("missing") or score.explanation or "missing", judge=str(facts["judge"]))
    return Verdict(score=float(fit), scale=SCALE, explanation=score.explanation or "", judge=str(facts["judge"]))


def _numbers(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return scores as numbers by scorer, and by scorer and name for those with several; ``C`` is 1 and ``I`` 0, and texts are left out."""
    found: dict[str, Any] = {}
    for scorer, score in scores.items():
        values = {f"{scorer}/{name}": value for name, value in score.value.items()} if isinstance(score.value, dict) else {scorer: score.value}
        found |= {name: value if isinstance(value, (int, float)) else _letter(value) for name, value in values.items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _letter(value: object) -> float | None:
    return _as_float(value) if isinstance(value, str) and value in ("C", "I", "P") else None
