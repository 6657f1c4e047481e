"""One model under several arms: tasks and texts, measured once and then kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steered_lm.config import content_hash, file_hash
from steered_lm.content import TINY_CHAT
from steered_lm.cost.arms import Arm
from steered_lm.cost.cells import Cells, Items
from steered_lm.cost.config import CostConfig
from steered_lm.errors import JudgeError, UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.items import BROKEN, ItemResult, evaluate_items, task_digest
from steered_lm.harness.model import SteeredHFLM
from steered_lm.judges.base import EMPTY, FINDINGS
from steered_lm.measure.divergence import Calibration, calibrated, kl_to_unsteered, with_alpha
from steered_lm.measure.examples import Example, holds_examples, read_examples
from steered_lm.measure.means import TokenMean
from steered_lm.measure.passages import Passage, read_passages, refuse_idle, reply_passages, windows
from steered_lm.measure.perplexity import Perplexity, perplexities
from steered_lm.measure.texts import ENGLISH, text_file
from steered_lm.search.runlog import installed_versions
from steered_lm.steering.spec import SteeringSpec
from steered_lm.steering.vectors import weights_fingerprint
from steered_lm.study import numerics

# what a response is, and no failure of who judges it
_FINDINGS = FINDINGS | {EMPTY, BROKEN}


@dataclass(frozen=True)
class Text:
    """A text as a model reads it.

    Attributes:
        examples: its prompts with their replies; empty for a plain text, all of which is read.
    """

    name: str
    digest: str
    passages: Sequence[Passage]
    length: int
    examples: Sequence[Example] = ()


def read_text(config: CostConfig, lm: SteeredHFLM) -> Text | None:
    """Return the text whose perplexity is measured; None for ``none``."""
    if config.text == "none":
        return None
    name = config.text or ("tiny_talk" if config.model.model == TINY_CHAT else ENGLISH)
    path = text_file(name)
    passages = read_passages(path, lm.tokenizer, lm.prefix_token_id, split=config.split, prompt_format=config.model.prompt_format)
    return Text(name, file_hash(path), passages, lm.max_length, read_examples(path) if holds_examples(path) else ())


def adapter_digest(folder: Path) -> str:
    """Return a hash of an adapter's files.

    Raises:
        UserError: when the folder holds no adapter.
    """
    files = [folder / "adapter_config.json", *sorted(folder.glob("adapter_model*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise UserError(f"peft={str(folder)!r} holds no adapter. Give a folder with adapter_config.json and adapter_model.safetensors.")
    return content_hash({file.name: file_hash(file) for file in files})


class Measuring:
    """A model with the finished measurements.

    Attributes:
        lm: the model.
        text: whose perplexity is measured, if any.
    """

    def __init__(self, config: CostConfig, lm: SteeredHFLM, cells: Cells, text: Text | None, *, adapter: str | None = None) -> None:
        """Take what measurements of this model have in common; ``adapter`` is the digest of one that the model was loaded with."""
        self.lm, self.text = lm, text
        self._config, self._cells = config, cells
        self._facts: dict[str, Any] = {
            "model": weights_fingerprint(lm.model),
            "dtype": str(lm.model.dtype),
            "prompt_format": config.model.prompt_format,
            "numerics": numerics(config.model),
            "versions": installed_versions("steered-lm", "torch", "transformers", "lm-eval"),
        }
        self._facts |= {} if adapter is None else {"adapter": adapter}

    def at_kl(self, spec: SteeringSpec, kl: float) -> SteeringSpec:
        """Return the spec at the alpha that is ``kl`` nats a token away from the unsteered model on the text.

        Raises:
            UserError: when no alpha is.
        """
        assert self.text is not None
        key = Cells.key(what="calibration", text=self.text.digest, split=self._config.split, spec=spec.digest, kl=kl, **self._facts)
        found = self._cells.get(key, Calibration)
        if found is None:
            found = calibrated(self.lm.steerer, self.text.passages, spec, kl, length=self.text.length)
            self._cells.put(key, found)
        return with_alpha(spec, found.alpha)

    def check_text(self, arms: Sequence[Arm]) -> None:
        """Refuse arms and texts whose perplexity cannot be measured, before anything is.

        Raises:
            UserError: when a spec steers prompts only and the text has none, or a reply does not fit into the model's window.
        """
        if self.text is None:
            return
        try:
            refuse_idle([arm.spec for arm in arms if arm.main], self.text.passages)
            for passages in (self.text.passages, *(self._prompted(arm.system) for arm in arms if arm.system and self.text.examples)):
                windows(passages, self.text.length)
        except UserError as problem:
            raise type(problem)(f"text={self.text.name!r}: {problem} Or leave perplexity out by text='none'.") from problem

    def items(self, task: ChatTask, arms: Sequence[Arm]) -> dict[str, list[ItemResult]]:
        """Return a task's results by arm; those arms run, all together, whose results are not there.

        Raises:
            JudgeError: when too many verdicts are missing; nothing of this task is then kept.
        """
        config = self._config
        sampled = bool(task.config.generation_kwargs and task.config.generation_kwargs.get("do_sample"))
        facts = {"what": "items", "task": task.task_name, "digest": task_digest(task, limit=config.limit), **self._facts}
        # an arm's name is among what its draws start from
        keys = {arm.name: Cells.key(arm=_digest(arm), draw=[config.seed, arm.name] if sampled else None, **facts) for arm in arms}
        found = {name: cell.items for name, key in keys.items() if (cell := self._cells.get(key, Items)) is not None}
        lacking = [arm.candidate for arm in arms if arm.name not in found]
        if lacking:
            made = evaluate_items(self.lm, task, lacking, limit=config.limit, seed=config.seed)
            _check_judged(task.task_name, made, config.missing_limit)
            for name, items in made.items():
                self._cells.put(keys[name], Items(items=tuple(items)))
                found[name] = tuple(items)
        return {name: list(found[name]) for name in keys}

    def perplexity(self, arms: Sequence[Arm]) -> dict[str, TokenMean]:
        """Return the text's negative log-likelihoods by arm; a prompted one reads the same replies with its system turn before them."""
        return self._tokens("perplexity", arms)

    def kl(self, arms: Sequence[Arm]) -> dict[str, TokenMean]:
        """Return the divergence from the same model unsteered, by arm."""
        return self._tokens("kl", arms)

    def _tokens(self, what: str, arms: Sequence[Arm]) -> dict[str, TokenMean]:
        text = self.text
        assert text is not None
        facts = {"what": what, "text": text.digest, "split": self._config.split, "length": text.length, **self._facts}
        keys = {arm.name: Cells.key(arm=_digest(arm), **facts) for arm in arms}
        found = {name: cell for name, key in keys.items() if (cell := self._cells.get(key, TokenMean)) is not None}
        lacking = [arm for arm in arms if arm.name not in found]
        if not lacking:
            made = []
        elif what == "perplexity":
            plain = [arm.spec for arm in lacking if arm.system is None]
            read = iter(perplexities(self.lm.engine, text.passages, plain, length=text.length)) if plain else iter(())
            made = [(next(read) if arm.system is None else self._perplexity_after(arm.system)).nll for arm in lacking]
        else:
            made = kl_to_unsteered(self.lm.steerer, text.passages, [arm.spec for arm in lacking], length=text.length)
        for arm, mean in zip(lacking, made, strict=True):
            self._cells.put(keys[arm.name], mean)
            found[arm.name] = mean
        return {arm.name: found[arm.name] for arm in arms}

    def _perplexity_after(self, system: str) -> Perplexity:
        assert self.text is not None
        (found,) = perplexities(self.lm.engine, self._prompted(system), [None], length=self.text.length)
        return found

    def _prompted(self, system: str) -> list[Passage]:
        """Return the text's replies after their prompts with a system turn."""
        assert self.text is not None
        return reply_passages(self.text.examples, self.lm.tokenizer, self._config.model.prompt_format, system=system)


def _digest(arm: Arm) -> Any:
    spec = None if arm.spec is None else arm.spec.digest
    return spec if arm.system is None else {"spec": spec, "system": arm.system}


def _check_judged(task: str, found: Mapping[str, Sequence[ItemResult]], limit: float) -> None:
    every = [item for items in found.values() for item in items]
    asked = sum(max(len(item.responses), 1) for item in every)
    for metric in dict.fromkeys(name for item in every for name in item.missing):
        reasons = [reason for item in every for reason in item.missing.get(metric, ()) if reason not in _FINDINGS]
        if len(reasons) > limit * asked:
            worst, count = Counter(reasons).most_common(1)[0]
            raise JudgeError(
                f"{task}: {len(reasons)} of {asked} verdicts of {metric.replace('_', ' ')} are missing ({len(reasons) / asked:.0%}; "
                f"limit {limit:.0%}), {count} because: {worst}. Finished tasks are kept: mend the judge and run the same command again, "
                "or accept more by missing_limit."
            )
