"""A model's trait scores question by question, by Inspect in this process."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalSample
from inspect_ai.model import Model, get_model

from steered_lm.errors import RunError
from steered_lm.inspect_plugin.traits import pv_trait
from steered_lm.judges.items import JudgedItem
from steered_lm.judges.trait_run import TraitRun

_SCORER = "trait_expression"


def open_model(name: str, model_args: Mapping[str, Any], *, base_url: str | None = None, key_env: str | None = None) -> Model:
    """Return a model for several evaluations; as a context manager it lets go of what it loaded, which Inspect's own table of models never does.

    Args:
        name: its name in Inspect.
        model_args: what its provider takes.
        base_url: where a service is; by default where its provider looks.
        key_env: the environment variable that holds the service's key; by default the provider's.

    Raises:
        RefusalError: when it cannot be loaded.
    """
    key = None if key_env is None else os.environ.get(key_env)
    with _no_bar() if name.startswith("steered-hf/") else nullcontext():
        return get_model(name, memoize=False, base_url=base_url, api_key=key, **model_args)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Leave out the bar that transformers draws while weights are loaded: who loads many models shows progress of their own."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def judged_items(
    model: str | Model,
    run: TraitRun,
    judge_options: Mapping[str, Any],
    *,
    log_dir: Path,
    limit: int | None = None,
    seed: int = 0,
) -> list[JudgedItem]:
    """Return the trait's questions with their scores, in order.

    Args:
        model: its name in Inspect, such as ``openai/<model>``, or one that :func:`open_model` gave.
        run: how the trait is measured.
        judge_options: further options of the judge.
        log_dir: gets Inspect's log.
        limit: most questions; None takes all.
        seed: of responses that are sampled.

    Raises:
        RunError: when the evaluation ends in an error.
        RefusalError: when model, trait or judge cannot be had.
    """
    settings = run.model_dump(mode="json", exclude={"trait", "max_gen_toks"}, exclude_none=True)
    options = {**settings, "max_tokens": run.max_gen_toks, **{f"judge_{name}": value for name, value in judge_options.items()}}
    if run.heat:  # not every service takes a seed, and greedy replies need none
        options["seed"] = seed
    (log,) = inspect_eval(pv_trait(trait=run.trait, **options), model=model, log_dir=str(log_dir), display="none", limit=limit)
    if log.status != "success" or log.samples is None:
        said = "no reason given" if log.error is None else log.error.message
        raise RunError(f"the evaluation of {str(model)!r} in Inspect ended with status {log.status!r}: {said}. Its log: {log.location}.")
    samples: dict[str, list[EvalSample]] = {}
    for sample in log.samples:
        samples.setdefault(str(sample.id), []).append(sample)
    return [_item(name, sorted(own, key=lambda sample: sample.epoch)) for name, own in sorted(samples.items())]


def _item(name: str, samples: list[EvalSample]) -> JudgedItem:
    scores = [(sample.scores or {})[_SCORER] for sample in samples]
    return JudgedItem.of(name, [score.metadata or {} for score in scores], [score.answer or "" for score in scores])
