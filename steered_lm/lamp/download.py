"""LaMP's files from the host of its authors."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from steered_lm.config import make_folder
from steered_lm.errors import UserError, near_misses
from steered_lm.lamp.rows import AVOCADO
from steered_lm.lamp.task import LampTask

HOST = "https://ciir.cs.umass.edu/downloads/LaMP"
HOST_VARIABLE = "STEERED_LM_LAMP_URL"
"""The environment variable that names another place for the same files, such as a mirror."""
SPLITS = ("train", "dev", "test")
_PART = 1 << 20


def download(
    task: LampTask,
    split: str,
    folder: str | Path,
    *,
    by_time: bool = False,
    url: str | None = None,
    timeout: float = 60.0,
    on_file: Callable[[str, Path], None] = lambda address, path: None,
) -> list[Path]:
    """Fetch a split's questions and outputs into ``<folder>/<task>/`` and return their paths; files that are there already are kept.

    Args:
        task: which of the seven; LaMP_6 cannot be had this way.
        split: ``train``, ``dev`` or ``test``, of which there are questions alone.
        folder: what ``data`` or ``STEERED_LM_DATA`` will name.
        by_time: the files that are divided by time in place of those divided by user; they go to ``<folder>/time/<task>/``.
        url: where the files lie; by default the variable ``STEERED_LM_LAMP_URL``, else the host of LaMP's authors.
        timeout: seconds without an answer after which it is given up.
        on_file: called with the address and the path before each file that is fetched.

    Raises:
        UserError: for LaMP_6, an unknown split, a host that cannot be reached, or an answer that is no such file.
    """
    if task.name == "LaMP_6":
        raise UserError(AVOCADO)
    if split not in SPLITS:
        raise UserError(f"split={split!r} does not exist. {near_misses(split, SPLITS)}")
    base = (url or os.environ.get(HOST_VARIABLE) or HOST).rstrip("/")
    # the folder of LaMP_2 holds an older task, about news; its place was taken by the one about movies
    place = "/".join(["time"] * by_time + [task.name] + ["new"] * (task.name == "LaMP_2") + [split])
    target = Path(folder).expanduser() / ("time" if by_time else "") / task.name
    paths = []
    for kind in ("questions",) if split == "test" else ("questions", "outputs"):
        path = target / f"{split}_{kind}.json"
        if not path.exists():
            address = f"{base}/{place}/{path.name}"
            on_file(address, path)
            _fetch(address, path, b"[" if kind == "questions" else b"{", timeout)
        paths.append(path)
    return paths


def _fetch(address: str, path: Path, first: bytes, timeout: float) -> None:
    """Write what lies at an address to a file, whole or not at all. It is some hundred megabytes, so it is not held in memory."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"the address {address!r} is not on the web. Give a url that starts with http:// or https://.")
    make_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file, urlopen(Request(address, headers={"User-Agent": "steered-lm"}), timeout=timeout) as answer:
            announced = answer.headers.get("Content-Length")
            shutil.copyfileobj(answer, file, _PART)
            if announced is not None and file.tell() != int(announced):
                raise UserError(f"{address} broke off after {file.tell()} of {announced} bytes. Start the download again.")
        with Path(temporary).open("rb") as file:
            # the host answers some wrong addresses with a page that says so, and the status 200
            if file.read(256).lstrip()[:1] != first:
                raise UserError(f"{address} is not LaMP's file: its content is not JSON. Check the address; {HOST_VARIABLE} or url changes it.")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except HTTPError as problem:
        raise UserError(
            f"{address} was not given out: {problem.code} {problem.reason}. Check the address; {HOST_VARIABLE} or url changes it."
        ) from None
    except (URLError, OSError) as problem:
        raise UserError(f"{address} cannot be fetched: {problem}. Check the connection and start again; finished files are kept.") from problem
    finally:
        Path(temporary).unlink(missing_ok=True)
