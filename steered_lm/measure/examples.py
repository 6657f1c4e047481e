"""Prompts with responses from files: training data, saved samples, logs."""

from pathlib import Path
from typing import Any

from pydantic import Field

from steered_lm.chat import PromptFormat, render_chat
from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.judges.samples import SavedSample, read_samples
from steered_lm.measure.texts import read_objects, read_text

_WHAT = (
    'Allowed: JSONL with prompt and response (and system) in each line, or with messages: [{"role": …, "content": …}, …] that end with the '
    "assistant's, or lm-eval's samples_*.jsonl."
)


class Turn(Config):
    """One message."""

    role: str = Field(pattern="^(system|user|assistant)$")
    content: str


class Example(Config):
    """A conversation up to where the assistant answers, and the answer.

    Attributes:
        id: names it in results.
        turns: everything before the response.
        response: the assistant's last turn; may be empty.
        score: a verdict that the file holds about the response.
    """

    id: str
    turns: tuple[Turn, ...] = Field(min_length=1)
    response: str
    score: float | None = None

    @property
    def prompt(self) -> str:
        """The last turn before the response."""
        return self.turns[-1].content


def prompted_by(example: Example, system: str) -> Example:
    """Return the example with a system turn, in place of its own where it has one."""
    rest = example.turns[1:] if example.turns[0].role == "system" else example.turns
    return example.model_copy(update={"turns": (Turn(role="system", content=system), *rest)})


def rendered(example: Example, tokenizer: Any, prompt_format: PromptFormat = "chat") -> str:
    """Return the prompt as the model reads it, up to where the response starts."""
    return render_chat(tokenizer, [turn.model_dump() for turn in example.turns], prompt_format=prompt_format)


def holds_examples(path: Path) -> bool:
    """Return whether a file is JSONL with responses, rather than a text or JSONL of texts."""
    if path.suffix != ".jsonl":
        return False
    found = read_objects(path, read_text(path))
    return bool(found) and "text" not in found[0][1]


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a file, in order.

    Raises:
        UserError: when it is missing, empty, or a line is none of the forms that are allowed.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} {'is no file' if path.exists() else 'does not exist'}. {_WHAT}")
    lines = read_objects(path, read_text(path))
    if not lines:
        raise UserError(f"{str(path)!r} is empty. {_WHAT}")
    if {"doc", "resps"} <= lines[0][1].keys():
        return [of_sample(sample) for sample in read_samples(path)]
    found = [_of_line(data, where, number) for number, (where, data) in enumerate(lines, start=1)]
    names = [example.id for example in found]
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None:
        raise UserError(f"{str(path)!r} has id {repeated!r} more than once. Give each line its own, or none.")
    return found


def of_sample(sample: SavedSample) -> Example:
    """Return a sample of a harness's log as an example; its score is persona fit, or how strongly it shows the trait."""
    verdict = sample.old or sample.trait
    turns = sample.turns or (("user", sample.request.prompt),)
    return Example(
        id=f"{sample.id}:{sample.repeat}" if sample.repeat else sample.id,
        turns=tuple(Turn(role=role, content=content) for role, content in turns),
        response=sample.request.response,
        score=None if verdict is None else verdict.score,
    )


def _of_line(data: dict[str, Any], where: str, number: int) -> Example:
    name = str(data.get("id", number)) + (f":{data['repeat']}" if data.get("repeat") else "")
    if "messages" in data:
        turns, response = _split_messages(data["messages"], where)
    elif isinstance(data.get("prompt"), str) and isinstance(data.get("response"), str):
        turns = [{"role": "system", "content": data["system"]}] if data.get("system") else []
        turns, response = [*turns, {"role": "user", "content": data["prompt"]}], data["response"]
    else:
        raise UserError(f"{where} has neither prompt and response nor messages; it has {', '.join(sorted(data)) or 'nothing'}. {_WHAT}")
    verdict = data.get("verdict")
    score = verdict.get("score") if isinstance(verdict, dict) else data.get("score")
    return Example.parse({"id": name, "turns": turns, "response": response, "score": score}, source=where.rstrip(","))


def _split_messages(messages: Any, where: str) -> tuple[list[Any], str]:
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UserError(f"{where} has messages that do not end with the assistant's text after at least one other turn. {_WHAT}")
    return messages[:-1], last["content"]
