"""Which arms are compared: specs, a sweep's values, each vector alone, a prompted model, trained ones."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from steered_lm.config import read_structured
from steered_lm.cost.sweep import Sweep
from steered_lm.errors import SpecError, UserError
from steered_lm.measure.divergence import with_alpha
from steered_lm.report.cost_data import ADAPTER, SYSTEM, UNSTEERED, CostArm
from steered_lm.report.data import Scalar
from steered_lm.search.protocol import Candidate
from steered_lm.steering.spec import SteeringSpec
from steered_lm.steering.vectors import TraitVectors

AtKl = Callable[[SteeringSpec, float], SteeringSpec]
"""Returns a spec at the alpha that is so many nats a token away from the unsteered model."""
_SHOWN = 48


class Arm(NamedTuple):
    """One condition: what the page says of it, its spec, and its system turn."""

    shown: CostArm
    spec: SteeringSpec | None = None
    system: str | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.shown.name

    @property
    def main(self) -> bool:
        """Whether it is more than a row of the matrix of side effects."""
        return self.shown.trait is None

    @property
    def candidate(self) -> Candidate:
        """It as the harness takes it."""
        return Candidate(name=self.name, spec=self.spec, system=self.system)


def load_specs(paths: Sequence[Path]) -> dict[str, SteeringSpec]:
    """Return specs by the names that they get on the page.

    Raises:
        SpecError: when one cannot be read, is given twice, or does nothing.
    """
    found: dict[str, SteeringSpec] = {}
    for path in paths:
        name = path.stem if all(path.stem != other.stem for other in paths if other != path) else str(path)
        if name in found:
            raise SpecError(f"steering={str(path)!r} is given twice. Name each spec once.")
        spec = SteeringSpec.load(path)
        if spec.vectors is None:
            raise SpecError(f"steering={str(path)!r} has no vectors, so it is the unsteered model, which is always among the arms. Leave it out.")
        found[name] = spec
    return found


def base_arms(specs: Mapping[str, SteeringSpec], sweeps: Mapping[str, Sweep | None], kl: float | None, at_kl: AtKl) -> list[Arm]:
    """Return the unsteered model, and every spec at every value of its sweep; a value that does nothing is the unsteered model.

    Raises:
        SpecError: when a spec without a sweep does nothing.
    """
    found = [Arm(CostArm(name=UNSTEERED))]
    for name, spec in specs.items():
        sweep = sweeps[name]
        if sweep is None:
            here = spec if kl is None else at_kl(spec, kl)
            if not here.resolved():
                raise SpecError(f"steering={name!r} has no weight that is not zero, so there is nothing to measure. Give it weights.")
            found.append(Arm(CostArm(name=name, series=name, digest=here.digest, settings=_settings(here)), here))
            continue
        for value in sweep.values:
            here = _swept(sweep, spec, value, kl, at_kl)
            if here.resolved():
                title = f"{name}, {sweep.name} {value:g}"
                found.append(Arm(CostArm(name=title, series=name, x=value, digest=here.digest, settings=_settings(here)), here))
    return found


def side_effect_arms(spec: SteeringSpec, kl: float | None, at_kl: AtKl) -> list[Arm]:
    """Return each trait's vector of a spec's file by itself, at weight 1 and the spec's other settings."""
    assert spec.vectors is not None
    found = []
    for trait in TraitVectors.load(spec.vectors.verify()).meta.traits:
        alone = SteeringSpec.model_validate({**spec.model_dump(exclude={"sites", "comment"}), "weights": {trait: 1.0}, "layers": _layers(spec)})
        here = alone if kl is None else at_kl(alone, kl)
        found.append(Arm(CostArm(name=f"{trait} alone", trait=trait, digest=here.digest, settings=_settings(here)), here))
    return found


def prompted_arms(systems: Sequence[str]) -> list[Arm]:
    """Return the unsteered model with each of several system turns; those that begin alike are numbered."""
    found: dict[str, Arm] = {}
    for system in systems:
        short = name = f"prompted: {system if len(system) <= _SHOWN else f'{system[: _SHOWN - 1]}…'}"
        number = 1
        while name in found:
            number += 1
            name = f"{short} ({number})"
        found[name] = Arm(CostArm(name=name, series=name, settings={SYSTEM: system}), system=system)
    return list(found.values())


def trained_arm(name: str, adapter: Path) -> Arm:
    """Return the arm of a model that was trained, without steering, by its adapter's folder."""
    return Arm(CostArm(name=f"trained: {name}", series=f"trained: {name}", settings={ADAPTER: str(adapter)}))


def check_names(arms: Sequence[Arm | CostArm]) -> None:
    """Refuse two arms of one name, before anything is measured.

    Raises:
        UserError: when there are such.
    """
    names = [arm.name for arm in arms]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise UserError(f"two arms would be called {repeated[0]!r}. Rename the spec's file, or take swept values further apart.")


def trained_name(adapter: Path) -> str:
    """Return what a trained model is called in its experiment, or by its folder where there was none."""
    folder = adapter.resolve()
    job = folder.parent if folder.name == "adapter" else folder
    request = job / "request.json"  # of steered-lm traits train
    found = read_structured(request, error=UserError) if request.is_file() else None
    return str(found["name"]) if isinstance(found, dict) and found.get("name") else job.name


def _swept(sweep: Sweep, spec: SteeringSpec, value: float, kl: float | None, at_kl: AtKl) -> SteeringSpec:
    if sweep.setting == "kl" and value == 0:
        here = with_alpha(spec, 0.0)
        if here.resolved():
            raise SpecError("sweep: at kl=0 the spec still steers (clamp, or sites with an alpha of their own). Leave 0 out of the sweep.")
        return here
    if sweep.setting == "kl":
        return at_kl(spec, value)
    here = sweep.at(spec, value)
    return here if kl is None or not here.resolved() else at_kl(here, kl)


def _layers(spec: SteeringSpec) -> tuple[int, ...]:
    return spec.layers or tuple(layer for site in spec.sites for layer in site.layers)


def _settings(spec: SteeringSpec) -> dict[str, Scalar]:
    weights = ", ".join(f"{trait} {weight:g}" for trait, weight in spec.weights.items())
    found: dict[str, Scalar] = {"alpha": round(spec.alpha, 6), "layers": ", ".join(map(str, _layers(spec))), "weights": weights}
    return found | {"unit": spec.unit, "positions": spec.positions, "operation": spec.operation}
