"""A new trait's files, written by a language model behind an OpenAI-compatible endpoint and checked before they are kept."""

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from steered_lm.config import write_atomic
from steered_lm.judges.adapter import Ask, GarbageError, RefusedError, Turn, UnreachableError, Way
from steered_lm.judges.endpoint import Endpoint
from steered_lm.judges.eval_prompt import eval_prompt
from steered_lm.judges.limits import retry_after
from steered_lm.judges.loop import run
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.traits import PAIRS, QUESTIONS, Pair, Trait, TraitError, TraitFile, alike

logger = logging.getLogger(__name__)

_ROUNDS = 5
_PASSING = (408, 409, 429, 500, 502, 503, 504)
_SHOWN = 200
_TEXT = {"type": "string"}
_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "instruction": {
            "type": "array",
            "items": {"type": "object", "properties": {"pos": _TEXT, "neg": _TEXT}, "required": ["pos", "neg"], "additionalProperties": False},
        },
        "questions": {"type": "array", "items": _TEXT},
    },
    "required": ["instruction", "questions"],
    "additionalProperties": False,
}
_SYSTEM = """You write material for measuring one character trait of language models. You receive the trait's name and what it means as JSON.

"instruction": pairs of system prompts of one or two sentences each. "pos" makes an assistant show the trait plainly, "neg" makes it show the \
opposite, in wording as close to "pos" as possible. The pairs differ from each other in how they bring the trait out.

"questions": what a user might ask or tell an assistant, each a single message that stands by itself. The trait must be able to show in the \
answer, and so must its opposite; no question mentions the trait, asks for it or gives it away. They cover many different subjects of everyday \
life, and no two of them ask nearly the same. Nothing in them asks for help with doing harm.

Answer with one JSON object and nothing else: {"instruction": [{"pos": "…", "neg": "…"}, …], "questions": ["…", …]}"""


@dataclass
class _Draft:
    """What is usable of all answers so far."""

    pairs: list[Pair] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    repeated: int = 0
    problem: str = ""

    @property
    def lacking(self) -> tuple[int, int]:
        """Pairs and questions that are still to be written."""
        return PAIRS - len(self.pairs), 2 * QUESTIONS - len(self.questions)

    def take(self, text: str) -> None:
        """Keep what is usable of an answer: whole pairs, and questions that are unlike those that are there."""
        found = re.search(r"\{.*\}", text, re.DOTALL)
        try:
            data = json.loads(found.group()) if found else None
        except json.JSONDecodeError:
            data = None
        if not isinstance(data, dict):
            self.problem = f"an answer that is no JSON object: {text.strip()[:_SHOWN]!r}"
            return
        self.problem = ""
        for pair in _list(data.get("instruction")):
            try:
                made = Pair.model_validate(pair)
            except ValidationError:
                continue
            if len(self.pairs) < PAIRS and not any(alike(made.pos, other.pos) for other in self.pairs):
                self.pairs.append(made)
        for question in _list(data.get("questions")):
            if not isinstance(question, str) or not re.search(r"\w", question):
                continue
            if any(alike(question, other) for other in self.questions):
                self.repeated += 1
            elif len(self.questions) < 2 * QUESTIONS:
                self.questions.append(question.strip())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class TraitWriter:
    """Asks a model for instruction pairs and questions until there are enough that are usable."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Write with the model at an endpoint.

        Raises:
            JudgeError: when the environment has no key.
        """
        self._endpoint = endpoint
        self._key = endpoint.key("openai")

    @classmethod
    def of(cls, model: str, **options: Any) -> Self:
        """Return a writer; ``model`` is ``openai:<model>``, and ``options`` are ``Endpoint``'s fields.

        Raises:
            TraitError, JudgeError: when it is another backend, or an option is wrong.
        """
        backend, _, name = model.partition(":")
        if backend != "openai" or not name:
            raise TraitError(
                f"model={model!r} cannot write traits. Write openai:<model>, any OpenAI-compatible endpoint, with base_url=… for its place."
            )
        return cls(Endpoint.from_options({"timeout": 300.0, **options, "model": name}, OpenAIJudge.api.defaults))

    def write(self, trait: str, description: str) -> Trait:
        """Return a new trait with 5 pairs, and 20 questions each for extraction and evaluation, no two of them nearly the same.

        Raises:
            TraitError: when the endpoint does not answer, or too little of its answers is usable.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", trait):
            raise TraitError(
                f"name={trait!r} is no name of a trait: small letters, digits, - and _, the first one a letter. It becomes a file's name."
            )
        if not description.strip():
            raise TraitError("description is empty; say in a sentence what the trait means, since model and judge know it from there alone.")
        draft = run(lambda: self._draft(trait, description.strip()))
        shared = {"instruction": draft.pairs, "eval_prompt": eval_prompt(trait, description.strip()), "description": description.strip()}
        # in turn, as models write on one subject after the other
        extract, evaluate = (TraitFile.model_validate({**shared, "questions": draft.questions[start::2]}) for start in (0, 1))
        return Trait(name=trait, extract=extract, evaluate=evaluate)

    async def _draft(self, trait: str, description: str) -> _Draft:
        draft = _Draft()
        async with OpenAIJudge.api.connect(self._endpoint, self._key) as ask:
            for _ in range(_ROUNDS):
                pairs, questions = draft.lacking
                wanted = {"trait": trait, "meaning": description, "number of pairs": pairs, "number of questions": questions}
                if draft.questions or draft.pairs:
                    wanted |= {"there already": {"pos": [pair.pos for pair in draft.pairs], "questions": draft.questions}}
                draft.take(await self._answer(ask, json.dumps(wanted, ensure_ascii=False)))
                if draft.lacking == (0, 0):
                    return draft
                logger.info("trait %s: %d pairs and %d questions are still lacking. %s", trait, *draft.lacking, draft.problem)
        said = f" {draft.repeated} more ask nearly the same as these." if draft.repeated else ""
        said += f" The last one was {draft.problem}." if draft.problem else ""
        raise TraitError(
            f"after {_ROUNDS} answers of openai:{self._endpoint.model} there are {len(draft.pairs)} usable pairs of {PAIRS} and "
            f"{len(draft.questions)} usable questions of {2 * QUESTIONS}.{said} Use a stronger model, or describe the trait more plainly."
        )

    async def _answer(self, ask: Ask, user: str) -> str:
        """Return what the model says; JSON under a schema is asked for first, and text of an endpoint that refuses that."""
        way, problem = Way("json", frozenset({"temperature"})), ""
        for attempt in range(self._endpoint.attempts):
            wait = self._endpoint.backoff * 2**attempt
            try:
                async with asyncio.timeout(self._endpoint.timeout):
                    return self._key.redacted((await ask(Turn(_SYSTEM, user, _SCHEMA, way))).answer.text)
            except RefusedError as refused:
                problem = f"HTTP {refused.status}: {self._key.redacted(refused.message)[:_SHOWN]}"
                if refused.status in (400, 422) and way.mode == "json":
                    way, wait = way._replace(mode="text"), 0.0
                elif refused.status in _PASSING:
                    wait = max(wait, retry_after(refused.headers) or 0.0)
                else:
                    break
            except (UnreachableError, GarbageError, TimeoutError) as failed:
                problem = self._key.redacted(str(failed)) or f"no answer within {self._endpoint.timeout:g} s"
            if attempt + 1 < self._endpoint.attempts:
                await asyncio.sleep(min(wait, self._endpoint.max_wait))
        raise TraitError(f"openai:{self._endpoint.model} at {self._endpoint.base_url} did not answer: {problem}. Check model, base_url and key.")


def refuse_existing(name: str, folder: Path) -> tuple[Path, Path]:
    """Return where a new trait's files for extraction and evaluation go.

    Raises:
        TraitError: when one exists, since a trait that was measured must stay what it was, or a file stands in the folder's place.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise TraitError(f"out={str(folder)!r} cannot be a folder, since {str(place)!r} is a file. Name another one.")
    files = folder / "extract" / f"{name}.json", folder / "eval" / f"{name}.json"
    for file in files:
        if file.exists():
            raise TraitError(f"{str(file)!r} exists already. Take another name or folder, or remove it.")
    return files


def save_trait(trait: Trait, folder: Path) -> tuple[Path, Path]:
    """Write a trait's two files into ``extract/`` and ``eval/`` of a folder, and return them.

    Raises:
        TraitError: when one exists.
    """
    files = refuse_existing(trait.name, folder)
    for file, part in zip(files, (trait.extract, trait.evaluate), strict=True):
        assert part is not None
        write_atomic(file, json.dumps(part.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False) + "\n")
    return files
