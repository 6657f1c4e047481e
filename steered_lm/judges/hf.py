"""A local causal model as judge: the probabilities of the score tokens, read off the model itself without writing a word."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from weakref import WeakValueDictionary

from pydantic import Field

from steered_lm.chat import PromptFormat, render_chat
from steered_lm.config import Config, content_hash
from steered_lm.content import TINY_CHAT, resolve_model
from steered_lm.errors import JudgeError
from steered_lm.judges.answers import Reading, expected
from steered_lm.judges.base import EMPTY, JudgeRequest, OnVerdict, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.rubric import Rubric

if TYPE_CHECKING:
    from steered_lm.engine import Scored
    from steered_lm.steering.hooks import Steerer

_SHOWN = 3  # likeliest options in an explanation
_REPLY = "qzreplyqz"
_ANY = "7"  # any reply, to see what follows one


class HFOptions(Config):
    """How a local model judges.

    Attributes:
        model: a hub id, a folder, or ``steered-lm/tiny-chat``.
        device: ``cpu``, ``cuda:0``, …, or ``auto`` to spread a large model; by default an accelerator if there is one.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        batch_size: most prompts in a pass; None is as many as the memory budget allows.
        memory_budget: what everything that grows with the batch may take: a number of GiB, or text with a unit; by default a share of what is free.
        revision: of a hub model.
        prompt_format: ``chat``, or ``plain`` (``User:`` / ``Assistant:`` lines) for base models.
    """

    model: str = Field(min_length=1)
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    memory_budget: int | float | str | None = None
    revision: str | None = None
    prompt_format: PromptFormat = "chat"


class HFJudge:
    """Reads a local model's probabilities of the answers that a rubric allows, for many requests at once.

    When each answer is a single token, its probability is that of the token right after the prompt. When one takes several (a model that writes
    87 digit by digit), the probability of an answer is that of its tokens followed by the end of the turn, so that 8 and 87 do not overlap.
    Answers with and without a space in front add up. The score is the expected value over the answers; with less than a quarter of the
    probability on them it is missing. Judges with the same model, device and dtype share it.
    """

    remote = False

    def __init__(self, question: Question, options: HFOptions) -> None:
        """Load the model.

        Raises:
            JudgeError: when it cannot be loaded, or its tokenizer cannot write an answer.
            ModelError: when it has no chat template and ``prompt_format`` is ``chat``, or ``memory_budget`` is malformed.
        """
        from steered_lm.engine import Engine
        from steered_lm.engine.memory import parse_size

        budget = parse_size(options.memory_budget)
        self._question, self._options = question, options
        self._local = _load(options)
        self._writer = _Writer(self._local.tokenizer, options)
        self._answers = _answers(question.rubric, self._writer, self._local.end_ids())
        self._engine = Engine(self._local.steerer, self._local.tokenizer, max_rows=options.batch_size, memory_budget=budget)

    @classmethod
    def for_question(cls, question: Question, **options: Any) -> Self:
        """Return a judge of one question; ``options`` are the fields of :class:`HFOptions`."""
        return cls(question, HFOptions.parse(options, source="judge hf", error=JudgeError))

    @property
    def name(self) -> str:
        """``hf:<model>``."""
        return f"hf:{self._options.model}"

    @property
    def facts(self) -> dict[str, str]:
        """What a cache notes beside the verdicts, for people."""
        return {"model": self._options.model, **self._question.facts}

    @cached_property
    def identity(self) -> str:
        """SHA-256 of question, model (its name, a sample of its weights, its precision), and how it is asked."""
        return content_hash(
            {
                "judge": "hf",
                "question": self._question.digest,
                "model": self._options.model,
                "revision": self._options.revision,
                "weights": self._local.fingerprint(),
                "dtype": str(self._local.model.dtype),
                "prompt_format": self._options.prompt_format,
                "prompt": self._writer.prompt("system", "user"),
                "answers": [[answer.option, list(answer.tokens)] for answer in self._answers],
            }
        )

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order."""
        return self.judge_each(requests, lambda index, verdict: None)

    def judge_each(self, requests: Sequence[JudgeRequest], on_verdict: OnVerdict) -> list[Verdict]:
        """Do what ``judge`` does, and call ``on_verdict(index, verdict)`` as each is there."""
        found: dict[int, Verdict] = {}

        def tell(index: int, reading: Reading) -> None:
            found[index] = reading.verdict(self._question.rubric, self.name, "logprobs")
            on_verdict(index, found[index])

        prompts: dict[int, tuple[int, ...]] = {}
        longest = max(len(answer.tokens) for answer in self._answers)
        for index, request in enumerate(requests):
            if not request.response.strip():
                tell(index, Reading(None, EMPTY))
                continue
            tokens = self._writer.tokens(self._question, request)
            if self._local.context is not None and len(tokens) + longest - 1 > self._local.context:
                tell(index, Reading(None, f"the judge's prompt has {len(tokens)} tokens, and the model takes {self._local.context}"))
                continue
            prompts[index] = tokens
        if prompts:
            self._score(prompts, longest, tell)
        return [found[index] for index in range(len(requests))]

    def _score(self, prompts: dict[int, tuple[int, ...]], longest: int, tell: Callable[[int, Reading], None]) -> None:
        from steered_lm.engine import ScoreRequest

        indices, size = list(prompts), len(self._answers)
        logs = {index: [math.nan] * size for index in indices}
        left = dict.fromkeys(indices, size)

        def note(numbers: Sequence[int], scored: "Sequence[Scored]") -> None:
            for number, one in zip(numbers, scored, strict=True):
                index = indices[number // size]
                logs[index][number % size] = one.loglikelihood
                left[index] -= 1
                if not left[index]:
                    tell(index, self._read(logs.pop(index)))

        asked = [ScoreRequest(tokens, answer.tokens) for tokens in prompts.values() for answer in self._answers]
        limit = self._local.context or max(map(len, prompts.values())) + longest
        with self._local.lock:
            self._engine.score(asked, max_length=limit, done=note)

    def _read(self, logs: Sequence[float]) -> Reading:
        found = dict.fromkeys(self._question.rubric.options, 0.0)
        refusal = 0.0
        for answer, log in zip(self._answers, logs, strict=True):
            if answer.option is None:
                refusal += math.exp(log)
            else:
                found[answer.option] += math.exp(log)
        best = sorted(found, key=lambda option: -found[option])[:_SHOWN]
        return expected(self._question.rubric, found, refusal, ", ".join(f"{option}: {found[option]:.3f}" for option in best))

    def __repr__(self) -> str:
        """Show the model."""
        return f"HFJudge(model={self._options.model!r})"


class _Answer(NamedTuple):
    """Tokens that are one way to give an answer: an option of the rubric, or (None) the word for a refusal."""

    option: str | None
    tokens: tuple[int, ...]


class _Writer:
    """Writes prompts and answers as the tokens that a model sees and would write."""

    def __init__(self, tokenizer: Any, options: HFOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._markers = sorted((text for text in added if len(text) > 2 and not text[0].isalnum() and not text[0].isspace()), key=len, reverse=True)
        self._frame = self.prompt("system", "user")
        self._framed = self._encode(self._frame)

    def prompt(self, system: str, user: str) -> str:
        """Return the prompt up to where the reply starts; models that can think first are told not to."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return render_chat(self._tokenizer, turns, prompt_format=self._options.prompt_format, enable_thinking=False)

    def tokens(self, question: Question, request: JudgeRequest) -> tuple[int, ...]:
        """Return the tokens of a request's prompt."""
        return tuple(self._encode(self.prompt(question.system(token=True), self._defused(question.user(request)))))

    def _defused(self, material: str) -> str:
        """Return the JSON with the model's own turn markers spelt as escapes, so that a response cannot end its turn and begin another."""
        for marker in self._markers:
            material = material.replace(marker, f"\\u{ord(marker[0]):04x}{marker[1:]}")
        return material

    def _encode(self, text: str) -> list[int]:
        # a chat template writes its own special tokens; a plain prompt needs the one that texts begin with
        return list(self._tokenizer(text, add_special_tokens=self._options.prompt_format == "plain")["input_ids"])

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """Return the distinct token sequences of a word right after a prompt, with a space in front and without; none when it cannot be written."""
        found = (self.following("", text) for text in (word, f" {word}"))
        return list(dict.fromkeys(tokens for tokens in found if tokens and self._text(tokens).strip() == word))

    def following(self, reply: str, text: str) -> tuple[int, ...]:
        """Return the tokens of ``text`` after a prompt and the beginning of a reply."""
        before = self._encode(self._frame + reply) if reply else self._framed
        both = self._encode(self._frame + reply + text)
        alone = both[: len(before)] != before
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"] if alone else both[len(before) :])

    def ends(self) -> list[tuple[int, ...]]:
        """Return what ends a reply: the template's end of a turn, or the end of the line; none when the template has no end of a turn."""
        if self._options.prompt_format == "plain":
            line = self.following(_ANY, "\n")
            return [line] if self._text(line) == "\n" else []
        turns = [{"role": "user", "content": "user"}, {"role": "assistant", "content": _REPLY}]
        written = str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
        rest = written.rpartition(_REPLY)[2].strip()
        return [(self._tokenizer(rest, add_special_tokens=False)["input_ids"][0],)] if rest else []

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _answers(rubric: Rubric, writer: _Writer, end_ids: Iterable[int]) -> list[_Answer]:
    """Return every way to give an answer of the rubric.

    Raises:
        JudgeError: when the tokenizer cannot write one, or nothing ends a reply where that is needed.
    """
    spelt = {option: writer.spellings(option) for option in rubric.options}
    cannot = [option for option, ways in spelt.items() if not ways]
    if cannot:
        raise JudgeError(f"judge hf: the model's tokenizer cannot write the answer {cannot[0]!r} of rubric {rubric.name!r}. Use another model.")
    refusals = [_Answer(None, way) for way in writer.spellings(rubric.refusal)] if rubric.refusal else []
    if all(any(len(way) == 1 for way in ways) for ways in spelt.values()):
        return [*(_Answer(option, way) for option, ways in spelt.items() for way in ways if len(way) == 1), *refusals]
    ends = writer.ends() or [(token,) for token in end_ids]
    if not ends:
        raise JudgeError(
            f"judge hf: the model writes answers of rubric {rubric.name!r} in several tokens, and neither its chat template nor its configuration "
            "says what ends a reply. Use another model, or prompt_format=plain."
        )
    return [*(_Answer(option, way + end) for option, ways in spelt.items() for way in ways for end in ends), *refusals]


@dataclass(eq=False)
class _Local:
    """A model in memory, with what all judges of it share."""

    model: Any
    tokenizer: Any
    steerer: "Steerer"
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def context(self) -> int | None:
        """Most tokens that the model takes, where it says so."""
        config = self.model.config.get_text_config()
        sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return next((int(size) for size in sizes if size), None)

    def end_ids(self) -> list[int]:
        """Return the tokens that end a reply."""
        from steered_lm.engine.stops import end_ids

        return end_ids(self.model.generation_config, self.tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        """Return a hash of the model's weights, so that another checkpoint in its place is seen."""
        from steered_lm.steering.vectors import weights_fingerprint

        return weights_fingerprint(self.model)


_loaded: "WeakValueDictionary[tuple[str | None, ...], _Local]" = WeakValueDictionary()
_loading = threading.Lock()


def _load(options: HFOptions) -> _Local:
    """Return a model, which stays in memory as long as a judge uses it and is loaded once meanwhile.

    Raises:
        JudgeError: when it cannot be loaded.
    """
    key = (resolve_model(options.model), options.revision, options.device, options.dtype)
    with _loading:
        found = _loaded.get(key)
        if found is None:
            _loaded[key] = found = _read_model(options)
        return found


def _read_model(options: HFOptions) -> _Local:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steered_lm.steering.hooks import Steerer

    name, spread = resolve_model(options.model), options.device == "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=options.revision)
        more: dict[str, Any] = {"device_map": "auto"} if spread else {}
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=options.revision, **more)
        placed = model if spread else model.to(options.device or _best_device())
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: a device that does not exist, or is not built in
        raise JudgeError(
            f"judge hf:{options.model} cannot be loaded: {error} Allowed: hf:<hub id>, hf:<folder> or hf:{TINY_CHAT}, on a device that is there."
        ) from error
    return _Local(placed.eval(), tokenizer, Steerer(placed))


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
