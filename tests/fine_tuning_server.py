"""OpenAI's fine-tuning API on loopback: files, jobs and events are kept as the service keeps them, and a test says when something goes wrong."""

import email
import email.policy
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from loopback import Loopback

KEY = "sk-test-0123456789abcdef"
ENDED = ("succeeded", "failed", "cancelled")


class Fault(NamedTuple):
    """What happens instead of an answer; ``after`` does the work first, so that only the answer is lost.

    A status of 0 drops the connection.
    """

    status: int = 0
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    after: bool = False
    path: str = ""


def refusal(status: int, message: str, code: str | None = None, *, path: str = "", **headers: str) -> Fault:
    body = json.dumps({"error": {"message": message, "type": "test", "param": None, "code": code}})
    return Fault(status, body, (("content-type", "application/json"), *((k.replace("_", "-"), v) for k, v in headers.items())), path=path)


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FineTuningServer(Loopback):
    """The service. ``faults`` are used up one a request, in order; those with a ``path`` wait for a request whose line contains it."""

    path = "/v1"

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.jobs: list[dict[str, Any]] = []
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.filters = True
        self._lock = threading.Lock()
        self._clock = 1_700_000_000
        self.open()

    # -- what tests do to jobs ----------------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> dict[str, Any]:
        return next(job for job in self.jobs if job["id"] == name)

    def say(self, job: str, message: str) -> None:
        self._clock += 1
        event = {"id": f"ftevent-{self._clock}", "object": "fine_tuning.job.event", "created_at": self._clock, "level": "info", "message": message}
        self.events[job].append({**event, "type": "message", "data": {}})

    def move(self, job: str, status: str, **changes: Any) -> None:
        self._clock += 60
        self.job(job).update({"status": status, **({"finished_at": self._clock} if status in ENDED else {}), **changes})
        self.say(job, changes.get("said") or f"Job is {status}")

    def succeed(self, job: str) -> None:
        suffix = self.job(job)["suffix_"] or ""
        self.say(job, "Step 30/30: training loss=0.81")
        self.move(job, "succeeded", fine_tuned_model=f"ft:{self.job(job)['model']}:org:{suffix}:{job[-4:]}", trained_tokens=4321)

    # -- what the service does ----------------------------------------------------------------------------------------------------------------

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        line = f"{handler.command} {handler.path}"
        with self._lock:
            self.requests.append(line)
            number = next((index for index, fault in enumerate(self.faults) if fault.path in line), None)
            fault = None if number is None else self.faults.pop(number)
            if fault is not None and not fault.after:
                return self._send(handler, fault)
            try:
                if handler.headers.get("authorization") != f"Bearer {KEY}":
                    raise _Refused(401, f"Incorrect API key provided: {handler.headers.get('authorization')}")
                answer = Fault(200, json.dumps(self._answer(handler, content)), (("content-type", "application/json"),))
            except _Refused as refused:
                answer = refusal(refused.status, str(refused))
            self._send(handler, answer if fault is None else fault)

    def _send(self, handler: BaseHTTPRequestHandler, answer: Fault) -> None:
        handler.close_connection = True
        if answer.status == 0:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(answer.status)
        for name, value in answer.headers:
            handler.send_header(name, value)
        payload = answer.body.encode()
        handler.send_header("content-length", str(len(payload)))
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(payload)

    def _answer(self, handler: BaseHTTPRequestHandler, content: bytes) -> dict[str, Any]:
        address = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        match handler.command, address.path.removeprefix("/v1/").split("/"):
            case "POST", ["files"]:
                return self._upload(handler.headers["content-type"], content)
            case "GET", ["files", name]:
                return self._found(self.files.get(name), "file", name)
            case "POST", ["fine_tuning", "jobs"]:
                return self._create(json.loads(content))
            case "GET", ["fine_tuning", "jobs"]:
                return self._page(self._matching(query), query)
            case "GET", ["fine_tuning", "jobs", name]:
                return self._known(name)
            case "GET", ["fine_tuning", "jobs", name, "events"]:
                self._known(name)
                return self._page(self.events[name][::-1], query)
            case "POST", ["fine_tuning", "jobs", name, "cancel"]:
                if self._known(name)["status"] in ENDED:
                    raise _Refused(400, "Job has already completed")
                self.move(name, "cancelled")
                return self._known(name)
        raise _Refused(404, f"Unknown request URL: {handler.command} {handler.path}")

    def _upload(self, kind: str, content: bytes) -> dict[str, Any]:
        form = email.message_from_bytes(b"content-type: " + kind.encode() + b"\r\n\r\n" + content, policy=email.policy.HTTP)
        parts = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        if parts["purpose"].get_content().strip() != "fine-tune":
            raise _Refused(400, "purpose")
        payload = parts["file"].get_payload(decode=True)
        assert isinstance(payload, bytes)
        name = f"file-{len(self.files)}"
        self.contents[name] = payload
        about = {"object": "file", "bytes": len(payload), "created_at": self._clock, "filename": parts["file"].get_filename()}
        self.files[name] = {"id": name, **about, "purpose": "fine-tune", "status": "processed"}
        return self.files[name]

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(asked)
        if asked["training_file"] not in self.files:
            raise _Refused(400, f"invalid training_file: {asked['training_file']}")
        if asked["model"].startswith("unknown"):
            raise _Refused(400, f"Model {asked['model']} is not available for fine-tuning or does not exist.")
        self._clock += 1
        name = f"ftjob-{len(self.jobs):04d}"
        chosen = {"learning_rate_multiplier": 1.8, **asked["method"]["supervised"]["hyperparameters"]}
        self.jobs.insert(
            0,
            {
                "id": name,
                "object": "fine_tuning.job",
                "created_at": self._clock,
                "finished_at": None,
                "model": asked["model"],
                "fine_tuned_model": None,
                "organization_id": "org",
                "status": "validating_files",
                "training_file": asked["training_file"],
                "validation_file": None,
                "result_files": [],
                "trained_tokens": None,
                "error": {},  # as the service has it while there is none
                "seed": asked.get("seed", 7),
                "metadata": asked.get("metadata"),
                "hyperparameters": chosen,
                "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
                "suffix_": asked.get("suffix"),
            },
        )
        self.events[name] = []
        self.say(name, f"Created fine-tuning job: {name}")
        return self.job(name)

    def _matching(self, query: dict[str, str]) -> list[dict[str, Any]]:
        wanted = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[")}
        return [job for job in self.jobs if not self.filters or wanted.items() <= (job["metadata"] or {}).items()]

    def _page(self, rows: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        start = 1 + [row["id"] for row in rows].index(query["after"]) if "after" in query else 0
        end = start + int(query.get("limit", 20))
        return {"object": "list", "data": rows[start:end], "has_more": end < len(rows)}

    def _known(self, name: str) -> dict[str, Any]:
        return self._found(next((job for job in self.jobs if job["id"] == name), None), "fine-tuning job", name)

    @staticmethod
    def _found(row: dict[str, Any] | None, kind: str, name: str) -> dict[str, Any]:
        if row is None:
            raise _Refused(404, f"Could not find {kind}: {name}")
        return row
