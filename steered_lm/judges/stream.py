"""Judging in the background: responses are judged as they come, while the model writes the next ones."""

import threading
from collections.abc import Hashable, Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Self

from steered_lm.judges.base import Judge, JudgeRequest, Verdict

_PATIENCE = 0.01


class JudgeStream:
    """Hands responses to a judge in a thread of its own; each call of the judge takes all that have come since the last one.

    It pays off for judges that wait for an answer (``remote``); one that computes would compete with the model for the processor.

    Attributes:
        busy_seconds: how long the judge worked.
        waited_seconds: how long :meth:`verdicts` waited for it, which is what judging added to the run.
    """

    def __init__(self, judge: Judge) -> None:
        """Nothing runs before the ``with`` block."""
        self._judge = judge
        self._waiting: list[tuple[Hashable, JudgeRequest]] = []
        self._found: dict[Hashable, Verdict] = {}
        self._changed = threading.Condition()
        self._problem: BaseException | None = None
        self._closed = False
        self._pending = 0
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self.busy_seconds = self.waited_seconds = 0.0

    def put(self, key: Hashable, request: JudgeRequest) -> None:
        """Have a response judged; its verdict will be found under ``key``."""
        with self._changed:
            self._waiting.append((key, request))
            self._pending += 1
            self._changed.notify_all()

    def verdicts(self, keys: Sequence[Hashable]) -> list[Verdict]:
        """Return the verdicts of ``keys``, in order, when all responses so far are judged.

        Raises:
            Exception: whatever the judge raised.
        """
        started = perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._problem is not None or not self._pending)
        self.waited_seconds += perf_counter() - started
        if self._problem is not None:
            raise self._problem
        found: Mapping[Hashable, Verdict] = self._found
        return [found[key] for key in keys]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                # rows that end in the same step arrive together: a moment's patience makes them one batch
                self._changed.wait_for(lambda: self._closed, timeout=_PATIENCE)
                if self._closed:
                    return
                batch, self._waiting = self._waiting, []
            started = perf_counter()
            try:
                verdicts = self._judge.judge([request for _, request in batch])
            except Exception as problem:  # it belongs to whoever waits for the verdicts
                with self._changed:
                    self._problem = problem
                    self._changed.notify_all()
                return
            with self._changed:
                self.busy_seconds += perf_counter() - started
                self._found.update(zip((key for key, _ in batch), verdicts, strict=True))
                self._pending -= len(batch)
                self._changed.notify_all()

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let the thread end; what is still waiting is not judged."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def is_remote(judge: Judge) -> bool:
    """Return whether a judge spends its time waiting for somebody else's answer (its attribute ``remote``)."""
    return bool(getattr(judge, "remote", False))
