"""Contexts that travel through lm-eval as strings and carry what else belongs to the request: its steering and its chat messages."""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Self

from lm_eval.api.instance import Instance

from steered_lm.chat import Message
from steered_lm.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steered_lm.search.protocol import Candidate


class Unset(Enum):
    """Says that a request brings no steering of its own; an enum member stays itself through ``deepcopy``."""

    MODEL = "the model's own spec"


MODEL: Final = Unset.MODEL


class CandidateStr(str):
    """A context that is steered by its own spec; in every other respect the string that it is.

    lm-eval sorts, groups and batches it like any string. A model type that does not know it reads the plain text.

    Attributes:
        spec: the spec of this request, None for unsteered, ``MODEL`` for whatever the model was set up with.
        candidate: the candidate's name, for error messages; None without one.
    """

    spec: SteeringSpec | Unset | None
    candidate: str | None

    def __new__(cls, text: str = "", *, spec: SteeringSpec | Unset | None = MODEL, candidate: str | None = None) -> Self:
        """Mark ``text``."""
        made = super().__new__(cls, text)
        made.spec, made.candidate = spec, candidate
        return made


class ChatStr(CandidateStr):
    """A chat-marked context: its messages are rendered by the model type ``steered-hf``; for any other type it is the plain text.

    Attributes:
        messages: the turns up to where the assistant's reply starts.
    """

    messages: tuple[Message, ...]

    def __new__(
        cls, text: str = "", *, messages: Sequence[Message] = (), spec: SteeringSpec | Unset | None = MODEL, candidate: str | None = None
    ) -> Self:
        """Mark ``text``, which is what a model type that does not render messages reads."""
        made = super().__new__(cls, text, spec=spec, candidate=candidate)
        made.messages = tuple(dict(message) for message in messages)
        return made


def own_spec(text: str) -> SteeringSpec | Unset | None:
    """Return the spec that a context carries, ``MODEL`` when it carries none."""
    return text.spec if isinstance(text, CandidateStr) else MODEL


def chat_messages(text: str) -> tuple[Message, ...] | None:
    """Return the messages of a chat-marked context, None for any other string."""
    return text.messages if isinstance(text, ChatStr) else None


def candidate_name(text: Any) -> str | None:
    """Return the name of the candidate that a context belongs to, if it belongs to one."""
    return text.candidate if isinstance(text, CandidateStr) else None


def for_candidate(context: str, candidate: "Candidate") -> CandidateStr:
    """Return the context with the candidate's spec and, where it has one, its system turn in front.

    Plain text gets the system turn as text, as lm-eval's ``--system_instruction`` does without a chat template.
    """
    messages = chat_messages(context)
    if messages is None:
        text = context if candidate.system is None else f"{candidate.system}\n\n{context}"
        return CandidateStr(text, spec=candidate.spec, candidate=candidate.name)
    if candidate.system is None:
        return ChatStr(context, messages=messages, spec=candidate.spec, candidate=candidate.name)
    system = {"role": "system", "content": candidate.system}
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return ChatStr(f"{candidate.system}\n\n{context}", messages=(system, *rest), spec=candidate.spec, candidate=candidate.name)


def for_candidates(instances: Sequence[Instance], candidates: Sequence["Candidate"]) -> list[Instance]:
    """Return every instance once per candidate: candidate by candidate, ``idx`` counting on, each with its own empty responses."""
    expanded: list[Instance] = []
    for candidate in candidates:
        for instance in instances:
            context, *rest = instance.args
            arguments = (for_candidate(context, candidate), *rest)
            expanded.append(replace(instance, arguments=arguments, idx=len(expanded), resps=[], filtered_resps={}))
    return expanded
