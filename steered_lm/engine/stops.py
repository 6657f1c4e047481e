"""When a row's text is complete: an end token, a stop string, or its length."""

from collections.abc import Sequence
from typing import Any

from steered_lm.engine.rows import Ended, GenerationRow


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the tokens' text without special tokens."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_ids(checkpoint: Any, *others: int | None) -> list[int]:
    """Return the tokens that end a row: those of the model's generation config, and ``others``."""
    listed = checkpoint.eos_token_id if isinstance(checkpoint.eos_token_id, list) else [checkpoint.eos_token_id]
    return sorted({token for token in (*listed, *others) if token is not None})


class Stops:
    """Says after each token whether its row has ended.

    A stop string is looked for in the text of the last few tokens: a token stands for one byte at least, so the string lies within as many
    tokens as it has bytes, and a few more give the tokenizer its context.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        """Watch for ``end_ids`` and the rows' own stop strings."""
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._tails: dict[tuple[str, ...], int] = {}

    def ended(self, row: GenerationRow, tokens: Sequence[int]) -> Ended | None:
        """Return why the row ends after ``tokens``, None when it goes on."""
        if tokens[-1] in self._end_ids:
            return "stop"
        if row.stop:
            if row.stop not in self._tails:
                self._tails[row.stop] = max(len(stop.encode()) for stop in row.stop) + 4
            # special tokens count here: a stop string may be one
            text = self._tokenizer.decode(tokens[-self._tails[row.stop] :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if any(stop in text for stop in row.stop):
                return "stop"
        return "length" if len(tokens) >= row.max_new_tokens else None
