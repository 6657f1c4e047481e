"""A model of Inspect's as judge: the model role ``grader``, or any model by its name in Inspect."""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Self

import anyio
from anyio import from_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatMessage,
    ChatMessageSystem,
    ChatMessageUser,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    ResponseSchema,
    get_model,
    model_roles,
)
from inspect_ai.util import JSONSchema, LimitExceededError

from steered_lm.config import Config, content_hash
from steered_lm.errors import JudgeError, UserError
from steered_lm.judges.answers import SPLIT, TOP, UNPARSABLE, Answer, Reading, read
from steered_lm.judges.base import EMPTY, JudgeRequest, Mode, OnVerdict, Usage, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.redact import Key

GRADER = "grader"
"""The model role that judges."""

_MODES: tuple[Mode, ...] = ("logprobs", "json", "text")
_FIRST_TOKENS = 4  # of an answer that is read from its first token: enough to see that a score goes on
_REFUSED = (400, 404, 415, 422, 501)  # what an endpoint answers to a request that it does not take
# settings that say how a model is reached, not what it answers
_TRANSPORT = {"max_retries", "timeout", "attempt_timeout", "max_connections", "adaptive_connections", "batch", "cache"}


class InspectOptions(Config):
    """How a model of Inspect's judges.

    Attributes:
        model: its name in Inspect, such as ``openai/gpt-5-mini``; None is the model role ``grader``.
        mode: how its answers are read: ``logprobs``, ``json``, ``text``, or ``auto`` for the first of them that it takes.
    """

    model: str | None = None
    mode: Mode | Literal["auto"] = "auto"


class InspectJudge:
    """Asks a model of Inspect's one question about each response.

    Inside a running evaluation await :meth:`grade`; :meth:`judge` is for everywhere else, and works inside too. With ``mode=auto`` the first answer
    decides for all: log-probabilities where the provider gives them for whole scores, else JSON under a schema, else text. An answer that is not
    exactly of the asked form is missing.
    """

    remote = True
    bound_to_caller = True  # a panel asks it in the calling thread, which alone reaches the evaluation's event loop and model roles

    def __init__(self, question: Question, options: InspectOptions) -> None:
        """Prepare to ask.

        Raises:
            JudgeError: when Inspect does not know the model, or cannot use it.
        """
        self._question, self._options = question, options
        self._settled = None if options.mode == "auto" else options.mode
        self._probing = anyio.Lock()
        if options.model is not None:
            self._model()

    @classmethod
    def for_question(cls, question: Question, **options: Any) -> Self:
        """Return a judge of one question; ``options`` are the fields of :class:`InspectOptions`."""
        return cls(question, InspectOptions.parse(options, source="judge inspect", error=JudgeError))

    @property
    def name(self) -> str:
        """``inspect:<model>``, or ``grader:<model>`` for the model role."""
        if self._options.model is not None:
            return f"inspect:{self._options.model}"
        return f"grader:{self._model()}" if GRADER in model_roles() else GRADER

    @property
    def facts(self) -> dict[str, str]:
        """What a cache notes beside the verdicts, for people."""
        return {"model": self.name.partition(":")[2], **self._question.facts}

    @property
    def identity(self) -> str:
        """SHA-256 of question, model, endpoint, generation settings and the mode asked for.

        Raises:
            JudgeError: when the model role is asked for and there is none.
        """
        model = self._model()
        settings = model.config.model_dump(mode="json", exclude_none=True, exclude=_TRANSPORT)
        endpoint = model.api.base_url or ""
        asked = {"model": str(model), "endpoint": endpoint, "settings": settings, "arguments": _plain(model.model_args), "mode": self._options.mode}
        return content_hash({"judge": "inspect", "question": self._question.digest, **asked})

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order.

        Raises:
            JudgeError: when the model role is asked for and there is none.
        """
        return self.judge_each(requests, lambda index, verdict: None)

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict(index, verdict)`` as each arrives, from another thread."""
        self._model()  # so that what is wrong with it is said here
        return _run(lambda: self._grade_all(requests, on_verdict))

    async def _grade_all(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        found: dict[int, Verdict] = {}
        problems: list[Exception] = []

        async def one(index: int, request: JudgeRequest) -> None:
            try:
                found[index] = await self.grade(request)
                on_verdict(index, found[index])
            except Exception as error:  # raised below as it is: a task group would wrap it
                problems.append(error)
                group.cancel_scope.cancel()

        # Inspect itself bounds the calls in flight
        async with anyio.create_task_group() as group:
            for index, request in enumerate(requests):
                group.start_soon(one, index, request)
        if problems:
            raise problems[0]
        return [found[index] for index in range(len(requests))]

    async def grade(self, request: JudgeRequest) -> Verdict:
        """Return the verdict on one response; a call that fails is missing with the reason, never a number.

        Raises:
            UserError, LimitExceededError: when the call is refused for what the user set up, or a limit of the evaluation is reached.
        """
        if not request.response.strip():
            return Verdict(missing=EMPTY, judge=self.name, scale=self._question.bounds)
        if self._settled is None:
            async with self._probing:
                if self._settled is None:
                    return await self._probe(request)
        mode = self._settled
        assert mode is not None
        tried = await self._try(request, mode, last=True)
        return self._verdict(tried, tried.usage)

    async def _probe(self, request: JudgeRequest) -> Verdict:
        """Ask in one mode after the other until the model takes one, which is then every request's."""
        spent = Usage()
        for mode in _MODES:
            tried = await self._try(request, mode, last=mode == _MODES[-1])
            spent += tried.usage
            if tried.outcome != "refused":
                self._settled = mode if tried.outcome == "answered" else None
                break
        return self._verdict(tried, spent)

    def _verdict(self, tried: "_Tried", usage: Usage) -> Verdict:
        return tried.reading.verdict(self._question.rubric, self.name, tried.mode, usage)

    async def _try(self, request: JudgeRequest, mode: Mode, *, last: bool) -> "_Tried":
        model, rubric = self._model(), self._question.rubric
        messages: list[ChatMessage] = [
            ChatMessageSystem(content=self._question.system(token=mode == "logprobs")),
            ChatMessageUser(content=self._question.user(request)),
        ]
        try:
            output = await model.generate(messages, config=_settings(model, mode, rubric.answer_schema))
        except LimitExceededError:
            raise
        except (UserError, PrerequisiteError) as error:
            if not last:
                return _Tried(mode, Reading(None, "the request was refused"), "refused")
            if isinstance(error, UserError):
                raise
            raise JudgeError(f"judge {self.name}: {error}") from error
        except Exception as error:  # providers raise what their client raises; after Inspect's own retries the verdict is missing
            reason = f"the grader's call failed: {type(error).__name__}: {_redacted(str(error))}"[:300]
            return _Tried(mode, Reading(None, reason), "refused" if _is_refusal(error) else "unclear", Usage(requests=1))
        answer = _answer(output)
        reading = read(rubric, answer, mode)
        usage = answer.usage or Usage()
        if answer.refused:
            return _Tried(mode, reading, "unclear", usage)
        if mode == "logprobs" and (not answer.top or reading.missing == SPLIT):
            return _Tried(mode, reading, "refused", usage)
        if mode == "json" and self._options.mode == "auto" and reading.missing == UNPARSABLE:
            mode, reading = "text", read(rubric, answer, "text")  # most providers let a schema that they do not know pass unseen
        return _Tried(mode, reading, "answered", usage)

    def _model(self) -> Model:
        if self._options.model is None:
            if GRADER not in model_roles():
                raise JudgeError(
                    f"judge=inspect asks the model role {GRADER}, and there is none here. Give --model-role {GRADER}=<model> to Inspect, or name a "
                    "model: judge=inspect:<model>, such as inspect:openai/gpt-5-mini."
                )
            return get_model(role=GRADER)
        try:
            return get_model(self._options.model)
        except UserError:
            raise
        except (PrerequisiteError, ValueError, ImportError) as error:
            problem = str(getattr(error, "message", error))
            raise JudgeError(f"judge=inspect:{self._options.model} cannot be used: {problem} Write inspect:<provider>/<model>.") from error

    def __repr__(self) -> str:
        """Show the model's name."""
        return f"InspectJudge(model={self._options.model!r}, mode={self._options.mode!r})"


class _Tried(NamedTuple):
    """What came of asking in one mode: ``answered``; ``refused`` when the model does not take the mode; ``unclear`` when that could not be seen."""

    mode: Mode
    reading: Reading
    outcome: Literal["answered", "refused", "unclear"]
    usage: Usage = Usage()


def _settings(model: Model, mode: Mode, schema: Mapping[str, Any]) -> GenerateConfig:
    asked: dict[str, Any] = {"temperature": 0.0} if model.config.temperature is None else {}
    if mode == "logprobs":
        asked |= {"logprobs": True, "top_logprobs": TOP, "max_tokens": _FIRST_TOKENS}
    elif mode == "json":
        asked["response_schema"] = ResponseSchema(name="verdict", json_schema=JSONSchema.model_validate(schema), strict=True)
    return GenerateConfig(**asked)


def _answer(output: ModelOutput) -> Answer:
    """Return what a model said, as our readers take it."""
    usage = Usage(requests=1)
    if output.usage is not None:
        usage = Usage(requests=1, input_tokens=output.usage.input_tokens, output_tokens=output.usage.output_tokens)
    if output.empty:
        return Answer("", usage=usage)
    choice = output.choices[0]
    first = choice.logprobs.content[0] if choice.logprobs is not None and choice.logprobs.content else None
    top = None if first is None or not first.top_logprobs else [(one.token, one.logprob) for one in first.top_logprobs]
    cut = "length" if choice.stop_reason in ("max_tokens", "model_length") else None
    content = choice.message.content
    declined = not isinstance(content, str) and any(isinstance(part, ContentText) and part.refusal for part in content)
    return Answer(_redacted(output.completion), top, declined or choice.stop_reason == "content_filter", cut, usage)


def _is_refusal(error: Exception) -> bool:
    """Return whether a provider does not take such a request at all, so that another form of it may fare better."""
    status = getattr(error, "status_code", None)
    # not the kinds of ValueError that a garbled response gives
    return status in _REFUSED if status is not None else type(error) is ValueError or isinstance(error, (TypeError, NotImplementedError))


def _redacted(text: str) -> str:
    """Return text without the environment's keys, should a provider or a model repeat one."""
    secrets = (value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET|PASSWORD", name))
    for secret in sorted(secrets, key=len, reverse=True):
        text = Key(secret).redacted(text)
    return text


def _plain(value: Any) -> Any:
    """Return model arguments as JSON; of an object only its type is kept, as it has no content to compare."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _run(start: Callable[[], Coroutine[Any, Any, list[Verdict]]]) -> list[Verdict]:
    """Run a coroutine to its end: in the evaluation's event loop when a worker thread of it asks, else in a loop of our own."""
    try:
        from_thread.check_cancelled()
    except RuntimeError:  # no such thread
        future = asyncio.run_coroutine_threadsafe(start(), _loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: what was judged is handed over already
            raise
    return from_thread.run(start)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return a loop that runs in a thread of its own for as long as the process does: the clients of providers are bound to one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="inspect-judge", daemon=True).start()
    return loop
