"""The machine that a benchmark runs on: its name, its rate, and how long a call takes."""

import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def machine_line():
    """What a table's numbers were measured on."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cpu_name():
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiply_rate(size=2048, seconds=1.0):
    """FLOP/s of a float32 product, over about a second, since a burst is faster than what lasts."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def timed(run):
    """Seconds and result of a call."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def seconds_of(code, *arguments, repeats=5):
    """Median seconds that each of some lines takes in fresh interpreters, one line after another.

    Returns:
        A list with a number per line.
    """
    program = (
        "import sys, time, logging, warnings; logging.disable(50); warnings.simplefilter('ignore')\n"
        "marks = [time.perf_counter()]\n"
        + "".join(f"{line}\nmarks.append(time.perf_counter())\n" for line in code)
        + "print(*(b - a for a, b in zip(marks, marks[1:])))"
    )
    runs = []
    for _ in range(repeats):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([float(number) for number in done.stdout.splitlines()[-1].split()])
    return [statistics.median(column) for column in zip(*runs, strict=True)]
