"""Chat JSONL, one conversation a line, checked whole before anything is trained on it."""

from typing import Any

from steered_lm.config import json_objects
from steered_lm.trait_models.experiment import ExperimentError

Message = dict[str, str]
Conversation = tuple[Message, ...]

ROLES = ("assistant", "system", "user")
FORM = 'Write one conversation a line: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'


def read_chat(data: bytes, source: str) -> tuple[Conversation, ...]:
    """Return the conversations of a file's bytes, in the order of its lines; empty lines are passed over.

    A conversation may start with a system turn; user and assistant turns alternate after it, from a user's to an assistant's. Keys beside
    ``messages`` are ignored, for published files carry some. Keys of a message beside ``role`` and ``content`` are refused: they would change what a
    service trains on (``weight``), or hold what is said elsewhere than in the content (``tool_calls``).

    Args:
        data: UTF-8, with or without a byte order mark.
        source: names the file in messages, such as ``training data 'x.jsonl'``.

    Raises:
        ExperimentError: for the first line that is not like that, with its number; or when there is no conversation at all.
    """
    # not splitlines: U+2028 and its like may stand within a JSON string
    lines = _text(data, source).split("\n")
    found = tuple(_conversation(row, where) for _, where, row in json_objects(lines, source, error=ExperimentError, advice=FORM))
    if not found:
        raise ExperimentError(f"{source} is empty. {FORM}")
    return found


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        # the decoder counts from behind the byte order mark
        line = problem.object.count(b"\n", 0, problem.start) + 1
        byte = problem.object[problem.start]
        raise ExperimentError(
            f"{source}, line {line}, is not UTF-8: byte 0x{byte:02x} cannot stand there. Save the file as UTF-8, for example with iconv."
        ) from problem


def _conversation(row: dict[str, Any], where: str) -> Conversation:
    if "messages" not in row:
        raise ExperimentError(f"{where} has no 'messages', only {', '.join(map(repr, row)) or 'nothing'}. {FORM}")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ExperimentError(f"{where} has messages that are no list of turns: {messages!r:.80}. {FORM}")
    turns = tuple(_message(message, f"{where} message {number}") for number, message in enumerate(messages, start=1))
    _check_order([turn["role"] for turn in turns], where)
    return turns


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ExperimentError(f"{where}, is no object: {message!r:.80}. {FORM}")
    for key in ("role", "content"):
        if key not in message:
            raise ExperimentError(f"{where}, has no {key!r}. {FORM}")
    more = sorted(set(message) - {"role", "content"})
    if more:
        raise ExperimentError(f"{where}, has the key {more[0]!r}, which training would pass over. Allowed: role, content. Take it out.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ExperimentError(f"{where}, has the role {role!r}. Allowed: {', '.join(ROLES)}. Rename it, or take the line out.")
    if not isinstance(content, str) or not content.strip():
        raise ExperimentError(f"{where}, a turn of the {role}, has the content {content!r:.80}. It must be text that is not empty.")
    try:
        content.encode()
    except UnicodeEncodeError as problem:
        raise ExperimentError(
            f"{where}, holds half a character, {content[problem.start]!a}. Write both halves of the escape, or the character itself."
        ) from problem
    return {"role": role, "content": content}


def _check_order(roles: list[str], where: str) -> None:
    start = int(roles[0] == "system")
    if "assistant" not in roles:
        raise ExperimentError(f"{where} has no assistant turn, so there is nothing to learn. Add one, or take the line out.")
    for number, role in enumerate(roles[start:], start=start):
        expected = ("user", "assistant")[(number - start) % 2]
        if role == "system":
            raise ExperimentError(f"{where} message {number + 1}, is a system turn. There is at most one, and it comes first.")
        if role != expected:
            before = "nothing" if number == 0 else f"a turn of the {roles[number - 1]}"
            raise ExperimentError(
                f"{where} message {number + 1}, is a turn of the {role} after {before}; one of the {expected} belongs there. "
                "User and assistant take turns, and the user starts: join or reorder the turns, or take the line out."
            )
    if roles[-1] != "assistant":
        raise ExperimentError(f"{where} ends with a turn of the {roles[-1]}, which nothing answers. Add the answer, or take that turn out.")
