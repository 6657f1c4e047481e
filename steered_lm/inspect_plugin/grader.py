"""The model role ``grader`` as judge: our rubric asked of a model of Inspect's, and its answer read as a score or as missing."""

import json
from typing import Any

from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig, Model
from inspect_ai.util import LimitExceededError

from steered_lm.errors import UserError
from steered_lm.judges.base import SCALE, JudgeRequest, Verdict
from steered_lm.judges.rubric import Rubric


async def grade(grader: Model, persona: str, request: JudgeRequest) -> Verdict:
    """Return the grader's verdict on one response.

    A call that fails and an answer that holds no whole score of the scale are missing with the reason, never a number.

    Args:
        grader: the model to ask.
        persona: the persona's judge prompt.
        request: the response, and the prompt as its context.

    Raises:
        UserError, LimitExceededError: when the call is refused for what the user set up, or a limit of the evaluation is reached.
    """
    name = f"grader:{grader}"
    if not request.response.strip():
        return Verdict(missing="empty response", judge=name)
    material = json.dumps({"message": request.prompt, "reply": request.response}, ensure_ascii=False)
    messages: list[ChatMessage] = [ChatMessageSystem(content=Rubric.load().system_prompt(persona)), ChatMessageUser(content=material)]
    config = GenerateConfig(temperature=0.0) if grader.config.temperature is None else GenerateConfig()
    try:
        output = await grader.generate(messages, config=config)
    except (UserError, LimitExceededError):
        raise
    except Exception as error:  # providers raise what their client raises; after Inspect's own retries the verdict is missing
        return Verdict(missing=f"the grader's call failed: {type(error).__name__}: {error}"[:300], judge=name)
    score = read_score(output.completion)
    if score is None:
        return Verdict(missing=f"no score in the grader's answer {output.completion[:120]!r}", explanation=output.completion, judge=name)
    return Verdict(score=score, explanation=output.completion, judge=name)


def read_score(text: str) -> float | None:
    """Return the ``score`` of the last JSON object in ``text`` that has one; None when it is not a whole number of the scale."""
    decoder, start = json.JSONDecoder(), text.find("{")
    found: Any = None
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            end = start + 1
        else:
            found = value["score"] if isinstance(value, dict) and "score" in value else found
        start = text.find("{", end)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not float(found).is_integer():
        return None
    return float(found) if SCALE[0] <= found <= SCALE[1] else None
