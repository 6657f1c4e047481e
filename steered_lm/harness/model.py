"""``steered-hf``: lm-eval's ``hf`` model type with steering, per model or per request."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from time import perf_counter
from typing import Any, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from steered_lm.chat import PromptFormat
from steered_lm.content import resolve_model
from steered_lm.engine import Engine, Generated, Scored, ScoreRequest
from steered_lm.engine.gemm import Gemm
from steered_lm.engine.memory import parse_size
from steered_lm.engine.stops import end_ids
from steered_lm.errors import ModelError, near_misses
from steered_lm.harness.generation import Settings, group_requests, row_seeds
from steered_lm.harness.reference import ReferenceHFLM, refuse_nan
from steered_lm.harness.requests import MODEL, candidate_name, chat_messages, own_spec
from steered_lm.harness.rolling import TokenLikelihood
from steered_lm.harness.rows import Row, TokenRequest
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import spec_from_args

logger = logging.getLogger(__name__)


@register_model("steered-hf")
class SteeredHFLM(ReferenceHFLM):
    """The ``hf`` model type, steered. Requests may carry their own spec (``harness.requests``); all others get the model's.

    Attributes:
        seconds: time spent answering requests.
        exact: whether the reference path is taken in place of the engine.
        engine: what runs the requests; its ``report`` says how long what took, and how much memory.
        answered: is told each generation request and its text as soon as it is complete, before the others are (not on the reference path).
    """

    softmax_dtype: torch.dtype | None

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
        exact: bool = False,
        memory_budget: str | float | None = None,
        gemm: Gemm = "auto",
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
            exact: take the reference path, lm-eval's own ``generate_until`` and ``loglikelihood`` with steering hooks: slower, and at weight zero
                equal to ``hf`` to the bit. Otherwise the engine runs (``steered_lm.engine``).
            memory_budget: what the engine may use beside the weights: GiB as a number, or text such as ``500MiB``; a share
                of what is free when left out.
            gemm: library of the engine's float32 linear layers on a CPU: ``auto`` (oneDNN where MKL is slow), ``torch`` or ``onednn``.
            device: ``cuda`` where there is one, else ``cpu``, when left out.
            kwargs: everything that lm-eval's ``hf`` takes. ``batch_size`` is the most rows that run at once, ``auto`` as many as fit.

        Raises:
            ModelError: for an unknown ``prompt_format``, an argument that looks like a misspelt one of ours, an encoder-decoder.
            SpecError, VectorsError: when the steering does not fit the model.
        """
        if prompt_format not in get_args(PromptFormat):
            raise ModelError(f"prompt_format={prompt_format!r} is not known. {near_misses(str(prompt_format), get_args(PromptFormat))}")
        if gemm not in get_args(Gemm):
            raise ModelError(f"gemm={gemm!r} is not known. {near_misses(str(gemm), get_args(Gemm))}")
        budget = parse_size(memory_budget)
        _refuse_misspelt(kwargs)
        inline = {"vectors": vectors, "layer": layer, "layers": layers, "weights": weights}
        spec = spec_from_args(steering, {**inline, "alpha": alpha, "unit": unit, "positions": positions, "operation": operation})
        self.exact = exact
        self.seconds = 0.0
        self.answered: Callable[[Instance, str], None] | None = None
        self._said: set[str] = set()
        if isinstance(pretrained, str):
            pretrained = resolve_model(pretrained)
            if not torch.cuda.is_available() and str(device or "cuda").startswith("cuda"):
                device = "cpu"  # the command line asks for cuda:0 when it is told nothing
            device = device or "cuda"
        super().__init__(pretrained, spec=spec, prompt_format=prompt_format, device=device, **kwargs)
        self.steerer = Steerer(self.model, blocks=blocks, allow_foreign=allow_foreign_vectors)
        self.steerer.compile(self.spec)
        self.engine = Engine(
            self.steerer,
            self.tokenizer,
            end_ids=end_ids(self.model.generation_config, self.eot_token_id),
            max_rows=None if self.batch_size == "auto" else int(self.batch_size),
            memory_budget=budget,
            gemm=gemm,
            softmax_dtype=self.softmax_dtype,
        )

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
        facts: dict[str, Any] = {"prompt_format": self.prompt_format, "steered_tokens": dict(self.steerer.tokens), "exact": self.exact}
        facts["engine"] = None if self.exact else self.engine.report.facts()
        spec = None if self.spec is None else {"digest": self.spec.digest, **self.spec.model_dump(mode="json")}
        return {**super().get_model_info(), "steering": spec, **facts}

    # -- requests -------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return one continuation a request, each steered by its own spec or the model's."""
        with self._answering(requests):
            if self._by_reference():
                return list(super().generate_until(requests, disable_tqdm=disable_tqdm or self.quiet))
            groups = group_requests(requests, self.max_gen_toks, self.model.generation_config)
            odd = [number for number, settings in enumerate(groups) if isinstance(settings, str)]
            found: dict[int, str] = {}
            if odd:
                self._say(f"{groups[odd[0]]}: {len(odd)} requests take the reference path")
                texts = super().generate_until([requests[number] for number in odd], disable_tqdm=disable_tqdm or self.quiet)
                found.update(zip(odd, texts, strict=True))
            self._generate(requests, {n: settings for n, settings in enumerate(groups) if isinstance(settings, Settings)}, found, disable_tqdm)
            return [found[number] for number in range(len(requests))]

    def _generate(self, requests: Sequence[Instance], settings: Mapping[int, Settings], found: dict[int, str], disable_tqdm: bool) -> None:
        numbers = list(settings)
        prompts = self._prompts([(requests[n].args[0], settings[n].max_new_tokens) for n in numbers])
        seeds = row_seeds([(prompt, candidate_name(requests[n].args[0])) for n, prompt in zip(numbers, prompts, strict=True)])
        eos = str(self.tok_decode([self.eot_token_id], skip_special_tokens=False))
        own = [self._row(requests[n].args[0]) for n in numbers]
        rows = [settings[n].row(prompt, row.spec, seed, without=eos) for n, prompt, row, seed in zip(numbers, prompts, own, seeds, strict=True)]
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.quiet or self.rank != 0, desc="Running generate_until requests")

        def done(place: int, generated: Generated) -> None:
            if generated.ended == "nan" and own[place].acts:
                refuse_nan(own[place], "next-token scores")
            number = numbers[place]
            found[number] = postprocess_generated_text(str(self.tok_decode(generated.tokens)), [*settings[number].until, eos], None)
            if self.answered is not None:
                self.answered(requests[number], found[number])
            bar.update()

        with bar, self._autocast():
            self.engine.generate(rows, done)

    def _prompts(self, contexts: Sequence[tuple[str, int]]) -> list[tuple[int, ...]]:
        """Return each context's tokens, cut at the beginning to leave room for as many new ones as it asks for."""
        groups: dict[int, dict[tuple[str, bool], str]] = {}
        for context, room in contexts:
            groups.setdefault(room, {})[self.rendered(context), chat_messages(context) is not None] = context
        tokens: dict[tuple[int, str, bool], tuple[int, ...]] = {}
        for room, distinct in groups.items():
            limit = self.max_length - room
            if limit <= 0:
                raise ModelError(f"max_gen_toks={room} leaves no room for a prompt: the model takes {self.max_length} tokens. Lower max_gen_toks.")
            ids, mask = self.tok_batch_encode(list(distinct.values()), left_truncate_len=limit, truncation=self.truncation)
            for key, row, real in zip(distinct, ids.tolist(), mask.tolist(), strict=True):
                tokens[room, *key] = tuple(token for token, kept in zip(row, real, strict=True) if kept) or (self.prefix_token_id,)
        self._rows = None
        return [tokens[room, self.rendered(context), chat_messages(context) is not None] for context, room in contexts]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each continuation, each request steered by its own spec or the model's."""
        with self._answering(requests):
            return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.quiet))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, which says how many tokens it is of; every token of it counts as response.

        Raises:
            ModelError: on the reference path, when requests with different specs meet on several processes.
        """
        with self._answering(requests):
            if self._by_reference():
                values = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
                sizes = [len(self.tok_encode(str(request.args[0]))) for request in requests]
                return [TokenLikelihood(value, size) for value, size in zip(values, sizes, strict=True)]
            windows = [(number, window) for number, request in enumerate(requests) for window in self._windows(str(request.args[0]))]
            rows = [self._row(requests[number].args[0]) for number, _ in windows]
            asked = [ScoreRequest(*window, row.spec, response_start=0) for (_, window), row in zip(windows, rows, strict=True)]
            found, sizes = [0.0] * len(requests), [0] * len(requests)
            for (number, (_, tokens)), (value, _) in zip(windows, self._scored(asked, rows, disable_tqdm), strict=True):
                found[number] += value
                sizes[number] += len(tokens)
            return [TokenLikelihood(value, size) for value, size in zip(found, sizes, strict=True)]

    def _windows(self, text: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        made = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
        return [(tuple(context), tuple(tokens)) for context, tokens in map(make_disjoint_window, made)]

    def _by_reference(self) -> bool:
        """Return whether requests go the reference way: asked for, or the model's parts only run on all processes together."""
        kind = str(getattr(getattr(self, "accelerator", None), "distributed_type", ""))
        return self.exact or self.think_end_token is not None or "FSDP" in kind or "DEEPSPEED" in kind

    def _say(self, notice: str) -> None:
        if notice not in self._said:
            self._said.add(notice)
            logger.warning(notice)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None)

    @contextmanager
    def _answering(self, requests: Sequence[Instance]) -> Iterator[None]:
        if self.exact and self.batch_size == "auto" and any(own_spec(request.args[0]) is not MODEL for request in requests):
            raise ModelError("batch_size='auto' cannot be used with exact=True when requests carry their own steering. Set batch_size to a number.")
        started = perf_counter()
        try:
            yield
        finally:
            self._rows, self._queue, self._window_row = None, None, None
            self.seconds += perf_counter() - started

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._by_reference():
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        rows = [Row(self.spec) if strings is None else self._row(strings[0]) for strings, _, _ in requests]
        asked = [ScoreRequest(tuple(context), tuple(tokens), row.spec) for (_, context, tokens), row in zip(requests, rows, strict=True)]
        return [(value, greedy) for value, greedy in self._scored(asked, rows, disable_tqdm)]

    def _scored(self, asked: Sequence[ScoreRequest], rows: Sequence[Row], disable_tqdm: bool) -> list[Scored]:
        bar = tqdm(total=len(asked), disable=disable_tqdm or self.quiet or self.rank != 0, desc="Running loglikelihood requests")

        def done(numbers: Sequence[int], scored: Sequence[Scored]) -> None:
            for number, (value, _) in zip(numbers, scored, strict=True):
                if value != value and rows[number].acts:
                    refuse_nan(rows[number], "log-likelihoods")
            bar.update(len(numbers))

        with bar, self._autocast():
            return self.engine.score(asked, max_length=self.max_length, done=done)


def _refuse_misspelt(kwargs: Mapping[str, Any]) -> None:
    theirs = set(inspect.signature(HFLM.__init__).parameters)
    ours = set(inspect.signature(SteeredHFLM.__init__).parameters) - theirs - {"self", "kwargs"}
    for name in set(kwargs) - theirs:
        if close := get_close_matches(name, ours, n=1, cutoff=0.8):
            raise ModelError(f"{name}={kwargs[name]!r} is not an argument of steered-hf. Did you mean {close[0]!r}? Ours: {', '.join(sorted(ours))}.")
