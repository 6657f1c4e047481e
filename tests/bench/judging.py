"""Throughput of the ``openai`` judge: a thousand calls that take the endpoint 50 ms each, 64 at a time, against what is possible at best.

The endpoint is an asyncio server in a process of its own, so that it shares no interpreter lock with the judge. Its own pace is measured
beside the judge's with a bare socket client, since on a machine with few cores both compete.

Run ``OMP_NUM_THREADS=1 python tests/bench/judging.py --help``.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from steered_lm.judges.base import JudgeRequest
from steered_lm.judges.openai import OpenAIJudge
from steered_lm.judges.question import Question
from steered_lm.persona.load import load_persona

sys.path.insert(0, str(Path(__file__).parents[1]))
import fault_server  # tests/ is no package


def bare(port: int, calls: int, concurrency: int, payload: bytes) -> float:
    """Return the seconds that as many bare exchanges take: open sockets, one write and one read each, nothing looked at."""
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(payload) + payload
    left = iter(range(calls))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()
        await writer.wait_closed()

    async def run() -> None:
        await asyncio.gather(*(work() for _ in range(concurrency)))

    started = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - started


def throughput(calls: int, concurrency: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Return the seconds of each round, of the judge and of bare sockets, and their ratios to the ideal time."""
    question = Question.of_persona(load_persona("edmund"))
    requests = [JudgeRequest(prompt="How was the harvest?", response=f"Middling, and field {i} is under water. " * 5) for i in range(calls)]
    ideal = calls / concurrency * seconds
    judged, sockets, computed = [], [], []
    with fault_server.remote(delay=seconds) as server:
        judge = OpenAIJudge.for_question(question, model="m", base_url=server.url, key_env="none", concurrency=concurrency)
        judge.judge(requests[:concurrency])  # imports, and what the endpoint takes
        payload = json.dumps({"messages": [{"content": question.system(token=True)}, {"content": question.user(requests[0])}]}).encode()
        for _ in range(rounds):
            sockets.append(bare(server.port, calls, concurrency, payload))
            started, busy = time.perf_counter(), time.process_time()
            verdicts = judge.judge(requests)
            judged.append(time.perf_counter() - started)
            computed.append(time.process_time() - busy)
            if any(verdict.score is None for verdict in verdicts):
                raise RuntimeError(f"missing verdicts: {next(v.missing for v in verdicts if v.missing)}")
    return {
        "ideal": ideal,
        "judge": judged,
        "bare sockets": sockets,
        "judge's processor seconds": computed,
        "judge / ideal": statistics.median(judged) / ideal,
        "best judge / ideal": min(judged) / ideal,
        "bare sockets / ideal": statistics.median(sockets) / ideal,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.05, help="what each call takes the endpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.3, help="the median ratio above which the exit status is 1")
    given = parser.parse_args()
    found = throughput(given.calls, given.concurrency, given.seconds, given.rounds)
    print(json.dumps(found, indent=1))
    print("load:", Path("/proc/loadavg").read_text().strip() if Path("/proc/loadavg").exists() else "unknown", "processors:", os.cpu_count())
    sys.exit(found["judge / ideal"] > given.limit)


if __name__ == "__main__":
    main()
