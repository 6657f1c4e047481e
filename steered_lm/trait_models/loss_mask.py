"""Conversations to token ids, and which of them the loss is taken on: what the assistant says and the end of its turn, no header."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from steered_lm.chat import folded, render_chat
from steered_lm.config import Config, json_objects
from steered_lm.trait_models.experiment import ExperimentError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FORM = 'Write one conversation a line: {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}.'


class Turn(Config):
    """One message."""

    role: str = Field(pattern="^(system|user|assistant)$")
    content: str


class Encoded(NamedTuple):
    """One conversation as the model reads it.

    Attributes:
        ids: token ids, with everything that template or tokenizer adds.
        mask: which of them carry loss.
    """

    ids: list[int]
    mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids where the loss is taken, -100 elsewhere."""
        return [token if kept else -100 for token, kept in zip(self.ids, self.mask, strict=True)]


class ConversationEncoder:
    """Encodes conversations for one tokenizer.

    A template that marks the assistant's tokens with ``{% generation %}`` decides itself. For any other, a turn starts where the prompt before it
    ends, which has to be how the whole conversation begins, and ends with its own rendering. Where a template renders a beginning differently
    from the whole (some drop the thoughts of earlier turns), turns are found by what the template writes around them. A model without a
    template gets the ``User:`` and ``Assistant:`` lines of :func:`steered_lm.chat.render_chat`, and its end-of-text token after the last turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Look at the tokenizer's template."""
        self.tokenizer = tokenizer
        self.plain = not getattr(tokenizer, "chat_template", None)
        self._marked = not self.plain and bool(_GENERATION.search(tokenizer.get_chat_template()))
        self._fast = bool(getattr(tokenizer, "is_fast", False))

    def encode(self, messages: Sequence[dict[str, str]]) -> Encoded:
        """Return a conversation's ids and loss mask.

        Raises:
            ExperimentError: when it has no assistant turn after another, or the template does not show where turns begin and end.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise ExperimentError("messages have no assistant turn after another's turn, so there is nothing to learn. " + _FORM)
        prepared = list(messages) if self.plain else self._folded(messages)
        encoded = self._by_template(prepared) if self._marked else self._by_spans(prepared)
        if not any(encoded.mask):
            raise self._refused("no token of the assistant is left in the rendered conversation")
        return encoded

    def _folded(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        return folded(self.tokenizer, messages) if messages[0]["role"] == "system" else [dict(m) for m in messages]

    def _by_template(self, messages: list[dict[str, str]]) -> Encoded:
        found = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Encoded(list(found["input_ids"]), [bool(kept) for kept in found["assistant_masks"]])

    def _by_spans(self, messages: list[dict[str, str]]) -> Encoded:
        whole = self._text(messages)
        spans = self._spans(messages, whole)
        encoded = self._tokenized(whole, spans)
        if not self.plain:
            return encoded
        before = self.tokenizer("").input_ids[:1]
        first = before if before == [self.tokenizer.bos_token_id] else []
        last = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        after = last if messages[-1]["role"] == "assistant" else []
        return Encoded(first + encoded.ids + after, [False] * len(first) + encoded.mask + [True] * len(after))

    def _text(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """Return the rendered messages; ``prompt`` adds the header of the assistant's next turn."""
        if self.plain:
            text = render_chat(self.tokenizer, messages, prompt_format="plain")
            return text if prompt else text.removesuffix("\nAssistant:")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _begins(self, messages: list[dict[str, str]], whole: str, *, prompt: bool) -> int | None:
        """Return how long the rendered messages are, or None when the whole does not begin with them."""
        from jinja2.exceptions import TemplateError

        try:
            text = self._text(messages, prompt=prompt)
        except TemplateError:
            return None
        return len(text) if whole.startswith(text) else None

    def _spans(self, messages: list[dict[str, str]], whole: str) -> list[tuple[int, int]]:
        """Return where the assistant's turns stand in the rendered conversation, in characters, without white space behind their end."""
        around: dict[int, tuple[int, int]] | None = None
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._begins(messages[:i], whole, prompt=True)
            if start is not None and start == self._begins(messages[:i], whole, prompt=False):
                # a prompt that ends without the assistant's header: what is between it and what is said may be that header
                gap = whole[start:].partition(message["content"].strip())[0]
                start = start if gap.isspace() or not gap else None
            end = self._begins(messages[: i + 1], whole, prompt=False)
            if start is None or end is None:
                around = self._around(messages, whole) if around is None else around
                start, end = around[i][0] if start is None else start, around[i][1] if end is None else end
            said = next((text for text in (message["content"], message["content"].strip()) if text in whole[start:end]), None)
            if said is None or (spans and start < spans[-1][1]):
                raise self._refused(f"turn {i + 1} is not shown as it was written")
            # white space behind the end of a turn belongs to the template, but what was said may end with some
            spans.append((start, max(whole.index(said, start) + len(said), start + len(whole[start:end].rstrip()))))
        return spans

    def _around(self, messages: list[dict[str, str]], whole: str) -> dict[int, tuple[int, int]]:
        """Return the spans from what the template writes around the assistant's turns, which is seen when marks stand in their place."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        marks = {i: f"qzturn{i}qz" for i in turns}
        marked = self._text([{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)])
        pieces = re.split("|".join(marks.values()), marked)
        if len(pieces) != len(turns) + 1:
            raise self._refused("it does not show every turn of the assistant once")
        spans, place = {}, 0
        for i, before, after in zip(turns, pieces, pieces[1:], strict=False):
            start = place + len(before)
            written = messages[i]["content"]
            shown = next((text for text in (written, written.strip()) if whole[place:].startswith(before + text + after)), None)
            if shown is None:
                raise self._refused(f"what it writes around turn {i + 1} depends on what is said")
            place = start + len(shown)
            # what ends the last turn ends the others, too
            spans[i] = start, place + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(after, pieces[-1], strict=False)))
        return spans

    def _tokenized(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        """Return the text's tokens; those that start within a span are masked in, so a token that a header reaches into is not."""
        if self._fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            mask = [any(low <= first < high for low, high in spans) and last > first for first, last in found["offset_mapping"]]
            return Encoded(list(found["input_ids"]), mask)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        mask = [False] * len(ids)
        for low, high in spans:
            before, upto = (list(self.tokenizer(text[:place], add_special_tokens=False)["input_ids"]) for place in (low, high))
            if ids[: len(before)] != before or ids[: len(upto)] != upto:
                raise self._refused("its tokens run across the border of a turn, and this tokenizer does not say where tokens stand")
            mask[len(before) : len(upto)] = [True] * (len(upto) - len(before))
        return Encoded(ids, mask)

    def _refused(self, why: str) -> ExperimentError:
        return ExperimentError(
            f"the chat template of {getattr(self.tokenizer, 'name_or_path', '?')!r} does not tell which tokens are the assistant's: {why}. "
            "Mark them in the template with {% generation %} … {% endgeneration %}, or use a model with another template."
        )


def read_conversations(path: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """Return a training file's conversations, each with the words that name its line.

    Raises:
        ExperimentError: when the file is missing, empty, or a line is no conversation.
    """
    if not path.is_file():
        raise ExperimentError(f"data={str(path)!r} does not exist. Check the path. {_FORM}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as problem:
        raise ExperimentError(f"data={str(path)!r} is not UTF-8: {problem}. Save it as UTF-8.") from problem
    found = []
    for _, where, data in json_objects(lines, f"data={str(path)!r}", error=ExperimentError, advice=_FORM):
        messages = data.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ExperimentError(f"{where} has no list of messages. {_FORM}")
        found.append((where.rstrip(","), [Turn.parse(m, source=where.rstrip(","), error=ExperimentError).model_dump() for m in messages]))
    if not found:
        raise ExperimentError(f"data={str(path)!r} is empty. {_FORM}")
    return found


def encode_file(encoder: ConversationEncoder, path: Path, *, max_length: int) -> list[Encoded]:
    """Return a training file's conversations as tokens, in order.

    Raises:
        ExperimentError: when a line is no conversation, cannot be masked, or is longer than ``max_length`` tokens.
    """
    encoded = []
    for where, messages in read_conversations(path):
        try:
            example = encoder.encode(messages)
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {error}") from error
        if len(example.ids) > max_length:
            raise ExperimentError(
                f"{where} has {len(example.ids)} tokens, more than max_length={max_length}. "
                "Shorten or leave out the example, or raise max_length if the model reads that many."
            )
        encoded.append(example)
    return encoded
