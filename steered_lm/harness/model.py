"""``steered-hf``: lm-eval's ``hf`` model type with steering, per model or per request."""

import inspect
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from time import perf_counter
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessorList

from steered_lm.chat import Message, PromptFormat, render_chat
from steered_lm.content import resolve_model
from steered_lm.errors import ModelError, near_misses
from steered_lm.harness.requests import MODEL, candidate_name, chat_messages, own_spec
from steered_lm.harness.rows import FiniteScores, Row, Scored, ScoredRow, in_order, mergeable, pad
from steered_lm.steering.compile import Layout
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import spec_from_args

logger = logging.getLogger(__name__)


@register_model("steered-hf")
class SteeredHFLM(HFLM):
    """The ``hf`` model type, steered. Requests may carry their own spec (``harness.requests``); all others get the model's.

    Attributes:
        spec: the spec of every request that brings none of its own; None is the unsteered model.
        steerer: the hooks; ``steerer.tokens`` says how many tokens each steered block's hook has changed.
        quiet: whether progress bars are left out.
        seconds: time spent answering requests.
    """

    logits_cache: bool

    def __init__(
        self,
        pretrained: Any,
        *,
        steering: str | None = None,
        vectors: str | None = None,
        layer: int | str | None = None,
        layers: Sequence[int] | str | None = None,
        weights: Mapping[str, float] | str | None = None,
        alpha: float | None = None,
        unit: str | None = None,
        positions: str | None = None,
        operation: str | None = None,
        blocks: str | None = None,
        allow_foreign_vectors: bool = False,
        prompt_format: PromptFormat = "chat",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model and attach its steering.

        Args:
            pretrained: Hub id, folder, ``steered-lm/tiny-chat``, or a model that is already built.
            steering: a spec file; instead of it the inline form, which starts with ``vectors``.
            vectors: a trait-vectors file.
            layer: the 0-indexed decoder block whose output is steered.
            layers: several of them: ``3;4``.
            weights: weight by trait name: ``formality:1;emotional_tone:-0.5``.
            alpha: strength, 1 when left out.
            unit: ``residual`` (alpha is a share of the stream's own size, when left out) or ``raw``.
            positions: ``response`` (when left out), ``prompt`` or ``all``.
            operation: ``add`` (when left out), ``ablate`` or ``clamp``.
            blocks: dotted path of the decoder blocks when their structure misleads.
            allow_foreign_vectors: take vectors that were built on another model of the same shape.
            prompt_format: how chat-marked requests are rendered: ``chat`` (the model's template) or ``plain`` (for base models).
            device: ``cuda`` where there is one, else ``cpu``, when left out.
            kwargs: everything that lm-eval's ``hf`` takes.

        Raises:
            ModelError: for an unknown ``prompt_format``, an argument that looks like a misspelt one of ours, an encoder-decoder.
            SpecError, VectorsError: when the steering does not fit the model.
        """
        if prompt_format not in get_args(PromptFormat):
            raise ModelError(f"prompt_format={prompt_format!r} is not known. {near_misses(str(prompt_format), get_args(PromptFormat))}")
        _refuse_misspelt(kwargs)
        inline = {"vectors": vectors, "layer": layer, "layers": layers, "weights": weights}
        self.spec = spec_from_args(steering, {**inline, "alpha": alpha, "unit": unit, "positions": positions, "operation": operation})
        self.prompt_format = prompt_format
        self.quiet = False
        self.seconds = 0.0
        self._rows: list[Row] | None = None
        self._queue: deque[ScoredRow] | None = None
        self._window_row: Row | None = None
        if isinstance(pretrained, str):
            pretrained = resolve_model(pretrained)
            if not torch.cuda.is_available() and str(device or "cuda").startswith("cuda"):
                device = "cpu"  # the command line asks for cuda:0 when it is told nothing
            device = device or "cuda"
        super().__init__(pretrained, device=device, **kwargs)
        self._render = lru_cache(maxsize=8192)(self._render_once)
        self.steerer = Steerer(self.model, blocks=blocks, allow_foreign=allow_foreign_vectors)
        self.steerer.compile(self.spec)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise ModelError(
                f"steered-hf takes decoder-only (causal) models; this one is loaded as {self.backend!r}. Use --model hf for it, unsteered."
            )

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse lm-eval's response cache, which is keyed by the request alone and would return another steering's answers.

        Raises:
            ModelError: when the hook belongs to a cache.
        """
        if cache_hook.dbdict is not None:
            raise ModelError(
                "use_cache cannot be used with steered-hf: lm-eval's cache ignores the steering and returns stale answers. Leave use_cache out."
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """Return what goes into the results file: lm-eval's facts, the spec, and how many tokens each block's hook has changed."""
        facts = {"prompt_format": self.prompt_format, "steered_tokens": dict(self.steerer.tokens)}
        spec = None if self.spec is None else {"digest": self.spec.digest, **self.spec.model_dump(mode="json")}
        return {**super().get_model_info(), "steering": spec, **facts}

    # -- requests -------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return one continuation a request, each steered by its own spec or the model's."""
        with self._answering(requests):
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm or self.quiet))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each continuation, each request steered by its own spec or the model's."""
        with self._answering(requests):
            return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.quiet))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text; every token of it counts as response.

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
        with self._answering(requests):
            for indices in groups.values():
                self._window_row = self._row(requests[indices[0]].args[0])
                part = super().loglikelihood_rolling([requests[i] for i in indices], disable_tqdm=disable_tqdm or self.quiet)
                for index, value in zip(indices, part, strict=True):
                    found[index] = value
        return found

    @contextmanager
    def _answering(self, requests: Sequence[Instance]) -> Iterator[None]:
        if self.batch_size == "auto" and any(own_spec(request.args[0]) is not MODEL for request in requests):
            raise ModelError("batch_size='auto' cannot be used when requests carry their own steering. Set batch_size to a number, such as 16.")
        started = perf_counter()
        try:
            yield
        finally:
            self._rows, self._queue, self._window_row = None, None, None
            self.seconds += perf_counter() - started

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
        if chat_messages(context) is None:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        prompt = self.rendered(context)
        if self.prompt_format == "plain" and not continuation[:1].isspace():
            continuation = f" {continuation}"
        head = self.tok_encode(context)
        whole = list(super().tok_encode(prompt + continuation, add_special_tokens=self._template_specials))
        if whole[: len(head)] == head and len(whole) > len(head):
            return head, whole[len(head) :]
        # The tokenizer merges across the border: score what the model would have to write after the prompt that it is given.
        return head, list(super().tok_encode(continuation, add_special_tokens=False))

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
            _refuse_nan(rows[int(watch.broken.nonzero()[0]) * len(rows) // len(watch.broken)], "next-token scores")
        return written

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        # Its dummy batches are no requests: they run with idle hooks, and leave the rows that wait for theirs alone.
        waiting, self._queue = self._queue, None
        try:
            return int(super()._detect_batch_size(requests, pos))
        finally:
            self._queue = waiting

    def _loglikelihood_tokens(self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
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
                _refuse_nan(row.row, "log-likelihoods")
        return found

    def _scored_row(self, request: Scored) -> ScoredRow:
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


def _refuse_nan(row: Row, what: str) -> None:
    whose = "the steered model" if row.candidate is None else f"candidate {row.candidate!r}"
    raise ModelError(f"{whose} gave NaN {what}: the steering drives the activations out of range. Use a smaller alpha, or dtype=float32.")


def _refuse_misspelt(kwargs: Mapping[str, Any]) -> None:
    theirs = set(inspect.signature(HFLM.__init__).parameters)
    ours = set(inspect.signature(SteeredHFLM.__init__).parameters) - theirs - {"self", "kwargs"}
    for name in set(kwargs) - theirs:
        if close := get_close_matches(name, ours, n=1, cutoff=0.8):
            raise ModelError(f"{name}={kwargs[name]!r} is not an argument of steered-hf. Did you mean {close[0]!r}? Ours: {', '.join(sorted(ours))}.")
