"""CPU time by process, from ``/proc`` (Linux)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def seconds(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, of these processes, and of what they started and has ended."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        total += sum(map(int, fields[11:15]))
    return total / _TICK


def children(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def machine() -> float:
    """CPU seconds of everything that runs on this machine, all cores together."""
    fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK  # less idle and iowait


class Meter:
    """CPU seconds by name since it was made; ``others`` is the rest of the machine."""

    def __init__(self, groups: Mapping[str, Callable[[], Iterable[int]]]) -> None:
        self._groups = groups
        self._start = self._read()

    def read(self) -> dict[str, float]:
        now = self._read()
        used = {name: now[name] - self._start[name] for name in now}
        used["others"] = max(0.0, used.pop("machine") - sum(used[name] for name in self._groups))
        return used

    def _read(self) -> dict[str, float]:
        found = {name: seconds(pids()) for name, pids in self._groups.items()}
        return {**found, "machine": machine()}
