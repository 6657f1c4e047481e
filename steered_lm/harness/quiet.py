"""Leaves out the progress bars and notices of lm-eval and the libraries below it, where a caller shows progress of its own; warnings stay."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import datasets
from lm_eval.api import task as lm_eval_task
from transformers.utils import logging as transformers_logging

from steered_lm.harness.model import SteeredHFLM


@contextmanager
def quiet(lm: SteeredHFLM) -> Iterator[None]:
    """Leave out lm-eval's progress bars and notices while it evaluates; a search would see several a generation."""
    theirs = logging.getLogger("lm_eval")
    level, was = theirs.level, lm.quiet
    # the bar over a task's documents has no switch
    bar = getattr(lm_eval_task, "tqdm", None)
    theirs.setLevel(logging.WARNING)
    lm.quiet = True
    if bar is not None:
        lm_eval_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        theirs.setLevel(level)
        lm.quiet = was
        if bar is not None:
            lm_eval_task.tqdm = bar


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Leave out the bars that transformers and datasets draw while weights and documents are loaded."""
    weights, documents = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if weights:
            transformers_logging.enable_progress_bar()
        if documents:
            datasets.enable_progress_bars()
