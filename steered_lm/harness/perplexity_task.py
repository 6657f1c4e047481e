"""``steered_perplexity``: how well a steered model predicts a text, by rolling log-likelihood."""

from collections.abc import Mapping, Sequence
from typing import Any

from steered_lm.errors import UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.rolling import TokenLikelihood
from steered_lm.measure.texts import PerplexityOptions, sizes


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
        return [{"id": number, "text": text} for number, text in enumerate(self.options.documents(), start=1)]


def perplexity_metrics(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return one document's (log-likelihood, number of words, bytes or tokens), as lm-eval's aggregations take them.

    Words and bytes are counted as lm-eval counts them. Tokens are known where the model type says how many there were: ``steered-hf`` does.
    """
    (value,) = results
    number, size = float(value), sizes(str(doc["text"]))
    found = {"word_perplexity": (number, size.words), "byte_perplexity": (number, size.bytes), "bits_per_byte": (number, size.bytes)}
    return found | ({"token_perplexity": (number, value.tokens)} if isinstance(value, TokenLikelihood) else {})
