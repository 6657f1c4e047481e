"""What a search will ask of its judge, counted before anything is asked or any model is loaded."""

from collections.abc import Sequence

from steered_lm.commands.audit import describe_usage
from steered_lm.config import Config
from steered_lm.judges.audit import audit_requests, beside_cache, estimate_usage
from steered_lm.judges.audit_gate import REPEATS, short_items
from steered_lm.judges.base import JudgeRequest, Usage
from steered_lm.search.driver import population_size
from steered_lm.search.plugins import load_optimizer
from steered_lm.search.protocol import SearchSpace
from steered_lm.search.runlog import RunSettings
from steered_lm.study import SearchConfig, Study

_TEST_ARMS = 2  # the chosen candidate and the unsteered model


class SearchPlan(Config):
    """How many judgements a search asks for at most, and about what they take.

    Attributes:
        population: candidates a generation.
        generations: how many of them.
        audit: judgements of the judge's audit.
        tuning: judgements of the generations.
        validation: judgements of the finalists.
        testing: judgements of the chosen candidate and the unsteered model.
        usage: an estimate by the judge, for replies as long as the persona's own; None for a judge that computes.
    """

    population: int
    generations: int
    audit: int
    tuning: int
    validation: int
    testing: int
    usage: Usage | None

    @property
    def judgements(self) -> int:
        """All of them."""
        return self.audit + self.tuning + self.validation + self.testing

    def sentences(self) -> list[str]:
        """Return what to tell a user."""
        asked = (
            f"{self.generations} x {self.population} candidates: at most {self.judgements:,} judgements "
            f"({self.tuning:,} tuning, {self.validation:,} validation, {self.testing:,} test, {self.audit:,} audit of the judge)"
        )
        if self.usage is None:
            return [asked, "the judge computes on this machine and costs nothing"]
        return [asked, f"about {describe_usage(self.usage)}, when replies are as long as the persona's own; what a cache holds is not asked again"]


def plan_search(study: Study, search: SearchConfig) -> SearchPlan:
    """Return what a search asks of the judge, without asking it.

    Raises:
        RunError: when the budget is smaller than one population.
    """
    space, persona = SearchSpace(names=study.traits), study.persona
    settings = RunSettings(
        persona=persona.name,
        model=study.config.model.model,
        judge=study.judge.name,
        space=space,
        optimizer=search.optimizer,
        optimizer_options=search.options,
        seed=search.seed,
        budget=search.budget,
    )
    size = population_size(settings)
    optimizer = load_optimizer(search.optimizer, space, seed=search.seed, options=search.options)
    finalists = search.finalists + hasattr(optimizer, "incumbent")
    candidates = {"tune": search.budget // size * size, "validate": finalists, "test": _TEST_ARMS}
    requests = {split: [JudgeRequest(prompt=i.prompt, response=i.reference) for i in persona.items(split)] for split in candidates}
    audit = [] if study.config.audit == "off" else audit_requests(short_items(study.question), REPEATS)
    # a cache would count a request once, and each candidate's replies are its own
    judge = beside_cache(study.judge)
    usages = [(estimate_usage(judge, audit), 1), *((estimate_usage(judge, requests[split]), count) for split, count in candidates.items())]
    return SearchPlan(
        population=size,
        generations=search.budget // size,
        audit=len(audit),
        tuning=candidates["tune"] * len(requests["tune"]),
        validation=candidates["validate"] * len(requests["validate"]),
        testing=candidates["test"] * len(requests["test"]),
        usage=_total(usages),
    )


def _total(parts: Sequence[tuple[Usage | None, int]]) -> Usage | None:
    """Return the sum of usages, each taken so many times; None when there is none."""
    found = [(usage, times) for usage, times in parts if usage is not None]
    if not found:
        return None
    dollars = [usage.dollars * times for usage, times in found if usage.dollars is not None]
    return Usage(
        requests=sum(usage.requests * times for usage, times in found),
        input_tokens=sum(usage.input_tokens * times for usage, times in found),
        output_tokens=sum(usage.output_tokens * times for usage, times in found),
        dollars=sum(dollars) if dollars else None,
    )
