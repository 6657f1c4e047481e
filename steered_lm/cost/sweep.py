"""A sweep: one setting of a steering spec at several values."""

import math
from typing import Literal, Self

from steered_lm.config import Config
from steered_lm.errors import SpecError, UserError, near_misses
from steered_lm.steering.spec import SteeringSpec

Setting = Literal["alpha", "kl", "layer", "weight"]
MOST = 200
_FORM = "Write name=start:stop:step or name=a,b,c, such as alpha=0:3:0.5, kl=0.02,0.05,0.1, layer=1:4 or formality=-1:1:0.5."


class Sweep(Config):
    """A setting and its values.

    Attributes:
        setting: ``alpha``; ``kl``: alpha at which the spec is that many nats a token away from the unsteered model; ``layer``: the one block that is
            steered; ``weight``: that of one trait.
        trait: of ``weight``: whose.
        values: in order, each once.
    """

    setting: Setting
    trait: str | None = None
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """What is swept, in words."""
        return f"weight of {self.trait}" if self.setting == "weight" else self.setting

    @classmethod
    def of_text(cls, text: str, spec: SteeringSpec) -> Self:
        """Return the sweep that ``alpha=0:3:0.5`` asks for; a name that is no setting is a trait of the spec.

        Raises:
            UserError: when it is malformed, or values are out of range.
        """
        name, sign, listed = (part.strip() for part in text.partition("="))
        if not sign or not listed:
            raise UserError(f"sweep={text!r} has no values. {_FORM}")
        values = _values(text, listed)
        if name in ("alpha", "kl", "layer"):
            found = cls.model_validate({"setting": name, "values": values})
        else:
            trait = name.removeprefix("weight.").removeprefix("weight of ")
            if trait not in spec.weights:
                known = ["alpha", "kl", "layer", *spec.weights]
                raise UserError(f"sweep={text!r}: {name!r} is neither a setting nor a trait of the spec. {near_misses(trait, known)} {_FORM}")
            found = cls(setting="weight", trait=trait, values=values)
        if found.setting == "layer" and any(value != int(value) or value < 0 for value in values):
            raise UserError(f"sweep={text!r}: layers are whole numbers from 0 on, one block each.")
        if found.setting == "kl" and min(values) < 0:
            raise UserError(f"sweep={text!r}: a KL divergence is not negative. {_FORM}")
        return found

    def at(self, spec: SteeringSpec, value: float) -> SteeringSpec:
        """Return the spec with the setting at a value; a sweep over ``kl`` needs the model, see ``measure.divergence.calibrated``.

        Raises:
            SpecError: when the spec's sites have settings of their own in place of the swept one.
        """
        assert self.setting != "kl"
        own = {"alpha": "alpha", "layer": "layers", "weight": "weights"}[self.setting]
        if any(getattr(site, own) is not None for site in spec.sites):
            raise SpecError(
                f"sweep over {self.name}: sites of the spec have {own} of their own, which the sweep would not change. Leave it out of the sites."
            )
        if self.setting == "weight":
            assert self.trait is not None
            return spec.with_weights({**spec.weights, self.trait: value})
        changed = {"layers": (int(value),)} if self.setting == "layer" else {"alpha": value}
        return SteeringSpec.model_validate({**spec.model_dump(), **changed})


def _values(text: str, listed: str) -> tuple[float, ...]:
    try:
        numbers = [float(part) for part in listed.replace(";", ",").replace(":", ",").split(",")]
    except ValueError:
        raise UserError(f"sweep={text!r} holds something that is no number. {_FORM}") from None
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"sweep={text!r}: values must be finite. {_FORM}")
    if ":" not in listed:
        found = numbers
    else:
        if "," in listed or ";" in listed or len(numbers) not in (2, 3):
            raise UserError(f"sweep={text!r} is neither a range nor a list. {_FORM}")
        start, stop, step = (*numbers, 1.0)[:3]
        if step <= 0 or stop < start:
            raise UserError(f"sweep={text!r}: the step must be above 0 and the end not below the start. {_FORM}")
        count = math.floor((stop - start) / step + 1e-9) + 1
        if count > MOST:
            raise UserError(f"sweep={text!r} has {count} values; {MOST} are allowed. Take a larger step.")
        # decimal steps come out as they are written, 0.3 and not 0.30000000000000004
        found = [round(start + step * number, 12) for number in range(count)]
    if len(set(found)) != len(found):
        raise UserError(f"sweep={text!r} names a value twice. {_FORM}")
    return tuple(sorted(found))
