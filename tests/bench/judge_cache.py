"""Verdicts a second that a cache hands over in one process: page cache warm, cold, and while another process writes.

Run ``python tests/bench/judge_cache.py --help``. Cold: the system is asked to drop the file's pages before each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from steered_lm.judges.base import JudgeRequest, Usage, Verdict
from steered_lm.judges.cache import JudgeCache
from steered_lm.judges.cached import CachedJudge, request_key

AIM = 20_000
_WRITER = """
import sys, time
from steered_lm.judges.base import Verdict
from steered_lm.judges.cache import JudgeCache
cache, number = JudgeCache(sys.argv[1]), 0
print("ready", flush=True)
while True:
    cache.put_many({f"other {number}": Verdict(score=50, scale=(0, 100), judge="other")})
    number += 1
    time.sleep(0.001)
"""


class NoJudge:
    """A judge that must never be asked: each request is a hit."""

    name = "openai:a-model"
    identity = "0" * 64

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        raise AssertionError(f"{len(requests)} requests were no hits")


def material(count: int) -> tuple[list[JudgeRequest], Verdict]:
    """Return requests with replies of some sixty words, and a verdict with everything that a log-probability judge gives."""
    reply = "I sat by the river for a while, and it was a fine day for all of us who had come that far. " * 3
    requests = [JudgeRequest(prompt=f"What did you do on day {number}?", response=f"On day {number} {reply}") for number in range(count)]
    usage = Usage(requests=1, input_tokens=512, output_tokens=1, dollars=0.0001)
    return requests, Verdict(score=61.25, scale=(0, 100), explanation="61", judge=NoJudge.name, mode="logprobs", mass=0.97, usage=usage)


def drop_pages(path: Path) -> None:
    """Ask the system to forget what it holds of a file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def rates(run: Callable[[], Sequence[Verdict]], rounds: int, before: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Return hits a second of each round, by the clock and by this process's own processor time (which other programs do not lengthen)."""
    found: dict[str, list[float]] = {"clock": [], "processor": []}
    for _ in range(rounds):
        before()
        clock, processor = time.perf_counter(), time.process_time()
        verdicts = run()
        found["processor"].append(len(verdicts) / (time.process_time() - processor))
        found["clock"].append(len(verdicts) / (time.perf_counter() - clock))
        assert all(verdict.cached for verdict in verdicts)
    return found


def measure(folder: Path, count: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return hits a second by circumstance."""
    path = folder / "cache.sqlite"
    cache, (requests, verdict) = JudgeCache(path), material(count)
    judge = CachedJudge(NoJudge(), cache)
    keys = [request_key(NoJudge.identity, request) for request in requests]
    cache.put_many(dict.fromkeys(keys, verdict), {"model": "a-model", "rubric": "trait", "rubric_version": "1", "about": "humorous"})
    some = requests[: max(1, count // 20)]
    found = {
        "page cache warm": rates(lambda: judge.judge(requests), rounds),
        "page cache cold": rates(lambda: judge.judge(requests), rounds, lambda: drop_pages(path)),
        "one request a call": rates(lambda: [judge.judge([request])[0] for request in some], rounds),
    }
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            found["another process writes"] = rates(lambda: judge.judge(requests), rounds)
        finally:
            writer.kill()
    assert len(cache) > count, "the other process wrote nothing"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("bench/judge_cache.json"), help="where the numbers go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.requests, arguments.rounds)
    print(f"hits a second, {arguments.requests:,} requests, median of {arguments.rounds} rounds (lowest, highest), aim {AIM:,}")
    for name, by in found.items():
        told = (f"{by_what} {statistics.median(v):8,.0f} ({min(v):,.0f}, {max(v):,.0f})" for by_what, v in by.items())
        print(f"  {name:24s} {'   '.join(told)}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
