"""The reference path: lm-eval's own ``hf`` methods, with steering hooks switched row by row."""

import logging
import warnings
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jaxtyping import Float, Int
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessorList

from steered_lm.chat import Message, PromptFormat, render_chat
from steered_lm.engine.encoding import chat_pair
from steered_lm.errors import ModelError, NaNError
from steered_lm.harness.requests import MODEL, candidate_name, chat_messages, own_spec
from steered_lm.harness.rows import FiniteScores, Row, ScoredRow, TokenRequest, in_order, mergeable, pad
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec

logger = logging.getLogger(__name__)


class ReferenceHFLM(HFLM):
    """lm-eval's ``hf`` model type with steering by request, everything else as it is upstream.

    Requests travel as strings that carry their spec and their chat messages (``harness.requests``); this class turns them into tokens and
    keeps track of which row of lm-eval's batches belongs to which.

    Attributes:
        spec: the spec of every request that brings none of its own; None is the unsteered model.
        steerer: the hooks.
        prompt_format: how chat-marked requests are rendered.
        quiet: whether progress bars are left out.
    """

    logits_cache: bool
    steerer: Steerer

    def __init__(self, pretrained: Any, *, spec: SteeringSpec | None, prompt_format: PromptFormat, **kwargs: Any) -> None:
        """Load the model; ``steerer`` is attached by whoever knows its options."""
        self.spec, self.prompt_format, self.quiet = spec, prompt_format, False
        self._rows: list[Row] | None = None
        self._queue: deque[ScoredRow] | None = None
        self._window_row: Row | None = None
        super().__init__(pretrained, **kwargs)
        self._render = lru_cache(maxsize=8192)(self._render_once)
        self._pairs = lru_cache(maxsize=65536)(self._pair_once)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # PEFT's own use of transformers
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            super()._create_model(*args, **kwargs)

    def _row(self, context: Any) -> Row:
        spec = own_spec(context)
        return Row(self.spec if spec is MODEL else spec, candidate_name(context))

    # -- text to tokens -------------------------------------------------------------------------------------------------------

    def _render_once(self, messages: tuple[tuple[tuple[str, str], ...], ...]) -> str:
        turns: list[Message] = [dict(turn) for turn in messages]
        return render_chat(self.tokenizer, turns, prompt_format=self.prompt_format, **self.chat_template_args)

    def rendered(self, context: str) -> str:
        """Return a chat-marked context as the prompt that the model sees; any other string as it is.

        Raises:
            ModelError: when the tokenizer has no chat template and ``prompt_format`` is ``chat``.
        """
        messages = chat_messages(context)
        return context if messages is None else self._render(tuple(tuple(message.items()) for message in messages))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; a chat-marked string is rendered, and its template brings its own special tokens."""
        if chat_messages(string) is not None:
            string, add_special_tokens = self.rendered(string), self._template_specials
        return list(super().tok_encode(string, add_special_tokens=add_special_tokens, left_truncate_len=left_truncate_len, **kwargs))

    @property
    def _template_specials(self) -> bool | None:
        # A template's text already begins with BOS where the model wants one; plain lines are text like any other.
        return False if self.prompt_format == "chat" else None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        messages = chat_messages(context)
        head, tail = self._pairs(context, None if messages is None else self.rendered(context), continuation)
        return list(head), list(tail)

    def _pair_once(self, context: str, rendered: str | None, continuation: str) -> tuple[list[int], list[int]]:
        if chat_messages(context) is None:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        head, tail = chat_pair(self._plain_tokens, self.rendered(context), continuation, self.prompt_format)
        return list(head), list(tail)

    def _plain_tokens(self, text: str, add_special_tokens: bool | None) -> list[int]:
        return list(super().tok_encode(text, add_special_tokens=add_special_tokens))

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
        """Return token ids and mask, row ``i`` for ``strings[i]``, and remember what steers each row."""
        self._rows = [self._row(string) for string in strings]
        if all(chat_messages(string) is None for string in strings):
            ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, left_truncate_len=left_truncate_len, truncation=truncation)
            return ids, mask
        limit = min(left_truncate_len or self.max_length, self.max_length)
        rows = [self.tok_encode(string) for string in strings]
        longest = max(map(len, rows))
        if longest > limit:
            logger.warning("a prompt of %d tokens is longer than the %d that fit; its beginning is cut off", longest, limit)
        return pad([row[-limit:] for row in rows], self.tokenizer.pad_token_id, padding_side)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, spec by spec; every token of it counts as response.

        Raises:
            ModelError: when requests with different specs meet on several processes.
        """
        groups: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            row = self._row(request.args[0])
            groups.setdefault(row.spec.digest if row.acts and row.spec else None, []).append(index)
        if len(groups) > 1 and self.world_size > 1:
            raise ModelError(
                f"{len(groups)} specs in one rolling log-likelihood run cannot be shared among {self.world_size} processes. Use one process."
            )
        found = [0.0] * len(requests)
        for indices in groups.values():
            self._window_row = self._row(requests[indices[0]].args[0])
            part = super().loglikelihood_rolling([requests[i] for i in indices], disable_tqdm=disable_tqdm or self.quiet)
            for index, value in zip(indices, part, strict=True):
                found[index] = value
        return found

    # -- forward passes -------------------------------------------------------------------------------------------------------

    def _model_generate(self, context: Int[Tensor, "rows width"], max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        rows, self._rows = self._rows or [Row(self.spec)] * len(context), None
        written: Tensor
        if not any(row.acts for row in rows):
            written = super()._model_generate(context, max_length, stop, **generation_kwargs)
            return written
        watch = FiniteScores()
        with self.steerer.batch([row.spec for row in rows], Layout.generation(generation_kwargs["attention_mask"])):
            processors = LogitsProcessorList([watch])
            written = super()._model_generate(context, max_length, stop, logits_processor=processors, **generation_kwargs)
        if watch.broken is not None and bool(watch.broken.any()):
            refuse_nan(rows[int(watch.broken.nonzero()[0]) * len(rows) // len(watch.broken)], "next-token scores")
        return written

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        # Its dummy batches are no requests: they run with idle hooks, and leave the rows that wait for theirs alone.
        waiting, self._queue = self._queue, None
        try:
            return int(super()._detect_batch_size(requests, pos))
        finally:
            self._queue = waiting

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows = [self._scored_row(request) for request in requests]
        kept: bool = self.logits_cache
        merge = kept and mergeable(rows)
        if any(row.row.acts for row in rows):
            self._queue = deque(in_order(rows, requests, merge=merge))
        self.logits_cache = merge
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm or self.quiet, override_bs=override_bs
            )
            assert not self._queue, "lm-eval left rows out"
        finally:
            self.logits_cache, self._queue = kept, None
        for row, (value, _) in zip(rows, found, strict=True):
            if value != value and row.row.acts:
                refuse_nan(row.row, "log-likelihoods")
        return found

    def _scored_row(self, request: TokenRequest) -> ScoredRow:
        strings, context, continuation = request
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        if strings is None:
            assert self._window_row is not None
            return ScoredRow(self._window_row, tokens, context=0)
        return ScoredRow(self._row(strings[0]), tokens, context=len(tokens) + 1 - len(continuation))

    def _model_call(self, inps: Int[Tensor, "rows width"], *args: Any, **kwargs: Any) -> Float[Tensor, "rows width vocab"]:
        logits: Tensor
        if self._queue is None:
            logits = super()._model_call(inps, *args, **kwargs)
            return logits
        rows = [self._queue.popleft() for _ in range(len(inps))]
        # lm-eval chooses the order of rows; that ours is the same is worth a look at every batch.
        assert all(given[: len(row.tokens)] == row.tokens for given, row in zip(inps.tolist(), rows, strict=True)), "rows out of order"
        layout = Layout.scored([row.context for row in rows], [len(row.tokens) for row in rows])
        with self.steerer.batch([row.row.spec for row in rows], layout):
            logits = super()._model_call(inps, *args, **kwargs)
        return logits


def refuse_nan(row: Row, what: str) -> None:
    """Say that a row's steering broke the model.

    Raises:
        NaNError: always.
    """
    whose = "the steered model" if row.candidate is None else f"candidate {row.candidate!r}"
    raise NaNError(f"{whose} gave NaN {what}: the steering drives the activations out of range. Use a smaller alpha, or dtype=float32.")
