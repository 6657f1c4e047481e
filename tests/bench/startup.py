"""What the start-up hook costs: ``python -c pass`` with and without ``steered_lm.pth``, interleaved, in one environment.

Run ``python tests/bench/startup.py [runs]``; prints CPU and wall-clock milliseconds a start, and the ratio.
"""

import os
import statistics
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

PTH = Path(__file__).resolve().parents[2] / "steered_lm.pth"


def start_cost(python: Path) -> tuple[float, float]:
    """Return CPU and wall-clock milliseconds of one ``python -c pass``."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    begin = time.perf_counter()
    process = os.posix_spawn(python, [str(python), "-c", "pass"], environ)
    usage = os.wait4(process, 0)[2]
    return 1e3 * (usage.ru_utime + usage.ru_stime), 1e3 * (time.perf_counter() - begin)


def measure(folder: Path, runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return per variant (``without``, ``with``) the CPU and wall-clock milliseconds of ``runs`` starts, taken in turns."""
    pythons = {}
    for variant in ("without", "with"):
        venv.create(folder / variant, symlinks=True, with_pip=False)
        pythons[variant] = folder / variant / "bin" / "python"
    base = str(folder / "with")
    packages = Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
    (packages / PTH.name).write_bytes(PTH.read_bytes())
    costs: dict[str, tuple[list[float], list[float]]] = {variant: ([], []) for variant in pythons}
    for _ in range(runs):
        for variant, python in pythons.items():
            cpu, wall = start_cost(python)
            costs[variant][0].append(cpu)
            costs[variant][1].append(wall)
    return costs


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder), runs)
    for index, clock in enumerate(("CPU", "wall")):
        off, on = (statistics.median(costs[variant][index]) for variant in ("without", "with"))
        print(f"{clock:4s} without {off:6.2f} ms   with {on:6.2f} ms   difference {on - off:5.2f} ms   ratio {on / off:.3f}   ({runs} runs each)")


if __name__ == "__main__":
    main()
