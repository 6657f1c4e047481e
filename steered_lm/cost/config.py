"""What ``steered-lm cost`` is asked for."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from steered_lm.config import Config
from steered_lm.errors import UserError
from steered_lm.measure.texts import Split
from steered_lm.study import ModelConfig


class CostConfig(Config):
    """Specs, measures, tolerances.

    Attributes:
        steering: files of steering specs.
        out: folder for the page, its numbers, and finished measurements.
        sweep: one setting at several values, such as ``alpha=0:3:0.5``; None compares the specs as they are.
        kl: every spec is taken at the alpha that is this far from the unsteered model on ``text``, nats a token.
        peft: folders of adapters, by the names that they get: each is the model trained, without steering, as one more arm.
        system: system turns: each is the unsteered model prompted, as one more arm.
        tasks: what is answered; empty takes MMLU and TruthfulQA, or the tiny model's own sets.
        traits: measured by their tasks: the seven of Persona Vectors (all: ``persona_vectors``), the five axes (all: ``axes``), or a trait's file.
        persona: measured by ``persona_judge``.
        side_effects: also each trait's vector of the first spec's file by itself, with that spec's settings and weight 1.
        judge: who judges; None takes ``stylometric`` for a persona and ``markers`` for the five axes.
        judge_options: further options of the judge.
        judge_cache: SQLite file that keeps verdicts; by default in ``out``.
        data: folder of local data, see docs/tasks.md.
        text: whose perplexity is measured, and on which ``kl`` is; ``none`` measures none.
        num_fewshot: examples in each prompt of MMLU and TruthfulQA; other tasks take none.
        limit: items a task.
        samples: responses a question of a trait.
        max_new_tokens: length of responses.
        tolerance: loss that is accepted, a share of each measure's scale.
        perplexity_tolerance: growth of perplexity that is accepted.
        missing_limit: share of failed judgements of a task above which the run stops.
    """

    model: ModelConfig = ModelConfig()
    steering: tuple[Path, ...] = Field(min_length=1)
    out: Path
    sweep: str | None = None
    kl: float | None = Field(default=None, gt=0)
    peft: dict[str, Path] = Field(default_factory=dict)
    system: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    persona: str | None = None
    persona_split: str = "test"
    side_effects: bool = False
    judge: str | None = None
    judge_options: dict[str, Any] = Field(default_factory=dict)
    judge_cache: Path | None = None
    data: str | None = None
    text: str | None = None
    split: Split = "paragraph"
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    samples: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    perplexity_tolerance: float = Field(default=0.05, gt=0)
    missing_limit: float = Field(default=0.2, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl is not None and self.sweep is not None and self.sweep.split("=")[0].strip() in ("alpha", "kl"):
            raise ValueError(f"kl={self.kl:g} sets alpha, and so does sweep={self.sweep!r}; give one of them")
        if self.text == "none" and (self.kl is not None or (self.sweep or "").startswith("kl")):
            raise ValueError("text='none' leaves nothing to measure a KL divergence on; name a text")
        for turn in self.system:
            if not turn.strip():
                raise ValueError(f"system={turn!r} is blank, and a model without a system turn is the unsteered one, which is always among the arms")
            if self.system.count(turn) > 1:
                raise ValueError(f"system={turn!r} is given twice; give each turn once")
        if self.side_effects and not self.traits:
            raise ValueError("side_effects needs traits to measure; name them by traits")
        return self

    def judge_of(self, trait: str | None) -> str:
        """Return the judge of a trait (None: of the persona).

        Raises:
            UserError: when there is no judge that works by default, or no such trait.
        """
        from steered_lm.judges.traits import load_trait
        from steered_lm.persona.meter import TRAITS

        if self.judge is not None:
            return self.judge
        if trait is not None and trait not in TRAITS:
            load_trait(trait)  # a misspelt one needs no judge, but its name
            raise UserError(
                f"trait={trait!r} needs a judge, and none is given. Give judge=openai:<model> (any compatible endpoint, by base_url), "
                f"anthropic:<model> or hf:<model>. Without one only the persona axes can be measured, by their markers: {', '.join(TRAITS)}."
            )
        return "stylometric" if trait is None else "markers"
