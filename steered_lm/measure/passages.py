"""Texts and replies as tokens, and the windows in which a model reads what is too long for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steered_lm.chat import PromptFormat
from steered_lm.errors import SpecError, UserError
from steered_lm.measure.examples import Example, holds_examples, prompted_by, read_examples, rendered
from steered_lm.measure.texts import Split, read_documents
from steered_lm.steering.spec import SteeringSpec

Tokens = tuple[int, ...]


class Passage(NamedTuple):
    """Tokens to predict, and what stands before them.

    Attributes:
        name: names it in results.
        context: ids before the first predicted token, at least one: the beginning-of-text token, or a rendered prompt.
        tokens: ids to predict, at least one.
        prompted: whether the context is a prompt. All of a plain text counts as response.
    """

    name: str
    context: Tokens
    tokens: Tokens
    prompted: bool = False


class Window(NamedTuple):
    """A part of a passage that the model reads at once.

    Attributes:
        name: the passage's, with ``:1``, ``:2``, … from its second window on.
        context: ids before the first predicted token.
        tokens: ids to predict.
        response_start: number of leading tokens that are prompt.
    """

    name: str
    context: Tokens
    tokens: Tokens
    response_start: int


def text_passages(documents: Sequence[str], tokenizer: Any, prefix: int) -> list[Passage]:
    """Return documents as passages that begin after the token ``prefix``; those without a token are left out."""
    encoded = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in documents]
    return [Passage(str(number), (prefix,), tokens) for number, tokens in enumerate(encoded, start=1) if tokens]


def reply_passages(examples: Sequence[Example], tokenizer: Any, prompt_format: PromptFormat = "chat", *, system: str | None = None) -> list[Passage]:
    """Return replies as passages after their rendered prompts; empty replies are left out. A ``system`` turn takes the place of an example's own."""
    found = []
    for example in examples:
        asked = example if system is None else prompted_by(example, system)
        prompt = tuple(tokenizer(rendered(asked, tokenizer, prompt_format), add_special_tokens=False).input_ids)
        tokens = tuple(tokenizer(example.response, add_special_tokens=False).input_ids)
        if tokens:
            found.append(Passage(example.id, prompt, tokens, prompted=True))
    return found


def read_passages(path: Path, tokenizer: Any, prefix: int, *, split: Split = "paragraph", prompt_format: PromptFormat = "chat") -> list[Passage]:
    """Return the passages of a file: a text, JSONL with ``text``, or JSONL with prompts and responses (see ``measure.examples``).

    Raises:
        UserError: when the file cannot be read as such, or nothing in it has a token.
    """
    if holds_examples(path):
        found = reply_passages(read_examples(path), tokenizer, prompt_format)
    else:
        found = text_passages(read_documents(path, split), tokenizer, prefix)
    if not found:
        raise UserError(f"text={str(path)!r} has no token to predict. Give a file with text in it.")
    return found


def windows(passages: Sequence[Passage], length: int, overlap: int = 1) -> list[Window]:
    """Return the windows of passages; each token is predicted in exactly one of them.

    The first window predicts as many tokens as fit, each later one the next ``length - overlap + 1``, with all the tokens before them that fit as
    context. With ``overlap=1`` these are the windows of lm-eval's rolling log-likelihood; more overlap gives every token more
    context, and takes about ``length / (length - overlap + 1)`` times the work.

    Args:
        passages: what to cut.
        length: most tokens that the model reads at once.
        overlap: least number of tokens before a predicted one, but at a text's beginning; 1 to ``length``.

    Raises:
        UserError: when ``overlap`` is out of range, or a reply does not fit together with its prompt.
    """
    if not 1 <= overlap <= length:
        raise UserError(f"overlap={overlap} is out of range. Allowed: 1 to the window's {length} tokens.")
    found = []
    for passage in passages:
        if passage.prompted and len(passage.context) + len(passage.tokens) - 1 > length:
            size = len(passage.context) + len(passage.tokens)
            raise UserError(
                f"item {passage.name!r} has {size} tokens, prompt and response together; the window takes {length}. Shorten or leave it out."
            )
        start = len(passage.context) if passage.prompted else 0
        for number, (context, tokens) in enumerate(_cut(passage, length, overlap)):
            found.append(Window(f"{passage.name}:{number}" if number else passage.name, context, tokens, start))
    return found


def _cut(passage: Passage, length: int, overlap: int) -> list[tuple[Tokens, Tokens]]:
    tokens = passage.tokens
    done = min(length - len(passage.context) + 1, len(tokens))
    found = [(passage.context, tokens[:done])]
    while done < len(tokens):
        end = min(done + length - overlap + 1, len(tokens))
        found.append((tokens[end - length - 1 : done], tokens[done:end]))
        done = end
    return found


def refuse_idle(specs: Sequence[SteeringSpec | None], passages: Sequence[Passage]) -> None:
    """Refuse specs that steer prompts only where there are none: their results would silently be the unsteered model's.

    Raises:
        SpecError: when there is such a spec.
    """
    if any(passage.prompted for passage in passages):
        return
    for spec in specs:
        sites = [] if spec is None else spec.resolved()
        if sites and all(site.positions == "prompt" for site in sites):
            raise SpecError(
                "positions='prompt' steers nothing in a plain text, all of which counts as response. Give JSONL with prompts and responses."
            )
