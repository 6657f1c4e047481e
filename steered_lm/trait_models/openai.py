"""OpenAI's fine-tuning API, through its own client library; needs ``pip install 'steered-lm[openai]'``.

A job costs money, so none is made twice: a name for it is written down before it is made, the service keeps that name in the job's metadata,
and whenever it is uncertain what became of a request, the service is asked for a job of that name first.
"""

import logging
import re
import uuid
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Self

from steered_lm.config import content_hash
from steered_lm.trait_models.backend import FINISHED, JobState, Status, TrainedModel, TrainRequest
from steered_lm.trait_models.experiment import ExperimentError
from steered_lm.trait_models.openai_client import Client, Event, Job, OpenAIOptions, RefusedError, connect, event_of, file_of, job_of, rows
from steered_lm.trait_models.service import Record, asked_for, refuse_changed, refuse_untaken

_log = logging.getLogger(__name__)
_RECORD = "openai.json"
_NAME = "steered_lm"  # the key in a job's metadata
_TAKEN = ("epochs", "batch_size", "gradient_accumulation")
_ADVICE = {
    "learning_rate": "It takes a factor on a rate of its own choice: set learning_rate_multiplier in training.options, and leave learning_rate out.",
    "lora_rank": "It does not say how it adapts a model: leave lora_rank out, or use backend peft.",
}
_FEWEST = 10  # examples, by the service's own guide
_LONGEST_SUFFIX = 64
_LARGEST_SEED = 2**31 - 1
_PAGE = 100
_EVENTS = 20  # the newest come first; a few more, in case some of one second are mixed up
_STATUS: dict[str, Status] = {"validating_files": "queued", "queued": "queued", **{status: status for status in FINISHED}}
_STEP = re.compile(r"[Ss]tep (\d+)/(\d+)")


class _Record(Record):
    """What a job's folder knows of it.

    Attributes:
        request: hash of what was asked for.
        name: the job's name in the service's metadata.
        file: the uploaded data; an upload that was not written down costs nothing and is done again.
        job: the service's id of the job, once it is known.
    """

    request: str
    name: str
    file: str | None = None
    job: str | None = None


class OpenAIBackend:
    """Trains models at OpenAI, or wherever ``base_url`` speaks the same API."""

    name = "openai"
    parallel = 3  # jobs beyond what an account may run wait in the service's own queue

    def __init__(self, options: OpenAIOptions) -> None:
        """Take checked options; a key is looked for when the service is asked."""
        self._options = options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make it from an experiment's ``training.options``.

        Raises:
            ExperimentError: when an option is unknown or malformed.
        """
        own = {"base_url": "https://api.openai.com/v1", "url_env": "OPENAI_BASE_URL", "key_env": "OPENAI_API_KEY"}
        return cls(OpenAIOptions.of_service(cls.name, options, **own))

    def check(self, request: TrainRequest) -> None:
        """Refuse what the service does not take, and a missing key or library; nothing is sent.

        Raises:
            ExperimentError: when the request cannot be trained.
            MissingDependencyError: when ``openai`` is not installed.
        """
        refuse_untaken(self.name, request, _TAKEN, _ADVICE)
        where = f"model {request.name!r}: backend {self.name}"
        epochs = request.hyperparameters.epochs
        if epochs != int(epochs):
            raise ExperimentError(f"{where} trains whole epochs, and epochs is {epochs}. Use a whole number.")
        if len(request.suffix) > _LONGEST_SUFFIX:
            raise ExperimentError(f"{where} takes a suffix of at most {_LONGEST_SUFFIX} characters, and it has {len(request.suffix)}. Shorten it.")
        if not 0 <= request.seed <= _LARGEST_SEED:
            raise ExperimentError(f"{where} takes a seed from 0 to {_LARGEST_SEED}, and it is {request.seed}. Choose another.")
        with request.data.open(encoding="utf-8") as lines:
            examples = sum(1 for line in lines if line.strip())
        if examples < _FEWEST:
            raise ExperimentError(f"{where} needs {_FEWEST} examples, and {str(request.data)!r} has {examples}. Add some, or raise sample_size.")
        with connect(self._options):
            pass

    def identity(self, request: TrainRequest) -> Mapping[str, Any]:
        """Return where the model is trained, and the rate's factor."""
        return {
            "base_model": request.base_model,
            "base_url": self._options.base_url,
            "learning_rate_multiplier": self._options.learning_rate_multiplier,
        }

    def submit(self, request: TrainRequest, folder: Path) -> str:
        """Upload the data and start the job, or return the job that was started before, unless that failed or was cancelled.

        Raises:
            UnreachableError: when the service cannot be reached; submitting again finds what was started.
            ExperimentError: when the service refuses.
        """
        asked = asked_for(request, self.identity(request))
        file = folder / _RECORD
        record = _Record.read(file)
        with connect(self._options) as client:
            if record is not None and record.request == asked:
                job = self._earlier(client, record)
                if job is not None and _STATUS.get(job.status) not in ("failed", "cancelled"):
                    record.model_copy(update={"job": job.id}).write(file)
                    return job.id
                if job is not None:  # it ended badly: another job under another name, with the data that is there
                    record = _Record(request=asked, name=uuid.uuid4().hex, file=record.file)
            else:
                record = _Record(request=asked, name=uuid.uuid4().hex)
            record = record.model_copy(update={"file": self._uploaded(client, request, record.file)})
            record.write(file)  # before the job is made, so that a crash in between leaves its name
            job = self._made(client, request, record)
            record.model_copy(update={"job": job.id}).write(file)
            return job.id

    def poll(self, job: str, folder: Path) -> JobState:
        """Ask the service how the job stands.

        Raises:
            UnreachableError: when the service cannot be reached; the job goes on regardless.
            ExperimentError: when the service does not know the job.
        """
        with connect(self._options) as client:
            found = self._job(client, job)
            said = client.ask("a question for a job's events", lambda: _events(client, job))
        detail = max(said, key=lambda event: event.created_at).message if said else found.status
        status = _STATUS.get(found.status, "running")
        if status == "succeeded" and not found.fine_tuned_model:
            return JobState(status="failed", error=f"job {job} succeeded, but the service names no model: ask its support", detail=detail)
        if status == "succeeded":
            return JobState(status=status, model=_model(found, detail, self._options), progress=1.0, detail=detail)
        if status in FINISHED:
            reason = (found.error.message if found.error else None) or detail
            return JobState(status=status, error=f"job {job} {status}: {reason}", detail=detail)
        steps = [match for event in said if (match := _STEP.search(event.message))]
        progress = max((min(1.0, int(step[1]) / max(1, int(step[2]))) for step in steps), default=None)
        return JobState(status=status, progress=progress, detail=detail)

    def cancel(self, job: str, folder: Path) -> None:
        """Stop the job; one that has ended stays as it is.

        Raises:
            UnreachableError: when the service cannot be reached.
            ExperimentError: when the service does not know the job, or will not stop it.
        """
        with connect(self._options) as client:
            if _STATUS.get(self._job(client, job).status) in FINISHED:
                return
            try:
                client.ask("a cancellation", lambda: client.jobs.cancel(job))
            except RefusedError:
                if _STATUS.get(self._job(client, job).status) not in FINISHED:  # it did not just end by itself
                    raise

    def _job(self, client: Client, job: str) -> Job:
        try:
            return client.ask("a question for a job", lambda: job_of(client.jobs.retrieve(job)))
        except RefusedError as refused:
            if refused.status != 404:
                raise
            raise ExperimentError(
                f"{self._options.base_url} does not know job {job}. Is the key in {self._options.key_env} that of the account which started it? "
                f"If the job is gone for good, remove {_RECORD} from its folder, and it is trained anew."
            ) from None

    def _earlier(self, client: Client, record: _Record) -> Job | None:
        """Return the job that a record is of, if there is one; its id may have been lost in a crash."""
        if record.job is not None:
            return self._job(client, record.job)
        found = client.ask("a list of jobs", lambda: _named(client, record.name))
        if found is not None:
            _log.info("found job %s, which was started before a crash", found.id)
        return found

    def _uploaded(self, client: Client, request: TrainRequest, known: str | None) -> str:
        """Return the id of the uploaded data; ``known`` is that of an earlier upload of the same request, and so of the same bytes."""
        refuse_changed(request)
        if known is not None:
            try:
                return client.ask("a question for a file", lambda: file_of(client.api.files.retrieve(known)))
            except RefusedError as refused:
                if refused.status != 404:
                    raise
        named = f"{request.name}-{request.data_hash[:16]}.jsonl"
        return client.ask("an upload", lambda: file_of(client.api.files.create(file=(named, request.data.read_bytes()), purpose="fine-tune")))

    def _made(self, client: Client, request: TrainRequest, record: _Record) -> Job:
        """Make the job; from the second attempt on, only if there is none of its name."""
        hyperparameters: dict[str, Any] = {
            "n_epochs": int(request.hyperparameters.epochs),
            "batch_size": request.hyperparameters.batch_size * request.hyperparameters.gradient_accumulation,
        }
        if self._options.learning_rate_multiplier is not None:
            hyperparameters["learning_rate_multiplier"] = self._options.learning_rate_multiplier
        asked: dict[str, Any] = {
            "model": request.base_model,
            "training_file": record.file,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "metadata": {_NAME: record.name},
            "seed": request.seed,
            **({"suffix": request.suffix} if request.suffix else {}),
        }
        attempts = 0

        def make() -> Job:
            nonlocal attempts
            attempts += 1
            found = _named(client, record.name) if attempts > 1 else None
            return found or job_of(client.jobs.create(**asked))

        return client.ask("a fine-tuning job", make)


def _events(client: Client, job: str) -> list[Event]:
    """Return the newest events of a job."""
    return [event_of(answer) for answer in islice(rows(lambda: client.jobs.list_events(job, limit=_EVENTS)), _EVENTS)]


def _named(client: Client, name: str) -> Job | None:
    """Return the job that has this name in its metadata; compared here too, as not every server that speaks the API filters."""
    answers = rows(lambda: client.jobs.list(limit=_PAGE, metadata={_NAME: name}))
    return next((job for job in map(job_of, answers) if (job.metadata or {}).get(_NAME) == name), None)


def _model(job: Job, last: str, options: OpenAIOptions) -> TrainedModel:
    name = str(job.fine_tuned_model)
    seconds = None if job.finished_at is None or job.created_at is None else job.finished_at - job.created_at
    facts = {"job": job.id, "trained_tokens": job.trained_tokens, "seconds": seconds, "seed": job.seed, "hyperparameters": job.used, "last": last}
    place = {"base_url": options.base_url, "key_env": options.key_env}
    return TrainedModel(backend=OpenAIBackend.name, model_id=name, inspect=f"openai/{name}", **place, digest=content_hash(name), facts=facts)
