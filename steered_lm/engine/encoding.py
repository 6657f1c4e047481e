"""Texts as tokens to score, as lm-eval's ``hf`` model type encodes them, so that both harnesses score the same ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from steered_lm.chat import PromptFormat
from steered_lm.errors import ModelError

Tokens = tuple[int, ...]
Encode = Callable[[str, bool | None], Sequence[int]]
"""Maps a text to its ids; the second argument says whether special tokens are added, None leaves it to the tokenizer."""
# what lm-eval takes for a model that does not say how much it reads
_LENGTH = 2048
# what transformers gives as a tokenizer's ``model_max_length`` when nobody set one
_UNSET = int(1e30)


class Pair(NamedTuple):
    """A context's tokens and those whose log-likelihood is asked for."""

    context: Tokens
    continuation: Tokens


class Encoder:
    """A model's texts as tokens.

    Attributes:
        prefix: the token before a text that nothing stands before: the beginning-of-text token, else the end token.
        max_length: most tokens that the model reads.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        """Prepare to encode.

        Args:
            tokenizer: the model's.
            config: the model's, which says how many tokens it reads.
        """
        self._tokenizer = tokenizer
        self._prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.max_length = _longest(tokenizer, config)

    @property
    def prefix(self) -> int:
        """The token before a text.

        Raises:
            ModelError: when the tokenizer has neither a beginning nor an end token.
        """
        if self._prefix is None:
            raise ModelError(
                "the tokenizer has neither a beginning-of-text nor an end token, one of which log-likelihoods start from. Set one in it."
            )
        return int(self._prefix)

    def encode(self, text: str, special: bool | None = None) -> Tokens:
        """Return a text's tokens, with the special ones that the tokenizer adds unless the text begins with them already."""
        if special is None and text.startswith(self._tokenizer.decode(self.prefix)):
            special = False
        return tuple(self._tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special})))

    def pair(self, context: str, continuation: str) -> Pair:
        """Return a plain context and what follows it; white space at the context's end belongs to what follows."""
        if not context:
            tokens = self.encode(continuation, special=False)
            return Pair(tokens[:1], tokens[1:]) if tokens[:1] == (self.prefix,) else Pair((self.prefix,), tokens)
        head = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(head)
        return Pair(before, whole[len(before) :])

    def chat_pair(self, prompt: str, continuation: str, prompt_format: PromptFormat) -> Pair:
        """Return a rendered conversation and a reply to it."""
        return chat_pair(self.encode, prompt, continuation, prompt_format)


def chat_pair(encode: Encode, prompt: str, continuation: str, prompt_format: PromptFormat) -> Pair:
    """Return a rendered conversation and a reply to it as tokens.

    Args:
        encode: the model's way of encoding plain text.
        prompt: the conversation, up to where the reply starts.
        continuation: the reply.
        prompt_format: how the prompt was rendered. A template's text already begins with a beginning-of-text token where the model wants one;
            plain lines are text like any other, and a space comes before the reply.
    """
    special = False if prompt_format == "chat" else None
    if prompt_format == "plain" and not continuation[:1].isspace():
        continuation = f" {continuation}"
    head, whole = tuple(encode(prompt, special)), tuple(encode(prompt + continuation, special))
    if whole[: len(head)] == head and len(whole) > len(head):
        return Pair(head, whole[len(head) :])
    # The tokenizer merges across the border: score what the model would have to write after the prompt that it is given.
    return Pair(head, tuple(encode(continuation, False)))


def _longest(tokenizer: Any, config: Any) -> int:
    own = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(own, name, None)) is not None:
            return int(value)
    value = getattr(tokenizer, "model_max_length", None)
    return _LENGTH if value is None or int(value) == _UNSET else int(value)
