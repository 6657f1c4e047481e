"""``steered_perplexity``: how well a steered model predicts a text, by rolling log-likelihood."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.rolling import TokenLikelihood
from steered_lm.measure.texts import ENGLISH, Split, read_documents, text_file


class PerplexityOptions(Config):
    """What ``--metadata`` chooses.

    Attributes:
        text: a text file, JSONL with ``text`` in each line, or a text of ours: ``english``, ``tiny_talk``.
        split: where a document of a text file ends: ``paragraph``, ``line`` or ``file``.
    """

    text: str = ENGLISH
    split: Split = "paragraph"


class PerplexityTask(ChatTask):
    """The task behind ``steered_perplexity.yaml``: one document a paragraph, predicted from its first token on."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the options.

        Raises:
            UserError: when they are malformed, or several repeats are asked for.
        """
        metadata = dict(config["metadata"])
        given = {key: metadata[key] for key in PerplexityOptions.model_fields if metadata.get(key) is not None}
        self.options = PerplexityOptions.parse(given, source="--metadata of steered_perplexity")
        if config.get("repeats", 1) != 1:
            raise UserError(f"repeats={config['repeats']} is not allowed: a text has one log-likelihood. Leave repeats out.")
        super().__init__({**config, "metadata": metadata | self.options.model_dump()})

    def documents(self) -> list[dict[str, Any]]:
        """Return the text's documents.

        Raises:
            UserError: when the file is missing or holds no text.
        """
        found = read_documents(text_file(self.options.text), self.options.split)
        return [{"id": number, "text": text} for number, text in enumerate(found, start=1)]


def perplexity_metrics(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return one document's (log-likelihood, number of words, bytes or tokens), as lm-eval's aggregations take them.

    Words and bytes are counted as lm-eval counts them. Tokens are known where the model type says how many there were: ``steered-hf`` does.
    """
    (value,) = results
    text = str(doc["text"])
    number, size = float(value), len(text.encode("utf-8"))
    found = {"word_perplexity": (number, len(re.split(r"\s+", text))), "byte_perplexity": (number, size), "bits_per_byte": (number, size)}
    return found | ({"token_perplexity": (number, value.tokens)} if isinstance(value, TokenLikelihood) else {})
