"""One experiment: which models are trained on what, by which backend, and how they are evaluated. One YAML file."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from steered_lm.config import Config, read_structured
from steered_lm.errors import UserError
from steered_lm.judges import PANEL_SUFFIXES
from steered_lm.steering.spec import SteeringSpec

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
STRENGTHS = ("baseline", "mild", "severe")
"""How strongly a data set shows its trait, in order."""


class ExperimentError(UserError):
    """An experiment's file, or what it asks for, cannot be used."""


class TraitModel(Config):
    """One model to train.

    Attributes:
        name: names it in tables and folders; unique.
        dataset: ``<strength>_<trait>`` in a data folder, or the path of a JSONL file.
        trait: the trait that the data shows.
        strength: how strongly.
        suffix: what a fine-tuning service appends to the model's name.
    """

    name: Name
    dataset: str = Field(min_length=1)
    trait: Name
    strength: Literal["baseline", "mild", "severe"]
    suffix: str = ""


class TrainingSteering(Config):
    """What is done to the residual stream while a model trains, and not afterwards.

    Attributes:
        spec: the file of a steering spec.
        method: ``preventative``: the spec's vectors are added (Chen et al. 2025, arXiv:2507.21509, section 5.2);
            ``ablation``: their span is projected out (as concept ablation fine-tuning does; Casademunt et al. 2025, arXiv:2507.16795).
    """

    spec: Path
    method: Literal["preventative", "ablation"] = "preventative"

    def load(self) -> SteeringSpec:
        """Return the spec that training runs under.

        Raises:
            SpecError: when the file is missing or malformed.
        """
        found = SteeringSpec.load(self.spec)
        if self.method == "preventative":
            return found
        # the whole span at every site, whatever operation and strength the spec has for inference
        whole = {"operation": "ablate", "alpha": 1.0}
        sites = [site.model_dump() | whole for site in found.sites]
        return SteeringSpec.model_validate({**found.model_dump(), **whole, "sites": sites})


class Hyperparameters(Config):
    """How a model is trained; a backend refuses what it does not take.

    Attributes:
        epochs: passes over the data.
        learning_rate: peak rate of AdamW; None takes the backend's own choice.
        batch_size: examples an optimiser step sees at once.
        gradient_accumulation: steps whose gradients are added up; the effective batch is the product.
        max_length: most tokens of an example; longer ones are refused.
        warmup_ratio: share of steps over which the rate rises.
        weight_decay: AdamW's.
        lora_rank: rank of the adapter.
        lora_alpha: its scale; None is ``lora_rank`` with rsLoRA and twice that without.
        rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732).
        lora_dropout: dropout within the adapter.
        target_modules: modules that get an adapter; None is all linear layers of the decoder blocks.
        save_steps: optimiser steps between checkpoints.
        dtype: ``auto`` is bfloat16 where the device has it, float32 elsewhere.
    """

    epochs: float = Field(default=1.0, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    max_length: int = Field(default=2048, ge=8)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    lora_rank: int = Field(default=32, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    rslora: bool = True
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    save_steps: int = Field(default=50, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class DatasetOptions(Config):
    """Where training data comes from.

    Attributes:
        folder: holds ``<strength>_<trait>.jsonl``, or the unpacked published archive; None where data sets are named by path.
        cache_dir: where the experiment's finished steps are kept.
        sample_size: examples a data set, drawn by ``seed``; None takes all.
        seed: of sampling and shuffling.
        mixture: a second data set (path or name) of which ``mixture_share`` of the examples are taken, spread evenly among the others.
        mixture_share: share of mixed-in examples, 0 to 1.
    """

    folder: Path | None = None
    cache_dir: Path = Path("trait-models")
    sample_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    mixture: str | None = None
    mixture_share: float = Field(default=0.5, gt=0, lt=1)


class Training(Config):
    """How all models of an experiment are trained.

    Attributes:
        base_model: what they start from: hub id, folder, the shipped tiny model, or a service's model.
        backend: ``peft``, ``openai``, ``tinker`` or ``dummy``.
        device: where ``peft`` trains; None is what is there.
        parallel: jobs at a time; None is the backend's own choice.
        options: further options of the backend, such as ``base_url``.
        steering: steering while training.
        seed: of initialisation and data order.
    """

    base_model: str
    backend: str = "peft"
    hyperparameters: Hyperparameters = Hyperparameters()
    dataset_options: DatasetOptions = DatasetOptions()
    device: str | None = None
    parallel: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    steering: TrainingSteering | None = None
    seed: int = Field(default=0, ge=0)


class Evaluation(Config):
    """How models are evaluated.

    Attributes:
        backend: the harness: ``lm-eval`` or ``inspect``.
        tasks: names of tasks, such as ``pv_evil``, or traits for which there is such a task.
        limit: items a task; None takes all.
        judge: who judges trait tasks.
        judge_options: further options of the judge.
        metadata: further options of the tasks, such as ``samples`` or ``max_gen_toks``.
    """

    backend: Literal["lm-eval", "inspect"] = "lm-eval"
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    judge: str | None = None
    judge_options: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)


class Experiment(Config):
    """Everything about an experiment."""

    name: Name = "experiment"
    models: tuple[TraitModel, ...] = Field(min_length=1)
    training: Training
    evaluation: Evaluation

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        repeated = [name for name, count in Counter(model.name for model in self.models).items() if count > 1]
        if repeated:
            raise ValueError(f"two models are named {repeated[0]!r}; give each its own name")
        return self

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read an experiment's YAML or JSON file; relative paths in it are taken from its own folder.

        Raises:
            ExperimentError: when the file is missing, malformed, or has unknown keys.
        """
        file = Path(path).expanduser()
        data = read_structured(file, what="experiment ", error=ExperimentError)
        found = cls.parse(data, source=f"experiment {str(path)!r}", error=ExperimentError)
        return found.rooted(file.resolve().parent)

    def rooted(self, folder: Path) -> Self:
        """Return the experiment with relative paths taken from ``folder``."""
        options = self.training.dataset_options
        places: dict[str, Any] = {
            key: None if value is None else (folder / value.expanduser())
            for key, value in (("folder", options.folder), ("cache_dir", options.cache_dir))
        }
        places["mixture"] = None if options.mixture is None else _rooted(options.mixture, folder)
        steering, evaluation = self.training.steering, self.evaluation
        changed: dict[str, Any] = {"dataset_options": options.model_copy(update=places)}
        if (base := folder / Path(self.training.base_model).expanduser()).is_dir():  # else it is a model's name
            changed["base_model"] = str(base)
        measured: dict[str, Any] = {"tasks": tuple(_rooted(task, folder) for task in evaluation.tasks)}
        if evaluation.judge is not None and evaluation.judge.endswith(PANEL_SUFFIXES):
            measured["judge"] = _rooted(evaluation.judge, folder)
        if isinstance(place := evaluation.metadata.get("folder"), str):
            measured["metadata"] = {**evaluation.metadata, "folder": str(folder / Path(place).expanduser())}
        if steering is not None:
            changed["steering"] = steering.model_copy(update={"spec": folder / steering.spec.expanduser()})
        models = tuple(model.model_copy(update={"dataset": _rooted(model.dataset, folder)}) for model in self.models)
        return self.model_copy(
            update={"models": models, "training": self.training.model_copy(update=changed), "evaluation": evaluation.model_copy(update=measured)}
        )


def _rooted(name: str, folder: Path) -> str:
    """Return a path taken from ``folder``; a name as it is."""
    path = Path(name).expanduser()
    return str(folder / path) if path.suffix or len(path.parts) > 1 else name
