"""The model provider ``steered-hf``: any Hugging Face causal model, steered, with a batcher of its own."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelInfo,
    ModelOutput,
    ModelUsage,
    set_model_info,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from steered_lm.chat import render_chat
from steered_lm.config import content_hash, file_hash
from steered_lm.engine import Engine, GenerationRow, Sampling, ScoreRequest
from steered_lm.engine.encoding import Encoder
from steered_lm.engine.memory import parse_size
from steered_lm.errors import ModelError, SpecError
from steered_lm.inspect_plugin.batcher import Batcher
from steered_lm.inspect_plugin.generation import Replier, Reply, Request, StopReason, take_defaults
from steered_lm.inspect_plugin.likelihoods import Likelihood, LikelihoodRequest
from steered_lm.inspect_plugin.loading import ProviderOptions, load_model, load_tokenizer
from steered_lm.inspect_plugin.refusal import plain_refusals
from steered_lm.inspect_plugin.scoring import Scorer, Texts
from steered_lm.measure.passages import Passage, windows
from steered_lm.seeds import repeat_seed, row_seed
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import INLINE_KEYS, SteeringSpec, spec_from_args

_BASE_URL = "steered-hf:"
# With batch_size=auto: how many requests Inspect may have under way, and the largest batch, which is all that wait: the engine takes
# rows in as its memory budget allows, and gains nothing from more than this.
_AUTO_CONNECTIONS, _AUTO_ROWS = 64, 1024
_NOT_SUPPORTED = (
    "best_of",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "response_schema",
    "modalities",
    "batch",
)


class SteeredHFAPI(ModelAPI):
    """A steered Hugging Face model; see :class:`ProviderOptions` for the ``-M`` arguments.

    Generation is greedy unless a temperature above 0 is given. Sampled replies depend on the seed, the prompt and the choice's number
    alone; without a seed one is drawn and noted in the output's metadata. One request may be steered by another spec:
    ``GenerateConfig(extra_body={"steering": …})`` with a spec file, a mapping of the inline keys, or None for the unsteered model.

    Requests that are awaited at the same time form a batch, whatever their specs, lengths and sampling settings. A batch is closed: what
    arrives while it runs waits for its end. With ``batch_size=auto`` all that wait are taken, and the engine cuts them to its memory budget
    by itself, letting waiting rows take the places of finished ones.

    Attributes:
        engine: what generates and scores; ``engine.report`` says what ran.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's own signature; never changed
        **model_args: Any,
    ) -> None:
        """Load the model and check the steering against it.

        Raises:
            RefusalError: for an argument that is unknown or malformed, a model that cannot be loaded, a spec that does not fit it.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        with plain_refusals():
            if base_url is not None and not base_url.startswith(_BASE_URL):
                raise ModelError(f"base_url={base_url!r} is not taken: steered-hf runs the model itself. Leave --model-base-url out.")
            self.options = ProviderOptions.parse(model_args, source="what -M gives to steered-hf", error=ModelError)
            rows, budget = self.options.max_rows(), parse_size(self.options.memory_budget)
            self.spec = self.options.spec()
            self._spec_hash = file_hash(Path(self.options.steering).expanduser()) if self.options.steering else None
            self.tokenizer = load_tokenizer(self.options.tokenizer or model_name, self.options)
            self.model = load_model(model_name, self.options)
            self._defaults = take_defaults(self.model, self.tokenizer, exact=self.options.exact)
            self.steerer = Steerer(self.model, blocks=self.options.blocks, allow_foreign=self.options.allow_foreign_vectors)
            self.steerer.compile(self.spec)
            ends = self._defaults.end_ids
            self.engine = Engine(self.steerer, self.tokenizer, end_ids=ends, max_rows=rows, memory_budget=budget, gemm=self.options.gemm)
            self.closed = False
            self._encoder = Encoder(self.tokenizer, self.model.config)
            self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # without an entry Inspect asks the provider, and so loads the model once more, unsteered, to learn its context length
        set_model_info(f"steered-hf/{model_name}", ModelInfo(context_length=self.context))
        # Inspect keys its output cache by base_url but not by the -M arguments: without this a cached reply would outlive its steering
        digest = self.spec.digest if self.spec else "unsteered"
        settings = self.options.model_dump(mode="json", exclude={"batch_size", "memory_budget"})
        self.base_url = f"{_BASE_URL}{content_hash([digest, settings])[:16]}"
        replier = Replier(self.engine, ends, exact=self.options.exact)
        # one model, one set of hooks: replies and log-likelihoods take turns
        turns = anyio.Lock()
        self._batcher = Batcher[Request, list[Reply]](replier.answer, max_size=rows or _AUTO_ROWS, size=lambda request: len(request.rows), lock=turns)
        scorer = Scorer(self.engine, self._encoder.max_length, exact=self.options.exact)
        self._likelihoods = Batcher[Texts, list[Likelihood]](scorer.answer, max_size=_AUTO_ROWS, size=len, lock=turns)

    async def generate(self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig) -> ModelOutput:
        """Return the model's reply to a conversation.

        Raises:
            RefusalError: for tools, images, log-probabilities and other things that this provider does not do, and for a spec of this
                request's own that does not fit.
        """
        with plain_refusals():
            _refuse_unsupported(tools, config)
            self._refuse_closed_or_changed()
            spec = self._request_spec(config)
            prompt = render_chat(self.tokenizer, [_plain(message) for message in input], prompt_format=self.options.prompt_format)
            tokens = tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            length, limit = self._budget(len(tokens), config)
            stop = tuple(s for s in config.stop_seqs or () if s)
            seed = config.seed if config.seed is not None else secrets.randbits(31)
            samplings = self._samplings(config, seed, tokens)
            rows = tuple(GenerationRow(tokens, length, spec, sampling, stop) for sampling in samplings)
            replies = await self._batcher.submit(Request(rows, limit))
        made = sum(reply.tokens for reply in replies)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(reply) for reply in replies],
            usage=ModelUsage(input_tokens=len(tokens), output_tokens=made, total_tokens=len(tokens) + made),
            metadata={"steering": spec.digest if spec else None} | ({"seed": seed} if samplings[0].temperature > 0 else {}),
        )

    async def loglikelihoods(
        self,
        requests: Sequence[LikelihoodRequest],
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as in generate; never changed
    ) -> list[Likelihood]:
        """Return the log-likelihood of each text, in order: what lm-eval gives with the same model, spec and texts.

        Requests that are awaited at the same time form a batch, in which what they share runs once; no reply is written meanwhile.

        Args:
            requests: texts, and what stands before each.
            config: only ``extra_body={"steering": …}`` is read, as in :meth:`generate`.

        Raises:
            RefusalError: for a text without a token, or longer than the model takes after its context; for a spec that does not fit; and when the
                steering drives the activations out of range (NaN).
        """
        with plain_refusals():
            self._refuse_closed_or_changed()
            spec = self._request_spec(config)
            asked = tuple(self._score_requests(request, spec) for request in requests)
            return await self._likelihoods.submit(asked) if asked else []

    def _score_requests(self, request: LikelihoodRequest, spec: SteeringSpec | None) -> tuple[ScoreRequest, ...]:
        if request.context is None:
            tokens = self._encoder.encode(request.text)
            whole = [Passage("text", (self._encoder.prefix,), tokens)] if tokens else []
            return tuple(ScoreRequest(w.context, w.tokens, spec, w.response_start) for w in windows(whole, self._encoder.max_length))
        if isinstance(request.context, str):
            return (ScoreRequest(*self._encoder.pair(request.context, request.text), spec),)
        prompt_format = self.options.prompt_format
        prompt = render_chat(self.tokenizer, [_plain(message) for message in request.context], prompt_format=prompt_format)
        return (ScoreRequest(*self._encoder.chat_pair(prompt, request.text, prompt_format), spec),)

    def _choice(self, reply: Reply) -> ChatCompletionChoice:
        message = ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=reply.reason)

    def _samplings(self, config: GenerateConfig, seed: int, tokens: tuple[int, ...]) -> list[Sampling]:
        """Return how the tokens of each choice are chosen."""
        count, penalty = config.num_choices or 1, self._defaults.repetition_penalty
        temperature, top_p, top_k = config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p, config.top_k or 0
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise ModelError(f"temperature={temperature}, top_p={top_p}, top_k={top_k}: allowed are temperature >= 0, 0 < top_p <= 1, top_k >= 0.")
        if temperature == 0:
            if count > 1:
                raise ModelError(f"num_choices={count} with greedy decoding would repeat one reply. Set a temperature above 0.")
            return [Sampling(repetition_penalty=penalty)]  # without what greedy rows do not read, so that the engine sees which are alike
        common = Sampling(temperature, top_k, top_p, repetition_penalty=penalty)
        return [common._replace(seed=row_seed(repeat_seed(seed, choice), tokens)) for choice in range(count)]

    def _budget(self, prompt: int, config: GenerateConfig) -> tuple[int, StopReason]:
        wanted = config.max_tokens if config.max_tokens is not None else self.max_tokens()
        if wanted < 1:
            raise ModelError(f"max_tokens={wanted} leaves nothing to generate. Allowed: 1 or more.")
        if not prompt:
            raise ModelError("the conversation renders to an empty prompt. Check the chat template.")
        if self.context is None or prompt + wanted <= self.context:
            return wanted, "max_tokens"
        if prompt >= self.context:
            raise ModelError(
                f"the prompt has {prompt} tokens and {self.model_name!r} takes {self.context} in all. Shorten the prompt, or use another model."
            )
        return self.context - prompt, "model_length"

    def _request_spec(self, config: GenerateConfig) -> SteeringSpec | None:
        extra = config.extra_body or {}
        if set(extra) - {"steering"}:
            raise ModelError(f"extra_body has {', '.join(sorted(set(extra) - {'steering'}))}, which steered-hf does not take. Allowed: steering.")
        if "steering" not in extra:
            return self.spec
        if config.cache:
            raise ModelError(
                "cache and extra_body={'steering': …} do not go together: Inspect's cache does not see a spec file's content. Leave one out."
            )
        return _spec_of(extra["steering"])

    def _refuse_closed_or_changed(self) -> None:
        if self.closed:
            raise ModelError(f"model {self.model_name!r} was closed. Ask for it again with get_model().")
        path = Path(self.options.steering).expanduser() if self.options.steering else None
        if path is not None and path.is_file() and file_hash(path) != self._spec_hash:
            raise SpecError(
                f"steering={self.options.steering!r} changed after this model was loaded with it (Inspect keeps models by their arguments). "
                "Start again, give the new spec a name of its own, or use get_model(…, memoize=False)."
            )

    def close(self) -> None:
        """Detach the hooks and let go of the model."""
        if not self.closed:
            self.steerer.close()
            self.closed = True
            del self.model, self.steerer, self.engine, self._batcher, self._likelihoods

    def max_tokens(self) -> int:
        """Return how many tokens are generated at most when a task does not say."""
        return 512

    def max_connections(self) -> int:
        """Return the batch size: more requests at once would wait. With ``batch_size=auto`` it is 64.

        A step reads the weights once for all of its rows, so a row costs the less the more there are, until about there (35 M parameters, one
        CPU thread, milliseconds a row: 24 for one row, 1.3 for 32, 1.0 for 64, 0.9 for 128). More would save little, and each request would
        wait for a longer batch. ``--max-connections`` sets another number. Versions of Inspect with adaptive connections ask for this only
        when those are off.
        """
        return self.options.max_rows() or _AUTO_CONNECTIONS

    def connection_key(self) -> str:
        """Return a key of the loaded model's own: no two share connections."""
        return f"{self.model_name} {self.base_url}"

    def collapse_user_messages(self) -> bool:
        """Join consecutive user messages: many chat templates insist on turns that alternate."""
        return True

    async def count_text_tokens(self, text: str) -> int:
        """Return the number of tokens by the model's own tokenizer."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _refuse_unsupported(tools: Sequence[ToolInfo], config: GenerateConfig) -> None:
    if tools:
        raise ModelError(f"steered-hf does not call tools ({', '.join(tool.name for tool in tools)} given). Use a task or a solver without tools.")
    given = [name for name in _NOT_SUPPORTED if getattr(config, name)]
    if given:
        raise ModelError(
            f"steered-hf does not support {', '.join(given)}. Leave it out; log-probabilities of whole texts are what loglikelihoods gives."
        )


def _plain(message: ChatMessage) -> dict[str, str]:
    if message.role == "tool":
        raise ModelError("the conversation holds a tool's message, and steered-hf does not call tools. Use a task or a solver without tools.")
    parts = [message.content] if isinstance(message.content, str) else message.content
    other = [part.type for part in parts if not isinstance(part, (str, ContentText))]
    if other:
        raise ModelError(f"the {message.role} message holds {', '.join(other)}; steered-hf takes text alone.")
    return {
        "role": message.role,
        "content": "\n".join(part if isinstance(part, str) else part.text for part in parts if isinstance(part, (str, ContentText))),
    }


def _spec_of(value: Any) -> SteeringSpec | None:
    if value is None:
        return None
    if isinstance(value, str):
        return SteeringSpec.load(value)
    if isinstance(value, Mapping) and set(value) <= set(INLINE_KEYS):
        return spec_from_args(None, value)
    raise SpecError(
        f"extra_body={{'steering': {value!r:.80}}} is no steering. Allowed: a spec file's path, a mapping with keys out of {', '.join(INLINE_KEYS)}, "
        "or None for the unsteered model."
    )
