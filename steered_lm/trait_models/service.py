"""What backends on somebody else's servers share: options that hold no key, the key itself, a job's record, and what a service does not take."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from steered_lm.config import Config, content_hash, file_hash, read_structured, write_atomic
from steered_lm.errors import near_misses
from steered_lm.judges.redact import Key
from steered_lm.trait_models.backend import TrainRequest
from steered_lm.trait_models.experiment import ExperimentError, Hyperparameters


class BackendOptions(Config):
    """Options of a backend; unknown ones are refused with near misses."""

    @classmethod
    def read(cls, backend: str, options: Mapping[str, Any]) -> Self:
        """Validate the options that an experiment gives a backend, without ever repeating a value that could be a key.

        Raises:
            ExperimentError: when an option is unknown or malformed.
        """
        unknown = sorted(set(options) - set(cls.model_fields))
        if unknown:
            keys = " A key is read from the environment only (key_env names the variable)." if "key_env" in cls.model_fields else ""
            raise ExperimentError(f"backend {backend} has no option {', '.join(unknown)}. {near_misses(unknown[0], cls.model_fields)}{keys}")
        return cls.parse(dict(options), source=f"training.options of backend {backend}", error=ExperimentError)


class ServiceOptions(BackendOptions):
    """Where a service is, and who asks.

    Attributes:
        base_url: its address.
        key_env: the environment variable that holds the key.
    """

    base_url: str
    key_env: str

    @classmethod
    def of_service(cls, backend: str, options: Mapping[str, Any], *, base_url: str, url_env: str, key_env: str) -> Self:
        """Validate options; ``base_url`` and ``key_env`` are the service's own, ``url_env`` the variable that holds another address.

        Raises:
            ExperimentError: when an option is unknown or malformed.
        """
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", str(options.get("key_env", key_env))):
            raise ExperimentError("key_env is not an environment variable's name in capitals; its value is not shown here, as it may be a key.")
        url = str(options.get("base_url") or os.environ.get(url_env) or base_url)
        if not re.fullmatch(r"https?://[^@?#\s]+", url):
            raise ExperimentError(
                "base_url must be http(s)://host/path without user, password or query; its value is not shown here, as it may hold a key."
            )
        return cls.read(backend, {"key_env": key_env, **options, "base_url": url.rstrip("/")})

    def key(self, backend: str) -> Key:
        """Return the key.

        Raises:
            ExperimentError: when the environment has none.
        """
        value = os.environ.get(self.key_env, "").strip()
        if not value:
            raise ExperimentError(
                f"backend {backend} needs a key, and the environment variable {self.key_env} is not set. "
                "Set it, or name another one with key_env in training.options."
            )
        return Key(value)


class Record(Config):
    """What a job's folder knows of it, in a file of its own."""

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """Return what a file says, or None when there is none.

        Raises:
            ExperimentError: when it is damaged.
        """
        return cls.parse(read_structured(file, error=ExperimentError), source=str(file), error=ExperimentError) if file.is_file() else None

    def write(self, file: Path) -> None:
        """Put this in the place of what a file says."""
        write_atomic(file, self.model_dump_json())


def asked_for(request: TrainRequest, identity: Mapping[str, Any]) -> str:
    """Return a hash of what decides the outcome: neither its place nor its name in the experiment makes another job of a request."""
    return content_hash([request.model_dump(mode="json", exclude={"data", "name", "device"}), dict(identity)])


def refuse_changed(request: TrainRequest) -> None:
    """Refuse data that are no longer what the request says.

    Raises:
        ExperimentError: when they have changed.
    """
    if file_hash(request.data) != request.data_hash:
        raise ExperimentError(f"model {request.name!r}: {str(request.data)!r} has changed since it was prepared. Run the command again.")


def refuse_untaken(backend: str, request: TrainRequest, taken: Iterable[str], advice: Mapping[str, str]) -> None:
    """Refuse everything of a request that a service would silently ignore.

    Args:
        backend: its name.
        request: what is asked for.
        taken: the hyperparameters that the service takes; all others must have their default values.
        advice: what to do about some of the others.

    Raises:
        ExperimentError: when something else is asked for.
    """
    where = f"model {request.name!r}: backend {backend}"
    if request.steering is not None:
        raise ExperimentError(f"{where} cannot steer while it trains (training.steering is set). Use backend peft, or leave training.steering out.")
    if request.device is not None:
        raise ExperimentError(f"{where} trains on the service's devices, and training.device is {request.device!r}. Leave it out.")
    if Path(request.base_model).expanduser().exists():
        raise ExperimentError(
            f"{where} trains the service's own models, and base_model {request.base_model!r} is a folder here. "
            "Name one of the service's models, or use backend peft."
        )
    plain = Hyperparameters()
    for name in sorted(set(Hyperparameters.model_fields) - set(taken)):
        value = getattr(request.hyperparameters, name)
        if value != getattr(plain, name):
            what_next = advice.get(name, f"Leave {name} out, or use backend peft.")
            raise ExperimentError(f"{where} takes no {name} (it is {value!r}); it takes {', '.join(sorted(taken))}. {what_next}")
