"""Concurrent requests to batches: whoever holds the lock runs everything that waits."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio
from anyio import from_thread, to_thread

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")
Deliver = Callable[[int, ResultT | Exception], None]
"""Hands over the result of a batch's request by its number, before the others are there."""


class _Waiter(Generic[RequestT, ResultT]):
    def __init__(self, request: RequestT) -> None:
        self.request = request
        self.outcome: list[ResultT | Exception] = []
        self.settled = anyio.Event()

    def settle(self, outcome: ResultT | Exception) -> None:
        self.outcome.append(outcome)
        self.settled.set()


class Batcher(Generic[RequestT, ResultT]):
    """Collects requests that are awaited at the same time and runs them together, one batch at a time, in a worker thread.

    No thread or queue outlives a request, so there is nothing to shut down: the first request to arrive waits until arrivals pause for
    ``window`` seconds (or the batch is full), runs the batch, and the requests that came meanwhile form the next one. A result that the
    run delivers early reaches its request at once; only the request that runs the batch stays to its end.
    """

    def __init__(
        self,
        run: Callable[[Sequence[RequestT], Deliver[ResultT]], Sequence[ResultT | Exception]],
        *,
        max_size: int,
        size: Callable[[RequestT], int] = lambda request: 1,
        window: float = 0.004,
        lock: anyio.Lock | None = None,
    ) -> None:
        """Prepare a batcher.

        Args:
            run: maps a batch to one result a request, in order; its second argument delivers one of them early. A result that is an
                exception reaches that request alone; a raised exception reaches every request of the batch that has no result yet.
            max_size: largest total size of a batch; a request that is larger by itself runs alone.
            size: how much of ``max_size`` a request takes.
            window: seconds without a new request after which a batch starts.
            lock: shared with other batchers whose batches must not run at the same time as this one's.
        """
        self._run = run
        self._max_size = max_size
        self._size = size
        self._window = window
        self._waiting: list[_Waiter[RequestT, ResultT]] = []
        self._lock = lock or anyio.Lock()

    async def submit(self, request: RequestT) -> ResultT:
        """Return the request's result, or raise what ``run`` gave or raised for it."""
        waiter = _Waiter[RequestT, ResultT](request)
        self._waiting.append(waiter)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._take_turns, waiter)
                await waiter.settled.wait()
                group.cancel_scope.cancel()
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        outcome = waiter.outcome[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _take_turns(self, waiter: _Waiter[RequestT, ResultT]) -> None:
        while not waiter.outcome:
            async with self._lock:
                if not waiter.outcome:
                    await self._arrivals_to_pause()
                    # whoever runs a batch works for the others: neither its own early result nor its cancellation ends that
                    with anyio.CancelScope(shield=True):
                        batch = self._take()
                        outcomes = await to_thread.run_sync(self._outcomes, batch)
                    for other, outcome in zip(batch, outcomes, strict=True):
                        if not other.outcome:
                            other.settle(outcome)

    async def _arrivals_to_pause(self) -> None:
        seen = 0
        while seen < len(self._waiting) and sum(self._size(w.request) for w in self._waiting) < self._max_size:
            seen = len(self._waiting)
            await anyio.sleep(self._window)

    def _take(self) -> list[_Waiter[RequestT, ResultT]]:
        taken, total = 0, 0
        for waiter in self._waiting:
            total += self._size(waiter.request)
            if taken and total > self._max_size:
                break
            taken += 1
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    def _outcomes(self, batch: Sequence[_Waiter[RequestT, ResultT]]) -> Sequence[ResultT | Exception]:
        def deliver(number: int, outcome: ResultT | Exception) -> None:
            from_thread.run_sync(batch[number].settle, outcome)

        try:
            outcomes = self._run([waiter.request for waiter in batch], deliver)
            assert len(outcomes) == len(batch), f"a batch of {len(batch)} gave {len(outcomes)} results"
        except Exception as error:  # whatever it is, every request of the batch waits for it and has to hear of it
            return [error] * len(batch)
        return outcomes
