"""A job's own process, and the lock of its folder, which it holds for as long as it lives; the kernel lets go of it, however it ends."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_FILE = "job.lock"
_PAUSE = 0.05  # seconds between two attempts
_children: list[int] = []  # processes that this one started


class JobLock:
    """The lock on a job's folder. A process that is started with its descriptor holds it, too, and alone once the starter lets go."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor that holds the lock."""
        self.descriptor = descriptor

    @classmethod
    def take(cls, folder: Path, patience: float = 0.0) -> Self | None:
        """Lock a folder, or return None when somebody else holds it for longer than ``patience``, in seconds."""
        import fcntl

        descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if _taken(descriptor, fcntl.LOCK_EX, patience):
            return cls(descriptor)
        os.close(descriptor)
        return None

    @staticmethod
    def held(folder: Path, patience: float = 0.0) -> bool:
        """Return whether somebody holds a folder's lock, still after ``patience`` seconds."""
        import fcntl

        try:
            descriptor = os.open(folder / _FILE, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            # shared, so that those who only look do not see each other
            return not _taken(descriptor, fcntl.LOCK_SH, patience)
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the lock."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of it in this process."""
        os.close(self.descriptor)


def _taken(descriptor: int, how: int, patience: float) -> bool:
    import fcntl

    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_PAUSE)
        else:
            return True


def detach(command: Sequence[str], log: Path, lock: JobLock) -> int:
    """Start a process that outlives this one and holds the lock from its first moment; its output goes to ``log``. Return its number."""
    reap()
    with log.open("ab") as handle:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, start_new_session=True, pass_fds=(lock.descriptor,), close_fds=True
        )
    _children.append(child.pid)
    child.returncode = 0  # it is meant to outlive this process, and Popen would warn of that
    return child.pid


def reap() -> None:
    """Wait for processes of ours that have ended, so that they leave no zombies."""
    for pid in tuple(_children):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            ended = True
        if ended and pid in _children:
            _children.remove(pid)
