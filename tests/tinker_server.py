"""Tinker's API on loopback, for its real SDK: sessions, models, gradients, optimiser steps and checkpoints, in the order that the service demands.

The model is a number: after n optimiser steps every token has log-probability ``-LOSS * DECAY**n``, so a loss tells how many steps were done.
"""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import numpy as np
from loopback import Loopback
from tinker.proto import tinker_public_pb2 as wire

KEY = "tml-test-0123456789abcdef"
LOSS, DECAY = 4.0, 0.9


class Fault(NamedTuple):
    """What a request whose path contains ``path`` gets instead of an answer; a status of 0 drops the connection."""

    status: int
    path: str
    message: str = "no"


class Model:
    """A model in training."""

    def __init__(self, name: str, base: str, lora: dict[str, Any] | None, steps: int = 0) -> None:
        self.name, self.base, self.lora, self.steps = name, base, lora, steps
        self.next, self.pending = 1, 0


class Batch(NamedTuple):
    """What came with a request for gradients: the tokens and weights of each example."""

    tokens: list[list[int]]
    targets: list[list[int]]
    weights: list[list[float]]
    after: int


class TinkerServer(Loopback):
    """The service. ``faults`` are used up by the first request that each fits; ``refuse`` makes requests of that kind fail in their result."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.checkpoints: dict[str, Model] = {}
        self.results: dict[str, Any] = {}
        self.asked_before: set[str] = set()
        self.batches: list[Batch] = []
        self.rates: list[dict[str, float]] = []
        self.sessions: list[dict[str, Any]] = []
        self.ends: list[str] = []
        self.paths: list[str] = []
        self.faults: list[Fault] = []
        self.refuse: dict[str, str] = {}
        self.wrong: list[str] = []
        self.delay = 0.0
        self._lock = threading.Lock()
        self.open()

    @property
    def steps(self) -> int:
        """Optimiser steps that were done for anybody."""
        return len(self.rates)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        path = handler.path.removeprefix("/api/v1/")
        with self._lock:
            self.paths.append(path)
            number = next((i for i, fault in enumerate(self.faults) if fault.path in path), None)
            fault = None if number is None else self.faults.pop(number)
            if fault is None and handler.headers.get("x-api-key") != KEY:
                fault = Fault(401, "", f"unknown key {handler.headers.get('x-api-key')}")
            status, answer = (fault.status, {"detail": fault.message}) if fault else (200, self._answer(path, content))
        handler.close_connection = True
        if status == 0:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        time.sleep(self.delay if path == "optim_step" else 0)
        if answer is None:
            status, answer = 404, {"detail": f"no such path: {path}"}
        proto = isinstance(answer, bytes)
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            handler.send_response(status)
            handler.send_header("content-type", "application/x-protobuf" if proto else "application/json")
            handler.send_header("content-length", str(len(payload)))
            handler.send_header("connection", "close")
            handler.end_headers()
            handler.wfile.write(payload)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client was killed

    def _answer(self, path: str, content: bytes) -> Any:
        if path == "forward_backward":
            return self._gradients(content)
        asked = json.loads(content) if content else {}
        match path.split("/"):
            case ["client", "config"]:
                return {"proto_compress_fwdbwd": False}
            case ["client", "dynamic_config"] | ["session_heartbeat"]:
                return {}
            case ["create_session"]:
                self.sessions.append(asked)
                return {"type": "create_session", "session_id": f"session-{len(self.sessions)}"}
            case ["sessions", _, "finish"]:
                self.ends.append(asked["reason"]["type"])
                return {}
            case ["create_model"]:
                model = Model(f"{asked['session_id']}:train:{asked['model_seq_id']}", asked["base_model"], asked["lora_config"])
                self.models[model.name] = model
                return self._later("create_model", {"type": "create_model", "model_id": model.name})
            case ["load_weights"]:
                return self._load(asked)
            case ["get_info"]:
                model = self.models[asked["model_id"]]
                about = {"model_name": model.base, "tokenizer_id": model.base}
                return {"type": "get_info", "model_id": model.name, "model_data": about, "is_lora": True, "lora_rank": 8}
            case ["optim_step"]:
                model = self._turn(asked)
                if not model.pending:
                    self.wrong.append("an optimiser step without gradients")
                model.pending, model.steps = 0, model.steps + 1
                self.rates.append(asked["adam_params"])
                return self._later("optim_step", {"type": "optim_step"})
            case ["save_weights"]:
                return self._save(asked, "weights")
            case ["save_weights_for_sampler"]:
                return self._save(asked, "sampler_weights")
            case ["retrieve_future"]:
                return self._retrieve(asked["request_id"])
        return None

    def _turn(self, asked: dict[str, Any]) -> Model:
        model = self.models[asked["model_id"]]
        if asked["seq_id"] != model.next:
            self.wrong.append(f"request {asked['seq_id']} instead of {model.next}")
        model.next += 1
        return model

    def _gradients(self, content: bytes) -> Any:
        request = wire.ForwardBackwardRequest.FromString(content)
        model = self._turn({"model_id": request.model_id, "seq_id": request.seq_id})
        model.pending += 1
        if request.loss_fn != "cross_entropy" or request.forward_only:
            self.wrong.append(f"loss {request.loss_fn}")
        tokens = [[int(t) for chunk in datum.model_input for t in np.frombuffer(chunk.encoded_text.tokens, np.int32)] for datum in request.data]
        targets = [np.frombuffer(datum.loss_fn_inputs["target_tokens"].dense, np.int64).tolist() for datum in request.data]
        weights = [np.frombuffer(datum.loss_fn_inputs["weights"].dense, np.float32) for datum in request.data]
        self.batches.append(Batch(tokens, targets, [list(map(float, row)) for row in weights], model.steps))
        logprob = -LOSS * DECAY**model.steps
        said = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
        said.metrics["loss:sum"] = float(-logprob * sum(float(row.sum()) for row in weights))
        record = said.loss_fn_outputs.add()
        record.num_datums = len(weights)
        field = record.fields["logprobs"]
        field.dtype = wire.DTYPE_FLOAT32
        field.data = np.full(sum(map(len, weights)), logprob, np.float32).tobytes()
        field.offsets = np.cumsum([0, *(4 * len(row) for row in weights)]).astype(np.int64).tobytes()
        return self._later("forward_backward", said.SerializeToString())

    def _load(self, asked: dict[str, Any]) -> Any:
        if asked["path"] not in self.checkpoints:
            return self._later("load_weights", {"error": f"checkpoint {asked['path']} not found", "category": "user"})
        saved = self.checkpoints[asked["path"]]
        name = f"{asked['session_id']}:train:{asked['model_seq_id']}"
        self.models[name] = Model(name, saved.base, saved.lora, saved.steps if asked["optimizer"] else 0)
        return self._later("load_weights", {"type": "load_weights", "path": asked["path"]})

    def _save(self, asked: dict[str, Any], kind: str) -> Any:
        model = self._turn(asked)
        path = f"tinker://{model.name.replace(':', '-')}/{kind}/{asked['path']}"
        self.checkpoints[path] = Model(model.name, model.base, model.lora, model.steps)
        name = {"weights": "save_weights", "sampler_weights": "save_weights_for_sampler"}[kind]
        return self._later(name, {"type": name, "path": path})

    def _later(self, kind: str, result: Any) -> dict[str, Any]:
        name = f"request-{len(self.results)}"
        self.results[name] = {"error": self.refuse[kind], "category": "user"} if kind in self.refuse else result
        return {"request_id": name}

    def _retrieve(self, name: str) -> Any:
        if name not in self.asked_before:
            self.asked_before.add(name)
            return {"type": "try_again", "request_id": name, "queue_state": "active"}
        return self.results[name]
