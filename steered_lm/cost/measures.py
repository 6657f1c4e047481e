"""Which tasks are run, and what of their results becomes a measure."""

from collections.abc import Sequence
from difflib import get_close_matches
from statistics import fmean
from typing import Any, Literal, NamedTuple

from steered_lm.benchmarks.mmlu import CATEGORIES, CATEGORY_OF, local_subjects, select_subjects
from steered_lm.content import TINY_CHAT, content_dir
from steered_lm.errors import UserError
from steered_lm.harness.chat_task import ChatTask
from steered_lm.harness.lamp_task import LampTask
from steered_lm.harness.persona_task import PersonaJudgeTask
from steered_lm.harness.trait_task import OWN, TraitTask
from steered_lm.harness.truthful_task import TruthfulTask
from steered_lm.harness.upstream_task import PREFIX
from steered_lm.judges.trait_run import SHARES
from steered_lm.judges.traits import TRAITS
from steered_lm.persona.meter import TRAITS as AXES
from steered_lm.report.cost_data import Role

TINY_TASKS = ("tiny_knowledge", "tiny_truth")
TASKS = ("mmlu", "truthfulqa_mc1", "truthfulqa_mc2")
TRAIT_GROUPS = {"persona_vectors": TRAITS, "axes": AXES}
"""Names that stand for several traits: the seven of Persona Vectors, and the five persona axes."""

# groups, and what options of their own measure
_NOT_READ = ("lamp", "perplexity", OWN)


class Planned(NamedTuple):
    """Tasks whose items make one measure.

    Attributes:
        name: the measure's.
        tasks: names of tasks of ours; several are pooled, with their items' subjects as groups.
        trait: the trait that they measure; ``pv_trait`` gets it by metadata.
    """

    name: str
    tasks: tuple[str, ...]
    trait: str | None = None


class Reading(NamedTuple):
    """One metric of a task as a measure."""

    metric: str
    name: str
    role: Role
    kind: Literal["accuracy", "score"]
    about: str
    higher_is_better: bool | None = True
    scale: tuple[float, float] | None = None
    chance: float | None = None
    trait: str | None = None
    bands: bool = False
    beside: str | None = None


def default_tasks(model: str) -> tuple[str, ...]:
    """Return what is measured when nothing is named: MMLU and TruthfulQA, or the small sets in the tiny model's own language."""
    return TINY_TASKS if model == TINY_CHAT else TASKS


def plan_task(name: str, data: str | None = None) -> Planned:
    """Return the tasks behind a name: ``mmlu``, ``mmlu_<category or subject>``, ``truthfulqa_mc1`` (all also with ``steered_``), or a task of ours.

    MMLU is asked about the subjects that the local folder has, or all 57 of the hub's.

    Raises:
        UserError: for a name that is none of them, with near misses.
    """
    plain = name.removeprefix(PREFIX)
    if plain == "mmlu" or plain.startswith("mmlu_"):
        asked = select_subjects("all" if plain == "mmlu" else plain.removeprefix("mmlu_"))
        local = local_subjects(data)
        # one subject that is asked for by name and is not there is an error, which its task gives
        subjects = asked if local is None or len(asked) == 1 else [subject for subject in asked if subject in local]
        if not subjects:
            raise UserError(f"task={name!r}: the data folder has none of its subjects. It has {', '.join(local or [])}.")
        return Planned(plain, tuple(f"{PREFIX}mmlu_{subject}" for subject in subjects))
    if plain.startswith("pv_") and plain != OWN:
        return plan_trait(plain.removeprefix("pv_"))
    if plain in TRAIT_GROUPS:
        raise UserError(f"task={name!r} is a group of traits. Give trait={plain!r} in its place.")
    files = [file for file in content_dir("tasks").glob("*/*.yaml") if file.parent.name not in ("mmlu", "rubrics") and not file.stem.startswith("_")]
    known = {file.stem.removeprefix(PREFIX): file.stem for file in files if file.stem.removeprefix(PREFIX) not in (*_NOT_READ, *TRAIT_GROUPS)}
    if plain not in known:
        usable = sorted({*known, "mmlu", *(f"mmlu_{category}" for category in CATEGORIES)})
        close = get_close_matches(plain, [*usable, *(f"mmlu_{subject}" for subject in CATEGORY_OF)], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(f"task={name!r} is none that costs can be read from. Allowed: {', '.join(usable)}, mmlu_<subject>.{hint}")
    return Planned(plain, (known[plain],))


def plan_trait(trait: str) -> Planned:
    """Return the task that measures a trait: its own, or ``pv_trait`` for an axis or a file."""
    return Planned(f"trait {trait}", (f"pv_{trait}" if trait in TRAITS else OWN,), trait)


def readings(task: ChatTask, planned: Planned) -> list[Reading]:
    """Return what is read off a task's results.

    Raises:
        UserError: when nothing can be.
    """
    name = planned.name
    if isinstance(task, PersonaJudgeTask):
        return [Reading("persona_fit", f"fit to {task.persona.name}", "benefit", "score", "persona fit by the judge, 1 to 5", scale=(1.0, 5.0))]
    if isinstance(task, TraitTask):
        about = f"how strongly responses show {planned.trait}, by the judge, 0 to 100"
        found = [Reading("trait_score", name, "benefit", "score", about, None, (0.0, 100.0), trait=planned.trait, bands=True)]
        if task.judges is not None and task.judges.coherence is not None:
            about = f"how coherent the same responses are as of {name}, by the judge, 0 to 100"
            found.append(Reading("coherence", f"coherence ({planned.trait})", "cost", "score", about, scale=(0.0, 100.0), beside=name))
        return found
    if isinstance(task, TruthfulTask):
        return _of_truthful(task, name)
    if isinstance(task, LampTask):
        return _of_lamp(task, name)
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(f"task={name!r} has no metric that is known to be a cost or a benefit. Choose another one.")
    if name.endswith("mc2"):
        return [Reading("acc", name, "cost", "score", "probability of the true choices", scale=(0.0, 1.0))]
    chance = fmean(1.0 / len(task.doc_to_choice(doc)) for doc in task.eval_docs)
    return [Reading("acc", name, "cost", "accuracy", "the right choice by log-likelihood", chance=chance)]


def _of_truthful(task: TruthfulTask, name: str) -> list[Reading]:
    if not task.judges:
        about = "answers nearer to true than to false references"
        return [Reading(metric, f"{name} {metric}", "cost", "accuracy", about) for metric in ("bleu_acc", "rouge1_acc")]
    scale = (0.0, 100.0)
    return [Reading(kind, f"{name} {kind}", "cost", "score", f"how {kind} answers are, by the judge, 0 to 100", scale=scale) for kind in task.judges]


def _of_lamp(task: LampTask, name: str) -> list[Reading]:
    metrics: dict[str, Any] = {entry["metric"]: entry for entry in task.config.metric_list}
    found = []
    if "accuracy" in metrics:
        found.append(Reading("accuracy", name, "cost", "accuracy", "labels that are right to the letter"))
    if "mae" in metrics:
        found.append(Reading("mae", f"{name} error", "cost", "score", "absolute error of the rating", False, (0.0, 4.0)))
    found += [
        Reading(m, f"{name} {m}", "cost", "score", "overlap with the right answer", scale=(0.0, 1.0)) for m in ("rouge1", "rougeL") if m in metrics
    ]
    if task.judge is not None:
        found.append(Reading("persona_fit", f"{name} fit", "benefit", "score", "fit to the author by the judge, 1 to 5", scale=(1.0, 5.0)))
    return found


def band_shares(metrics: Sequence[dict[str, float]]) -> tuple[float, ...]:
    """Return the mean share of each band over the questions that have any; empty without one."""
    known = [entry for entry in metrics if SHARES[0] in entry]
    return tuple(fmean(entry[share] for entry in known) for share in SHARES) if known else ()
