"""Endpoints on loopback that misbehave on purpose: one that answers by a test's script, one in a process of its own that fails by lot.

Run as a program it is the second one; :func:`remote` does that.
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


class Answer:
    """What a server sends: a status, a body, headers, and how long it sits still before."""

    def __init__(self, body: Any = "", status: int = 200, headers: dict[str, str] | None = None, hang: float = 0.0) -> None:
        self.body = body if isinstance(body, str) else json.dumps(body)
        self.status, self.headers, self.hang = status, headers or {}, hang


def says(content: Any, finish: str = "stop", refusal: str | None = None, usage: tuple[int, int] | None = None, **choice: Any) -> Answer:
    """A chat completion whose message has this content (objects become JSON)."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": text, "refusal": refusal}
    whole = {"index": 0, "finish_reason": finish, "message": message, **choice}
    counts = {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}}
    return Answer({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [whole], **counts})


def guesses(top: dict[str, float], usage: tuple[int, int] | None = None) -> Answer:
    """A chat completion of one token with its likeliest alternatives, as natural-log probabilities."""
    alternatives = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()]
    best = max(alternatives, key=lambda entry: float(entry["logprob"] or 0))
    return says(best["token"], "length", usage=usage, logprobs={"content": [{**best, "top_logprobs": alternatives}], "refusal": None})


def fault(status: int, message: str = "no", **headers: str) -> Answer:
    return Answer({"error": {"message": message, "type": "test", "code": None}}, status, {k.replace("_", "-"): v for k, v in headers.items()})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the usual five, connections that come together wait a second


class FaultServer:
    """Answers each request with what ``script`` returns for (its number from 0, its JSON body, its headers)."""

    def __init__(self, script: Callable[[int, dict[str, Any], Any], Answer]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.root}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.paths.append(handler.path)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        answer = self.script(number, body, handler.headers)
        self._released.wait(answer.hang)
        with self._lock:
            self.in_flight -= 1
        try:
            handler.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(answer.body.encode())))
            handler.end_headers()
            handler.wfile.write(answer.body.encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # the client gave up waiting, as it should

    def asked(self, count: int) -> int:
        """How many requests came, as soon as they are ``count``: a client that gives up may be faster than the thread that serves it."""
        deadline = time.monotonic() + 10
        while len(self.bodies) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(self.bodies)

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# -- the server in a process of its own ---------------------------------------------------------------------------------------------------------

HANG = "hang"
GARBAGE = ("html", "half", "words", "nan")
"""Bodies that are no answer, and answers that are no score."""
SHARES = {"429": 0.10, "500": 0.05, HANG: 0.02, "garbage": 0.02}


def right_score(reply: str) -> int:
    """The score, 1 to 5, that the server gives a text whenever it gives one."""
    return 1 + hashlib.sha256(reply.encode()).digest()[0] % 5


def outcome(seed: int, reply: str, attempt: int) -> str:
    """What becomes of an attempt: ``ok``, ``429``, ``500``, ``hang`` or a kind of garbage."""
    lot = hashlib.sha256(f"{seed}:{attempt}:{reply}".encode()).digest()
    drawn = int.from_bytes(lot[:4], "big") / 2**32
    for name, share in SHARES.items():
        if drawn < share:
            return GARBAGE[lot[4] % len(GARBAGE)] if name == "garbage" else name
        drawn -= share
    return "ok"


def response_to(reply: str, what: str) -> Answer:
    if what == "ok":
        return guesses({str(right_score(reply)): -0.1, "Well": -2.5}, usage=(100, 1))
    bodies = {
        "429": fault(429, "slow down", Retry_After="0.01"),
        "500": fault(500),
        "html": Answer("<html>maintenance</html>"),
        "half": Answer('{"choices": [{"mess'),
        "words": guesses({"Well": -0.1, "3": -4.0}),
        "nan": guesses({"4": float("nan")}),
    }
    return bodies[what]


class _Exchange(asyncio.Protocol):
    """One connection; requests in it are answered one after the other, as HTTP wants."""

    def __init__(self, given: argparse.Namespace, attempts: Counter[str]) -> None:
        self._given, self._attempts = given, attempts
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            self._serve(body)

    def _serve(self, body: bytes) -> None:
        if self._given.faults is None:
            return self._later(_CONSTANT)
        reply = json.loads(json.loads(body)["messages"][1]["content"])["reply"]
        what = outcome(self._given.faults, reply, self._attempts[reply])
        self._attempts[reply] += 1
        if self._given.log:
            with self._given.log.open("a") as log:
                log.write(json.dumps([reply, what]) + "\n")
        if what != HANG:
            self._later(_encoded(response_to(reply, what)))

    def _later(self, response: bytes) -> None:
        asyncio.get_running_loop().call_later(self._given.delay, self._send, response)

    def _send(self, response: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(response)  # type: ignore[attr-defined]


def _encoded(answer: Answer) -> bytes:
    body = answer.body.encode()
    head = [f"HTTP/1.1 {answer.status} Whatever", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, *(f"{name}: {value}" for name, value in answer.headers.items()), "", ""]).encode() + body


_CONSTANT = _encoded(guesses({str(score): -0.6 - score for score in range(20)}, usage=(700, 1)))


class Remote(NamedTuple):
    """A server in another process."""

    port: int
    url: str
    log: Path | None

    def asked(self) -> list[tuple[str, str]]:
        """Every attempt that arrived: the text, and what was made of it."""
        assert self.log is not None
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@contextmanager
def remote(*, delay: float = 0.0, faults: int | None = None, log: Path | None = None) -> Iterator[Remote]:
    """Run a server in a process of its own: ``faults`` seeds them; None has none, and one and the same answer to everything."""
    command = [sys.executable, __file__, "--delay", str(delay), *(["--faults", str(faults)] if faults is not None else [])]
    with subprocess.Popen([*command, *(["--log", str(log)] if log else [])], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield Remote(port, f"http://127.0.0.1:{port}/v1", log)
        finally:
            process.terminate()


async def _serve(given: argparse.Namespace) -> None:
    attempts: Counter[str] = Counter()
    server = await asyncio.get_running_loop().create_server(lambda: _Exchange(given, attempts), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--log", type=Path)
    asyncio.run(_serve(parser.parse_args()))
