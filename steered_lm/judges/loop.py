"""An event loop for code that has none, or has one that it cannot wait in."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_GLANCE = 0.1  # seconds between looks at whether the caller was cancelled


def run(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, in a thread of its own when this one already runs an event loop (Inspect, notebooks).

    Ctrl-C, or the cancellation of a caller that is a task, cancels the coroutine and waits for its end.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    caller = asyncio.current_task()
    before = caller.cancelling() if caller else 0
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await start()

    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(lambda: asyncio.run(main()))
        try:
            while not wait([running], timeout=_GLANCE).done:
                if caller and caller.cancelling() > before:  # all that Ctrl-C does to a task whose thread sits here
                    raise asyncio.CancelledError
            return running.result()
        except BaseException:
            # the interruption came to this thread, and the other one would go on
            if not running.done():
                with suppress(RuntimeError):  # it has ended since, and its loop is closed
                    loop, task = started.result()
                    loop.call_soon_threadsafe(task.cancel)
            raise
