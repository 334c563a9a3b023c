"""Running a command and measuring it: wall seconds, and the peak memory of it and its children together.

Memory is PSS (proportional set size): a page that k processes share counts 1/k in each, so that the sum over a process
tree is what the tree really takes. It is sampled.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_S = 0.05


@dataclass(frozen=True)
class Measured:
    """Wall seconds, CPU seconds of all its processes, peak memory, and what it printed."""

    seconds: float
    cpu_s: float
    peak_mib: float
    result: dict[str, Any]


def pss_mib(pids: list[int]) -> float:
    """PSS of some processes together, in MiB; those that have ended count nothing."""
    total_kib = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_kib += int(line.split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total_kib / 1024


def descendants(pid: int) -> list[int]:
    """A process and all its children's children."""
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class PeakMemory:
    """Samples a process tree until stopped."""

    def __init__(self, pid: int, every_s: float = SAMPLE_S) -> None:
        self.pid, self.every_s, self.peak_mib = pid, every_s, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(self.every_s):
            self.peak_mib = max(self.peak_mib, pss_mib(descendants(self.pid)))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.peak_mib


def children_cpu_s() -> float:
    """CPU seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: list[str], env: dict[str, str] | None = None) -> Measured:
    """Run a command whose last line of output is a JSON object (or nothing); a failure ends the benchmark."""
    began, cpu_before = time.perf_counter(), children_cpu_s()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    memory = PeakMemory(process.pid, every_s=0.25)
    output, _ = process.communicate()
    seconds, peak = time.perf_counter() - began, memory.stop()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}\n{output}")
    lines = output.strip().splitlines()
    cpu_s = children_cpu_s() - cpu_before
    return Measured(seconds, cpu_s, peak, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def report(figures: dict[str, Any], *, as_json: bool) -> None:
    """Print figures, one a line; for a program, one JSON object as the last line."""
    for name, value in figures.items():
        print(f"{name:<44} {value:.4g}" if isinstance(value, float) else f"{name:<44} {value}")
    if as_json:
        print(json.dumps(figures))
